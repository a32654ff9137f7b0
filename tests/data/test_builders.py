"""The TFDS builders and the `tfds` source, without TensorFlow."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data import builders
from effjax.data.sources.digits import Digits
from effjax.data.sources.stdlib import Stdlib
from effjax.data.sources.tfds import open_tfds

PREPARE = """
import json, sys
from effjax.data import builders
out = {}
for name in builders.BUILDERS:
    builder = builders.prepare(name, sys.argv[1])
    out[name] = {s: len(builder.as_data_source(split=s)) for s in builder.info.splits}
out['imported'] = sorted({'tensorflow', 'torch'} & set(sys.modules))
print(json.dumps(out))
"""


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Both sets, prepared in a process of its own."""
    path = tmp_path_factory.mktemp('tfds')
    done = subprocess.run(
        [sys.executable, '-c', PREPARE, str(path)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path / 'out.json').write_text(done.stdout)
    (path / 'err.txt').write_text(done.stderr)
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('EFFJAX_CACHE', str(tmp_path / 'cache'))


def test_builders_write_and_read_without_tensorflow(data_dir):
    out = json.loads((data_dir / 'out.json').read_text())  # nothing else on stdout
    assert out['imported'] == []
    assert sum(out['effjax_digits'].values()) == 1797
    said = Stdlib().describe()
    assert out['effjax_stdlib'] == {s: said[s]['documents'] for s in ('train', 'valid')}
    assert list(data_dir.rglob('*.array_record*'))


def test_preparing_the_embedded_sets_says_nothing(data_dir):
    assert (data_dir / 'err.txt').read_text() == ''


def test_digits_through_tfds_equal_the_source(data_dir):
    source = open_tfds(name='effjax_digits', data_dir=str(data_dir))
    assert (source.modality, source.image_shape, source.classes) == ('image', (8, 8, 1), 10)
    assert 'tensorflow' not in sys.modules
    ours = Digits()
    for split in ('train', 'valid'):
        found, expected = source.arrays(split), ours.arrays(split)

        # TFDS shuffles once when it writes.
        def order(images, labels):
            return sorted(
                (i.tobytes(), int(label)) for i, label in zip(images, labels, strict=True)
            )

        assert order(*found) == order(*expected)
    batch = source.examples('train')[[5, 2]]
    assert (batch['image'] == source.arrays('train')[0][[5, 2]]).all()
    assert (batch['image'].dtype, batch['label'].dtype) == (np.uint8, np.int32)
    assert source.describe()['dataset'] == 'effjax_digits/1.0.0'


def test_stdlib_through_tfds_equals_the_source(data_dir):
    source = open_tfds(name='effjax_stdlib', data_dir=str(data_dir))
    assert (source.modality, source.one_document) == ('text', False)
    found = {d.text for d in source.documents('valid')}
    assert found == {d.text for d in Stdlib().documents('valid')}
    assert next(source.documents('train')) == next(source.documents('train'))


def test_a_prepared_folder_and_slices(data_dir):
    folder = str(data_dir / 'effjax_digits' / '1.0.0')
    source = open_tfds(name=folder, split='train[:200]', valid_split='train[200:300]')
    assert len(source.examples('train')) == 200
    assert len(source.examples('valid')) == 100
    whole = open_tfds(name=folder, split='train', valid_split='train[:300]')
    said = whole.describe()
    # Training gives way to what is also held out.
    assert (
        said['train']['examples']
        == json.loads((data_dir / 'out.json').read_text())['effjax_digits']['train'] - 300
    )
    one = open_tfds(name=folder, valid_split='', valid_fraction=0.5)
    assert set(one.splits) == {'train', 'valid'}


def test_errors(data_dir):
    def opened(**kw):
        return open_tfds(data_dir=str(data_dir), **kw)

    with pytest.raises(DataError, match=r"no TFDS dataset 'effjax_digitz'.*mean 'effjax_digits'"):
        opened(name='effjax_digitz')
    with pytest.raises(DataError, match=r"no split 'trian'; it has train, valid.*mean 'train'"):
        opened(name='effjax_digits', split='trian')
    with pytest.raises(DataError, match=r"no feature 'imag'; it has image, label.*mean 'image'"):
        opened(name='effjax_digits', image_key='imag')
    with pytest.raises(DataError, match=r"feature 'label' holds int, not text"):
        list(opened(name='effjax_digits', text_key='label').documents('train'))
    with pytest.raises(DataError, match=r"feature 'id' has shape .*must have one fixed"):
        opened(name='effjax_stdlib', image_key='id', label_key='text')
    with pytest.raises(DataError, match=r"feature 'image' is not a class label"):
        opened(name='effjax_digits', label_key='image')
    with pytest.raises(ConfigError, match=r'text_key or image_key, not both'):
        opened(name='effjax_digits', image_key='image', text_key='label')
    with pytest.raises(ConfigError, match=r"unknown TFDS builder 'digits'"):
        builders.prepare('digits')


def test_a_dataset_that_cannot_be_prepared_says_so(monkeypatch, tmp_path):
    def fails(error):
        def download_and_prepare(builder):
            raise error

        monkeypatch.setattr(builders, 'download_and_prepare', download_and_prepare)
        open_tfds(name='mnist', data_dir=str(tmp_path))

    missing = ModuleNotFoundError("No module named 'tensorflow'", name='tensorflow')
    with pytest.raises(DataError, match=r"'mnist' needs the package tensorflow: .*effjax\[tf\]"):
        fails(missing)
    with pytest.raises(DataError, match=r"'mnist' cannot be prepared .OSError: no network.; prep"):
        fails(OSError('no network\nat all'))


def test_a_format_without_random_access(monkeypatch, tmp_path):
    """A dataset prepared as tfrecord cannot be served without TensorFlow."""
    tfds = pytest.importorskip('tensorflow_datasets')
    builders.register('effjax_digits')
    builder = tfds.builder('effjax_digits', data_dir=tmp_path)
    monkeypatch.setattr('effjax.data.sources.tfds._builder', lambda name, data_dir: builder)
    with pytest.raises(DataError, match=r"without random access; .*file_format='array_record'"):
        open_tfds(name='effjax_digits')
