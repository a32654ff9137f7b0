"""Image folders: `class/name.png`, the folder being the label."""

import io
import pathlib
from typing import Any

import numpy as np

from effjax.core.errors import ConfigError, DataError
from effjax.data import split as splitting
from effjax.data.images import ImageSource, Index
from effjax.data.sources.files import optional

SUFFIXES = frozenset({'.png', '.jpg', '.jpeg', '.bmp', '.gif', '.webp', '.ppm', '.pgm', '.tif'})
_EIGHT_BITS = frozenset({'1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'})


class ImageFolder(ImageSource):
    """Images in one folder a class, read with Pillow as they are needed."""

    def __init__(
        self,
        *,
        path: str,
        valid_path: str = '',
        image_size: int = 0,
        channels: int = 3,
        valid_fraction: float = 0.1,
    ):
        """Lists the files.

        Args:
          path: a folder with one folder a class; classes are sorted by name.
          valid_path: held-out images of their own, the same way and with the same classes; ''
            holds out a part of `path` by content.
          image_size: side to resize to (the shorter side, then the centre is cut out); 0 keeps
            the images' own size, which must then be one for all.
          channels: 1 (grey) or 3 (RGB); images are converted.
          valid_fraction: held-out part where `valid_path` is ''.

        Raises:
          ConfigError: a bad argument.
          DataError: nothing there, a class that only one of the folders has, or no Pillow.
        """
        if channels not in (1, 3):
            raise ConfigError(f'channels must be 1 or 3, got {channels}.')
        if image_size < 0:
            raise ConfigError(f'image_size must not be negative, got {image_size}.')
        optional('PIL.Image', 'reading images')
        self._channels, self._size = channels, image_size
        roots = {'train': path, 'valid': valid_path} if valid_path else {'all': path}
        self._files = {part: _list(root) for part, root in roots.items()}
        first = next(iter(self._files))
        names = sorted({label for label, _, _ in self._files[first]})
        for part, files in self._files.items():
            unknown = sorted({label for label, _, _ in files} - set(names))
            if unknown:
                raise DataError(f'the {part} folder has a class {unknown[0]!r} that train has not.')
        self._class_names = names
        super().__init__(
            f'images:{pathlib.Path(path).expanduser().name}',
            valid_fraction,
            image_shape=self._shape(first),
            class_names=names,
            own_valid=bool(valid_path),
        )

    def _shape(self, part: str) -> tuple[int, int, int]:
        if self._size:
            return (self._size, self._size, self._channels)
        _, name, file = self._files[part][0]
        return (*self._decode(name, file.read_bytes()).shape[:2], self._channels)

    def _scan(self, part: str) -> Index:
        digests, labels = [], []
        for label, name, file in self._files[part]:
            data = file.read_bytes()
            self._checked(name, self._decode(name, data))
            digests.append(splitting.digest(data))
            labels.append(self._class_names.index(label))
        return Index(digests, np.array(labels, dtype=np.int32))

    def _identity(self, part: str) -> Any:
        listing = [
            (name, file.stat().st_size, file.stat().st_mtime_ns)
            for _, name, file in self._files[part]
        ]
        return [self._class_names, self.image_shape, listing]

    def _take(self, part: str, positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), *self.image_shape), dtype=np.uint8)
        for i, position in enumerate(positions):
            _, name, file = self._files[part][position]
            out[i] = self._checked(name, self._decode(name, file.read_bytes()))
        return out

    def _decode(self, name: str, data: bytes) -> np.ndarray:
        """Returns uint8 [H, W, C], resized if asked."""
        import PIL.Image

        try:
            with PIL.Image.open(io.BytesIO(data)) as stored:
                if stored.mode not in _EIGHT_BITS:
                    raise DataError(f'{name} has {stored.mode} pixels; convert it to 8 bits.')
                image = stored.convert('L' if self._channels == 1 else 'RGB')
        except (OSError, SyntaxError, ValueError) as e:  # all of these mean a damaged file
            if isinstance(e, DataError):
                raise
            raise DataError(f'{name} is not an image that Pillow can read ({e}).') from e
        if self._size:
            image = _fit(image, self._size)
        return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, -1)

    def _checked(self, name: str, image: np.ndarray) -> np.ndarray:
        if image.shape != self.image_shape:
            raise DataError(
                f'{name} is {image.shape[0]}x{image.shape[1]} and others are '
                f'{self.image_shape[0]}x{self.image_shape[1]}; set data.image_size.'
            )
        return image


def _fit(image: Any, size: int) -> Any:
    """Resizes the shorter side to `size` and cuts out the centre."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height))
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _list(path: str) -> list[tuple[str, str, pathlib.Path]]:
    """Returns (class, name, file), sorted by name."""
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise DataError(f'no image folder {path!r}; set data.path to a folder of class folders.')
    files = sorted(
        (file.relative_to(root).as_posix(), file)
        for file in root.glob('*/**/*')
        if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    if not files:
        raise DataError(f'no image under {path!r}; expected one folder a class, as cat/001.png.')
    return [(name.partition('/')[0], name, file) for name, file in files]
