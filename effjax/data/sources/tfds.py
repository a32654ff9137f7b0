"""Any dataset that TFDS can serve as a data source: text or images, without TensorFlow.

Datasets are prepared as array_record, since TFDS's default format needs TensorFlow. A dataset that
was prepared elsewhere is read from its folder.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import suggest
from effjax.data import builders
from effjax.data.documents import Document, DocumentSource
from effjax.data.images import ImageSource, Index, index_arrays
from effjax.data.sources.files import optional

ROWS = 64  # examples read at a time
_HELD_OUT = ('valid', 'validation', 'test')


def open_tfds(
    *,
    name: str,
    split: str = 'train',
    valid_split: str | None = None,
    text_key: str = '',
    image_key: str = '',
    label_key: str = 'label',
    data_dir: str = '',
    valid_fraction: float = 0.05,
) -> 'TfdsText | TfdsImages':
    """Opens a TFDS dataset, prepared first if need be.

    Args:
      name: a TFDS name such as 'mnist' or 'effjax_digits', or the folder of a prepared dataset.
      split: the split to train on; TFDS's slices ('train[:10%]') may be used.
      valid_split: the held-out split; None takes the dataset's own 'valid', 'validation' or
        'test' if it has one; '' holds out a part of `split` by content.
      text_key: the feature that holds text; '' takes 'text' if there is no 'image'.
      image_key: the feature that holds an image; '' takes 'image'.
      label_key: the feature that holds an image's label.
      data_dir: where TFDS keeps its datasets; '' is a folder of effjax's cache.
      valid_fraction: held-out part where there is no held-out split.

    Raises:
      ConfigError: arguments that exclude each other.
      DataError: no such dataset, split or feature, or one that cannot be prepared or read.
    """
    if text_key and image_key:
        raise ConfigError('give text_key or image_key, not both.')
    builder = _builder(name, data_dir)
    features = builder.info.features
    if not text_key and not image_key:
        found = [key for key in ('image', 'text') if key in features]
        if not found:
            raise DataError(
                f"TFDS dataset {name!r} has neither 'text' nor 'image' but "
                f'{", ".join(features)}; set data.text_key or data.image_key.'
            )
        image_key, text_key = (found[0], '') if found[0] == 'image' else ('', found[0])
    for key in (text_key, *((image_key, label_key) if image_key else ())):
        if key and key not in features:
            raise DataError(
                f'TFDS dataset {name!r} has no feature {key!r}; it has {", ".join(features)}.'
                + suggest(key, features)
            )
    if valid_split is None:
        own = [s for s in _HELD_OUT if s in builder.info.splits and s != split]
        valid_split = own[0] if own else ''
    parts = {'train': split, 'valid': valid_split} if valid_split else {'all': split}
    readers = {part: _Reader(builder, name, s) for part, s in parts.items()}
    if image_key:
        return TfdsImages(builder, readers, image_key, label_key, valid_fraction)
    return TfdsText(builder, readers, text_key, valid_fraction)


class _Reader:
    """Batched random access to one split."""

    def __init__(self, builder: Any, name: str, split: str):
        try:
            self._source = builder.as_data_source(split=split)
            self._split = builder.info.splits[split]
        except (ValueError, KeyError) as e:
            known = list(builder.info.splits)
            raise DataError(
                f'TFDS dataset {name!r} has no split {split!r}; it has {", ".join(known)}.'
                + suggest(split, known)
            ) from e
        except NotImplementedError as e:
            raise DataError(
                f'TFDS dataset {name!r} was prepared in a format without random access; prepare '
                "it with file_format='array_record', or set data.data_dir to another folder."
            ) from e
        self.split = split

    def __len__(self) -> int:
        return len(self._source)

    def take(self, positions: np.ndarray) -> list[dict[str, Any]]:
        return self._source.__getitems__([int(p) for p in positions])

    def batches(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start in range(0, len(self), ROWS):
            yield start, self.take(np.arange(start, min(start + ROWS, len(self))))

    def identity(self) -> list[Any]:
        """Names the files that a split is read from, and how they look now."""
        stats = [pathlib.Path(file).stat() for file in self._split.filepaths]
        return [self.split, len(self), [(s.st_size, s.st_mtime_ns) for s in stats]]


class TfdsText(DocumentSource):
    """Documents from a text feature."""

    def __init__(
        self, builder: Any, readers: dict[str, _Reader], text_key: str, valid_fraction: float
    ):
        super().__init__(f'tfds:{builder.name}', valid_fraction, own_valid='valid' in readers)
        self._full_name = builder.info.full_name
        self._readers = readers
        self._key = text_key

    def _read(self, part: str) -> Iterator[Document]:
        reader = self._readers[part]
        for start, rows in reader.batches():
            for i, row in enumerate(rows, start):
                value = row[self._key]
                where = f'{reader.split}/{i}'
                if not isinstance(value, bytes | str):
                    raise DataError(
                        f'{self.name}: feature {self._key!r} holds '
                        f'{type(value).__name__}, not text.'
                    )
                try:
                    text = value if isinstance(value, str) else value.decode()
                except UnicodeDecodeError:
                    self._skip(where, 'not UTF-8')
                    continue
                yield Document(where, text, self.name)

    def _facts(self) -> dict[str, Any]:
        return {'dataset': self._full_name}


class TfdsImages(ImageSource):
    """Labelled images from an image feature (or a uint8 tensor)."""

    def __init__(
        self,
        builder: Any,
        readers: dict[str, _Reader],
        image_key: str,
        label_key: str,
        valid_fraction: float,
    ):
        info = builder.info
        shape = tuple(info.features[image_key].shape)
        if len(shape) != 3 or None in shape:
            raise DataError(
                f'TFDS dataset {info.full_name!r}: feature {image_key!r} has shape {shape}; '
                'images must have one fixed (height, width, channels).'
            )
        label = info.features[label_key]
        if not hasattr(label, 'names'):
            raise DataError(
                f'TFDS dataset {info.full_name!r}: feature {label_key!r} is not a class label.'
            )
        super().__init__(
            f'tfds:{builder.name}',
            valid_fraction,
            image_shape=shape,
            class_names=label.names,
            own_valid='valid' in readers,
        )
        self._full_name = info.full_name
        self._readers = readers
        self._image, self._label = image_key, label_key

    def _scan(self, part: str) -> Index:
        digests, labels = [], []
        for _, rows in self._readers[part].batches():
            images = np.stack([row[self._image] for row in rows])
            index = index_arrays(images, np.array([row[self._label] for row in rows]))
            digests += index.digests
            labels.append(index.labels)
        return Index(digests, np.concatenate(labels) if labels else np.zeros(0, np.int32))

    def _identity(self, part: str) -> Any:
        return [self._full_name, self._image, self._label, *self._readers[part].identity()]

    def _take(self, part: str, positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), *self.image_shape), dtype=np.uint8)
        for start in range(0, len(positions), ROWS):
            rows = self._readers[part].take(positions[start : start + ROWS])
            out[start : start + ROWS] = [row[self._image] for row in rows]
        return out

    def _facts(self) -> dict[str, Any]:
        return {'dataset': self._full_name}


def _builder(name: str, data_dir: str) -> Any:
    """Returns a builder whose files are there.

    Raises:
      DataError: no such dataset, or one that cannot be prepared here.
    """
    tfds = optional('tensorflow_datasets', 'reading TFDS datasets')
    path = pathlib.Path(name).expanduser()
    if (path / 'dataset_info.json').is_file():
        return tfds.builder_from_directory(path)
    if name in builders.BUILDERS:
        return builders.prepare(name, data_dir)
    try:
        builder = tfds.builder(
            name, data_dir=builders.folder(data_dir), file_format='array_record', try_gcs=False
        )
    except tfds.core.DatasetNotFoundError as e:
        known = [*tfds.list_builders(with_community_datasets=False), *builders.BUILDERS]
        raise DataError(f'no TFDS dataset {name!r}.' + suggest(name, known)) from e
    try:
        builders.download_and_prepare(builder)
    except ImportError as e:
        raise DataError(
            f'preparing TFDS dataset {name!r} needs the package {e.name}: install it (effjax[tf] '
            'brings TensorFlow), or prepare the dataset elsewhere and give its folder as data.name.'
        ) from e
    except Exception as e:  # a download or a generator may fail in any way
        raise DataError(
            f'TFDS dataset {name!r} cannot be prepared ({type(e).__name__}: '
            f'{str(e).splitlines()[0] if str(e) else "no message"}); prepare it elsewhere and give '
            'its folder as data.name.'
        ) from e
    return builder
