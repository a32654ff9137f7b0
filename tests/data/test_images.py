"""Image sources: the embedded digits, image folders, splits, and bad input."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data.images import Index
from effjax.data.sources import digits
from effjax.data.sources.digits import Digits
from effjax.data.sources.folder import ImageFolder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('EFFJAX_CACHE', str(tmp_path / 'cache'))


def random_image(seed, size=(6, 4), channels=3):
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'pets'
    for i in range(30):
        file = root / ('cat', 'dog', 'emu')[i % 3] / f'{i:02}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(random_image(i)).save(file)
    (root / 'cat' / 'notes.txt').write_text('not an image')
    return root


def test_digits_are_all_there():
    source = Digits()
    assert (source.image_shape, source.classes, source.modality) == ((8, 8, 1), 10, 'image')
    parts = [source.arrays(split) for split in source.splits]
    for images, labels in parts:
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        assert images.shape == (len(labels), 8, 8, 1)
    images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    assert len(images) == 1797
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(np.unique(images)) == 17  # 16 levels and none, over 0..255
    assert (images.min(), images.max()) == (0, 255)
    held_out = {image.tobytes() for image in parts[1][0]}
    assert not held_out & {image.tobytes() for image in parts[0][0]}
    assert 0.15 < len(held_out) / 1797 < 0.25


def test_digits_equal_scikit_learns():
    datasets = pytest.importorskip('sklearn.datasets', reason='scikit-learn is not installed')
    images, labels = digits.load()
    bunch = datasets.load_digits()
    assert (labels == bunch.target).all()
    assert (np.rint(images[..., 0] / 255 * 16) == bunch.images).all()


def test_examples_are_indexed(folder):
    source = ImageFolder(path=str(folder), valid_fraction=0.3)
    examples = source.examples('train')
    images, labels = source.arrays('train')
    assert len(examples) == len(labels)
    batch = examples[[3, 0, 3]]
    assert (batch['image'] == images[[3, 0, 3]]).all()
    assert (batch['label'] == labels[[3, 0, 3]]).all()
    assert batch['label'].dtype == np.int32
    assert (examples[1:4]['image'] == images[1:4]).all()
    assert examples[[]]['image'].shape == (0, 6, 4, 3)


def test_folder_labels_by_class_and_splits_by_content(folder):
    source = ImageFolder(path=str(folder), valid_fraction=0.3)
    assert source.class_names == ('cat', 'dog', 'emu')
    assert source.image_shape == (6, 4, 3)
    found = {}
    for split in source.splits:
        for image, label in zip(*source.arrays(split), strict=True):
            assert image.tobytes() not in found
            found[image.tobytes()] = label
    assert found == {random_image(i).tobytes(): i % 3 for i in range(30)}
    said = source.describe()
    json.dumps(said)
    assert said['examples'] == 30
    assert sum(said['train']['by_class']) == said['train']['examples']
    assert ImageFolder(path=str(folder), valid_fraction=0.3).describe() == said
    assert ImageFolder(path=str(folder), valid_fraction=0.5).describe()['digest'] != said['digest']


def test_an_identical_copy_stays_in_its_split(folder):
    source = ImageFolder(path=str(folder), valid_fraction=0.3)
    before = source.describe()['valid']['examples']
    for file in list(folder.rglob('*.png')):
        shutil.copy(file, file.with_name(f'copy-{file.name}'))
    source = ImageFolder(path=str(folder), valid_fraction=0.3)
    assert source.describe()['valid']['examples'] == 2 * before


def test_a_changed_folder_is_read_again(folder):
    before = ImageFolder(path=str(folder)).describe()['digest']
    PIL.Image.fromarray(random_image(99)).save(folder / 'dog' / '01.png')
    assert ImageFolder(path=str(folder)).describe()['digest'] != before


def test_held_out_folder_of_its_own(folder, tmp_path):
    other = tmp_path / 'held_out'
    (other / 'dog').mkdir(parents=True)
    shutil.copy(folder / 'dog' / '01.png', other / 'dog')
    PIL.Image.fromarray(random_image(77)).save(other / 'dog' / 'new.png')
    source = ImageFolder(path=str(folder), valid_path=str(other))
    assert len(source.examples('valid')) == 2
    assert source.examples('valid').labels.tolist() == [1, 1]
    assert len(source.examples('train')) == 29  # the one that is also held out is gone
    (other / 'yak').mkdir()
    shutil.copy(folder / 'dog' / '01.png', other / 'yak')
    with pytest.raises(DataError, match=r"valid folder has a class 'yak' that train has not"):
        ImageFolder(path=str(folder), valid_path=str(other))


def test_resizing_and_grey(folder):
    PIL.Image.fromarray(random_image(50, (9, 12))).save(folder / 'cat' / 'wide.png')
    source = ImageFolder(path=str(folder), image_size=5, channels=1, valid_fraction=0.0)
    images, labels = source.arrays('train')
    assert images.shape == (31, 5, 5, 1)
    assert len(labels) == 31


def test_index_survives_json():
    index = Index([b'\x00\xff' * 8], np.array([3], np.int32))
    again = Index.from_json(json.loads(json.dumps(index.to_json())))
    assert again.digests == index.digests
    assert again.labels.dtype == np.int32
    assert again.labels.tolist() == [3]


# Bad input.


def test_folder_errors(folder, tmp_path):
    with pytest.raises(DataError, match=r'no image folder .*; set data.path'):
        ImageFolder(path=str(tmp_path / 'none'))
    (tmp_path / 'flat').mkdir()
    with pytest.raises(DataError, match=r'expected one folder a class, as cat/001.png'):
        ImageFolder(path=str(tmp_path / 'flat'))
    with pytest.raises(ConfigError, match=r'channels must be 1 or 3, got 4'):
        ImageFolder(path=str(folder), channels=4)
    with pytest.raises(ConfigError, match=r'image_size must not be negative'):
        ImageFolder(path=str(folder), image_size=-1)
    with pytest.raises(ConfigError, match=r'valid_fraction must be in \[0, 1\)'):
        ImageFolder(path=str(folder), valid_fraction=1.0)


def test_bad_images_are_named(folder):
    PIL.Image.fromarray(random_image(1, (5, 5))).save(folder / 'dog' / 'odd.png')
    with pytest.raises(DataError, match=r'dog/odd.png is 5x5 and others are 6x4; set data.image_s'):
        ImageFolder(path=str(folder)).describe()
    whole = (folder / 'dog' / '01.png').read_bytes()
    for data in (b'', b'text', whole[: len(whole) // 2]):
        (folder / 'dog' / 'odd.png').write_bytes(data)
        with pytest.raises(DataError, match=r'dog/odd.png is not an image that Pillow can read'):
            ImageFolder(path=str(folder)).describe()
    deep = np.arange(24, dtype=np.uint16).reshape(6, 4) * 1000
    PIL.Image.fromarray(deep).save(folder / 'dog' / 'odd.png')
    with pytest.raises(DataError, match=r'dog/odd.png has I;16 pixels; convert it to 8 bits'):
        ImageFolder(path=str(folder)).describe()


def test_split_errors(folder):
    with pytest.raises(DataError, match=r"no split 'valid'; it has train. Set valid_fraction"):
        ImageFolder(path=str(folder), valid_fraction=0.0).examples('valid')
    with pytest.raises(DataError, match=r"split 'valid' of source 'images:pets' is empty; change"):
        ImageFolder(path=str(folder), valid_fraction=1e-12).examples('valid')


@pytest.mark.parametrize('damage', [b'', b'\x1f\x8b', None])
def test_a_damaged_embedded_file(damage, monkeypatch, tmp_path):
    if damage is None:
        import gzip

        damage = gzip.compress(b'1,2,3\n')
    (tmp_path / 'digits.csv.gz').write_bytes(damage)
    monkeypatch.setattr('importlib.resources.files', lambda package: tmp_path)
    with pytest.raises(DataError, match=r'digits.csv.gz .*; install effjax again'):
        Digits()
