"""MNIST's format: what is read, and each way in which files can be wrong."""

import gzip
import json
import struct

import numpy as np
import pytest

from effjax import data
from effjax.core.errors import DataError
from effjax.data.sources.idx import Idx

TRAIN, HELD_OUT = 30, 7


def idx(array: np.ndarray) -> bytes:
    """Returns an array of unsigned bytes in the format."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape)
    return head + array.tobytes()


def examples(count: int, seed: int, size: tuple[int, int] = (6, 4), classes: int = 3):
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (count, *size), dtype=np.uint8)
    return images, (np.arange(count) % classes).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A folder of the four files; those of train are compressed."""
    root = tmp_path / 'clothes'
    root.mkdir()
    for prefix, count, seed in (('train', TRAIN, 0), ('t10k', HELD_OUT, 1)):
        images, labels = examples(count, seed)
        for name, array in (('images-idx3', images), ('labels-idx1', labels)):
            content = idx(array)
            if prefix == 'train':
                (root / f'{prefix}-{name}-ubyte.gz').write_bytes(gzip.compress(content))
            else:
                (root / f'{prefix}-{name}-ubyte').write_bytes(content)
    return root


def replace(folder, name: str, content: bytes) -> None:
    """Puts uncompressed content in the place of a file."""
    (folder / f'{name}.gz').unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def test_images_and_labels_are_read(folder):
    source = Idx(path=str(folder))
    assert (source.name, source.modality, source.splits) == (
        'idx:clothes',
        'image',
        ('train', 'valid'),
    )
    assert (source.image_shape, source.classes) == ((6, 4, 1), 3)
    for split, count, seed in (('train', TRAIN, 0), ('valid', HELD_OUT, 1)):
        images, labels = source.arrays(split)
        wanted, classes = examples(count, seed)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        assert (images[..., 0] == wanted).all()
        assert (labels == classes).all()
    batch = source.examples('train')[[3, 0, 3]]
    assert (batch['image'][..., 0] == examples(TRAIN, 0)[0][[3, 0, 3]]).all()


def test_what_is_held_out_is_not_trained_on(folder):
    images, _ = examples(HELD_OUT, 1)
    images[2] = examples(TRAIN, 0)[0][5]
    replace(folder, 't10k-images-idx3-ubyte', idx(images))
    source = Idx(path=str(folder))
    assert len(source.examples('valid')) == HELD_OUT
    assert len(source.examples('train')) == TRAIN - 1


def test_the_description_names_the_content(folder):
    said = Idx(path=str(folder)).describe()
    json.dumps(said)
    assert said['train'] == {'examples': TRAIN, 'by_class': [10, 10, 10]}
    assert said['valid']['examples'] == HELD_OUT
    assert Idx(path=str(folder)).describe() == said
    images, _ = examples(HELD_OUT, 2)
    replace(folder, 't10k-images-idx3-ubyte', idx(images))
    assert Idx(path=str(folder)).describe()['digest'] != said['digest']


def test_it_makes_a_dataset(folder):
    dataset = data.build({'kind': 'idx', 'path': str(folder)}, seq_len=1)
    sampler = dataset.train(8, 1, 0)
    batch = sampler.batch(sampler.initial())
    assert batch['image'].shape == (8, 6, 4, 1)
    held_out = dataset.eval('valid', 4)
    assert [b['weights'].sum() for b in held_out] == [4, 3]


def test_fashion_mnist(shared_data):
    folder = shared_data / 'fashion-mnist'
    if not folder.is_dir():
        pytest.skip(f'no folder {folder.name} in the shared data')
    source = Idx(path=str(folder))
    said = source.describe()
    assert (said['image_shape'], said['classes']) == ([28, 28, 1], 10)
    assert said['train'] == {'examples': 60000, 'by_class': [6000] * 10}
    assert said['valid'] == {'examples': 10000, 'by_class': [1000] * 10}
    assert source.examples('valid').labels[:5].tolist() == [9, 2, 1, 1, 6]


# Bad input.


@pytest.mark.parametrize('path', ['', 'nowhere'])
def test_no_folder(path):
    with pytest.raises(DataError, match=f"no folder '{path}'; set data.path to the one that hol"):
        Idx(path=path)


def test_a_missing_file(folder):
    (folder / 'train-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(DataError, match=r'has neither train-labels-idx1-ubyte nor .*ubyte.gz; dat'):
        Idx(path=str(folder))


@pytest.mark.parametrize(
    ('content', 'begins'),
    [
        (b'', 'nothing'),
        (b'\x89PNG', '89 50 4e 47'),
        (idx(np.zeros(4, np.uint8)), '00 00 08 01'),  # labels in the place of images
        (b'\x00\x00\x0d\x03' + bytes(12), '00 00 0d 03'),  # float32
    ],
)
def test_another_format(folder, content, begins):
    replace(folder, 't10k-images-idx3-ubyte', content)
    match = f'images-idx3-ubyte is no idx file of images .* begins with {begins}, not 00 00 08 03'
    with pytest.raises(DataError, match=match):
        Idx(path=str(folder))


@pytest.mark.parametrize(('cut', 'held'), [(-1, '167'), (10, '0'), (4, '0')])
def test_a_truncated_file(folder, cut, held):
    content = (folder / 't10k-images-idx3-ubyte').read_bytes()
    replace(folder, 't10k-images-idx3-ubyte', content[:cut])
    with pytest.raises(DataError, match=f'images-idx3-ubyte is damaged or trunc.* holds {held};'):
        Idx(path=str(folder))


def test_more_than_announced(folder):
    content = (folder / 't10k-labels-idx1-ubyte').read_bytes()
    replace(folder, 't10k-labels-idx1-ubyte', content + b'\x00')
    with pytest.raises(DataError, match=r'announces 7 labels, 7 bytes, and holds 8; get a new'):
        Idx(path=str(folder))


def test_a_truncated_archive(folder):
    file = folder / 'train-images-idx3-ubyte.gz'
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r'train-images-idx3-ubyte.gz is damaged or truncated'):
        Idx(path=str(folder))


def test_files_that_do_not_belong_together(folder):
    replace(folder, 't10k-labels-idx1-ubyte', idx(np.zeros(HELD_OUT - 1, np.uint8)))
    with pytest.raises(DataError, match=r't10k-images-.* 7 images and t10k-labels-.* 6 labels;'):
        Idx(path=str(folder))
    replace(folder, 't10k-labels-idx1-ubyte', idx(np.full(HELD_OUT, 9, np.uint8)))
    with pytest.raises(DataError, match=r't10k has the label 9, but the labels of train end at 2'):
        Idx(path=str(folder))
    replace(folder, 't10k-images-idx3-ubyte', idx(examples(HELD_OUT, 1, size=(5, 5))[0]))
    with pytest.raises(DataError, match=r'train images are 6x4 and the t10k images 5x5; give'):
        Idx(path=str(folder))


def test_no_images(folder):
    replace(folder, 't10k-images-idx3-ubyte', idx(np.zeros((0, 6, 4), np.uint8)))
    replace(folder, 't10k-labels-idx1-ubyte', idx(np.zeros(0, np.uint8)))
    with pytest.raises(DataError, match=r't10k-images-idx3-ubyte holds no images; get a new copy'):
        Idx(path=str(folder))
