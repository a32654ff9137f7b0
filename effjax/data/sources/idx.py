"""MNIST's format, idx: images and labels in four files, as Fashion-MNIST and EMNIST come too."""

import math
import pathlib

import numpy as np

from effjax.core.errors import DataError
from effjax.data.images import ImageSource, Index, index_arrays
from effjax.data.sources.files import chunks

# Part of the source -> what its two files' names begin with.
_PREFIXES = {'train': 'train', 'valid': 't10k'}
# Two zero bytes, 8 for unsigned bytes, and the number of dimensions.
_MAGIC = {'images': b'\x00\x00\x08\x03', 'labels': b'\x00\x00\x08\x01'}


class Idx(ImageSource):
    """Grey images of one size; the files of the test set, 't10k', are the held-out split."""

    def __init__(self, *, path: str):
        """Reads the files.

        Args:
          path: the folder of train-images-idx3-ubyte, train-labels-idx1-ubyte,
            t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each as it is or as .gz.

        Raises:
          DataError: a file that is missing, damaged or of another format, or files that do not
            belong together.
        """
        root = pathlib.Path(path).expanduser()
        if not path or not root.is_dir():
            raise DataError(
                f'no folder {path!r}; set data.path to the one that holds '
                'train-images-idx3-ubyte.gz and the three files beside it.'
            )
        self._parts = {part: _load(root, prefix) for part, prefix in _PREFIXES.items()}
        train, valid = self._parts['train'], self._parts['valid']
        if train[0].shape[1:] != valid[0].shape[1:]:
            sizes = ['x'.join(map(str, images.shape[1:3])) for images, _ in (train, valid)]
            raise DataError(
                f'{root.name}: the train images are {sizes[0]} and the t10k images {sizes[1]}; '
                'give files that belong together.'
            )
        classes = int(train[1].max()) + 1
        if valid[1].max() >= classes:
            raise DataError(
                f'{root.name}: t10k has the label {valid[1].max()}, but the labels of train end '
                f'at {classes - 1}; give files that belong together.'
            )
        super().__init__(
            f'idx:{root.name}',
            0.0,
            image_shape=train[0].shape[1:],
            class_names=[str(label) for label in range(classes)],
            own_valid=True,
        )

    def _scan(self, part: str) -> Index:
        return index_arrays(*self._parts[part])

    def _take(self, part: str, positions: np.ndarray) -> np.ndarray:
        return self._parts[part][0][positions]


def _load(root: pathlib.Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [N, H, W, 1] and labels int32 [N] of a pair of files, N at least 1."""
    images_file = _find(root, f'{prefix}-images-idx3-ubyte')
    labels_file = _find(root, f'{prefix}-labels-idx1-ubyte')
    images, labels = _read(images_file, 'images'), _read(labels_file, 'labels')
    if len(images) != len(labels):
        raise DataError(
            f'{images_file.name} holds {len(images)} images and {labels_file.name} '
            f'{len(labels)} labels; give files that belong together.'
        )
    if not images.size:
        raise DataError(f'{images_file.name} holds no images; get a new copy of the file.')
    return images[..., None], labels.astype(np.int32)


def _find(root: pathlib.Path, name: str) -> pathlib.Path:
    for file in (root / name, root / f'{name}.gz'):
        if file.is_file():
            return file
    raise DataError(
        f'the folder {str(root)!r} has neither {name} nor {name}.gz; data of kind idx is the four '
        "files of MNIST's format."
    )


def _read(file: pathlib.Path, what: str) -> np.ndarray:
    """Returns a file's array: uint8 [N, H, W] of images, [N] of labels."""
    data = b''.join(chunks(file))
    magic = _MAGIC[what]
    if data[:4] != magic:
        raise DataError(
            f'{file.name} is no idx file of {what} in unsigned bytes: it begins with '
            f'{data[:4].hex(" ") or "nothing"}, not {magic.hex(" ")}; give the right file.'
        )
    dims = magic[3]
    shape = [int(n) for n in np.frombuffer(data[4 : 4 + 4 * dims].ljust(4 * dims, b'\0'), '>u4')]
    held, wanted = len(data) - 4 - 4 * dims, math.prod(shape)
    if held != wanted:
        raise DataError(
            f'{file.name} is damaged or truncated: it announces {"x".join(map(str, shape))} '
            f'{what}, {wanted} bytes, and holds {max(held, 0)}; get a new copy of the file.'
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
