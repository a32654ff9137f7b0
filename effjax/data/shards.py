"""Prepared shards: text tokenised once, in files that are mapped into memory.

A prepared folder holds

    manifest.json              what is in it, with a checksum of itself
    tokenizer/                 a copy of the tokenizer
    train-00000.tokens         tokens, little-endian uint16 (uint32 above 65,536 ids)
    train-00000.documents      int64 [documents, 2], little-endian: where each begins in the
                               shard's tokens, and its raw bytes
    train-00001.tokens ...     documents never straddle two shards

Each document is preceded by the tokenizer's BOS, if it has one. Files are written under a
temporary name and the folder is renamed when it is whole. Reading tokens needs numpy and nothing
else: neither tensorflow-datasets, grain nor beam.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, ClassVar

import chex
import numpy as np

from effjax.core.errors import DataError
from effjax.data import cache, tokenizer_copy
from effjax.data.documents import Document
from effjax.data.tokenizer_copy import KeptTokenizer

FORMAT = 1  # changes when old folders can no longer be read
SHARD_TOKENS = 1 << 27  # tokens after which a shard is closed: 256 MiB of uint16
_BATCH_DOCUMENTS = 256  # documents tokenised at a time, fewer if they are long
_BATCH_CHARACTERS = 1 << 22
_MANIFEST = 'manifest.json'
_MAPPED = '<u2', '<u4'

Progress = Callable[[str, int, int, int], None]


# ---------------------------------------------------------------------------------------- writing


class _Shard:
    """One pair of files being written, with running sizes and checksums."""

    def __init__(self, folder: pathlib.Path, name: str, dtype: str):
        self._dtype = dtype
        self._files: dict[str, IO[bytes]] = {
            part: (folder / f'{name}.{part}').open('wb') for part in ('tokens', 'documents')
        }
        self._crc = dict.fromkeys(self._files, 0)
        self.facts: dict[str, Any] = {'name': name, 'tokens': 0, 'documents': 0, 'bytes': 0}

    def add(self, tokens: list[np.ndarray], raw_bytes: list[int]) -> None:
        """Appends documents, each with its BOS."""
        lengths = np.array([len(t) for t in tokens], np.int64)
        starts = self.facts['tokens'] + np.cumsum(lengths) - lengths
        rows = np.stack([starts, np.array(raw_bytes, np.int64)], axis=1)
        self._write('tokens', np.concatenate(tokens).astype(self._dtype))
        self._write('documents', rows.astype('<i8'))
        self.facts['tokens'] += int(lengths.sum())
        self.facts['documents'] += len(tokens)
        self.facts['bytes'] += sum(raw_bytes)

    def close(self) -> dict[str, Any]:
        """Puts the files on the disk and returns the shard's entry in the manifest."""
        for part, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self.facts[f'{part}_size'] = file.tell()
            self.facts[f'{part}_crc32'] = self._crc[part]
            file.close()
        return self.facts

    def _write(self, part: str, array: np.ndarray) -> None:
        data = array.tobytes()
        self._crc[part] = zlib.crc32(data, self._crc[part])
        self._files[part].write(data)


def prepare(
    source: Any,
    kept: KeptTokenizer,
    folder: str | os.PathLike,
    *,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenises every split of a text source into a folder that must not exist yet.

    Memory is bounded by a batch of documents (4 Mi characters, or the longest document), whatever
    the size of the source.

    Args:
      source: a text source (see `effjax.data`).
      kept: the tokenizer.
      folder: where to write; its parents are made.
      progress: called with (split, documents, raw bytes, tokens) so far in the split.
      shard_tokens: tokens after which a shard is closed.

    Returns:
      The manifest.

    Raises:
      DataError: the folder exists or cannot be written, or a split is empty.
    """
    folder, tokenizer = pathlib.Path(folder), kept.tokenizer
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f'{folder} exists already; give a new folder for prepared data.')
    dtype = _MAPPED[tokenizer.vocab_size > 1 << 16]
    with _replaced(folder) as temporary:
        kept.save(temporary / 'tokenizer')
        splits = {
            split: _write_split(source, split, tokenizer, temporary, dtype, progress, shard_tokens)
            for split in source.splits
        }
        described = source.describe()
        manifest = {
            'format': FORMAT,
            'dtype': dtype,
            'bos_id': tokenizer.bos_id,
            'vocab_size': tokenizer.vocab_size,
            'tokenizer_digest': tokenizer.digest,
            'source': described,
            'splits': splits,
        }
        manifest['digest'] = cache.key(
            FORMAT,
            described['digest'],
            tokenizer.digest,
            [f['tokens'] for f in splits.values()],
        )
        cache.write_json(temporary / _MANIFEST, manifest)
    return manifest


@contextlib.contextmanager
def _replaced(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary folder that becomes `folder` at the end, or disappears on an error."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}.'))
        temporary.chmod(0o755)
        yield temporary
        try:
            os.replace(temporary, folder)
        except OSError:
            # Another process has written the same folder meanwhile: its content is the same.
            if not (folder / _MANIFEST).is_file():
                raise
    except OSError as e:
        raise DataError(
            f'cannot write prepared data to {folder} ({e.strerror or e}); free some space, or '
            'give a folder that can be written.'
        ) from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_split(
    source: Any,
    split: str,
    tokenizer: Any,
    folder: pathlib.Path,
    dtype: str,
    progress: Progress | None,
    shard_tokens: int,
) -> dict[str, Any]:
    """Writes the shards of a split and returns its entry in the manifest."""
    shards: list[dict[str, Any]] = []
    total = {'documents': 0, 'tokens': 0, 'bytes': 0, 'without_tokens': 0}
    shard = None
    for texts in _batches(source.documents(split)):
        tokens, raw = _encode(texts, tokenizer)
        total['without_tokens'] += len(texts) - len(tokens)
        if not tokens:
            continue
        shard = shard or _Shard(folder, f'{split}-{len(shards):05d}', dtype)
        shard.add(tokens, raw)
        total['documents'] += len(tokens)
        total['tokens'] += sum(len(t) for t in tokens)
        total['bytes'] += sum(raw)
        if progress:
            progress(split, total['documents'], total['bytes'], total['tokens'])
        if shard.facts['tokens'] >= shard_tokens:
            shards.append(shard.close())
            shard = None
    if shard:
        shards.append(shard.close())
    if not shards:
        raise DataError(
            f'split {split!r} is empty: its documents have no tokens; give it some text.'
        )
    return {**total, 'shards': shards}


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document.text)
        if len(batch) == _BATCH_DOCUMENTS or sum(map(len, batch)) >= _BATCH_CHARACTERS:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Any) -> tuple[list[np.ndarray], list[int]]:
    """Returns the tokens, BOS first, and the raw bytes of the texts that have any token."""
    tokens, raw = [], []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if len(ids):
            bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            array = np.concatenate([np.array(bos, np.int64), ids])
            if array.min() < 0 or array.max() >= tokenizer.vocab_size:
                raise DataError(
                    f'the tokenizer gave id {array.max()} but has a vocabulary of '
                    f'{tokenizer.vocab_size}; its files do not belong together.'
                )
            tokens.append(array)
            raw.append(len(text.encode()))
    return tokens, raw


# ---------------------------------------------------------------------------------------- reading


class TokenStream:
    """One split: its documents end to end, each preceded by BOS.

    Attributes:
      size: number of tokens, BOS included.
      starts: int64 [documents], where each document's BOS stands.
      raw_bytes: int64 [documents], bytes of the text each document was made from.
      bos: whether documents are preceded by BOS; without it `starts` are their first tokens.
    """

    def __init__(
        self,
        tokens: list[np.ndarray],
        documents: list[np.ndarray],
        *,
        bos: bool = True,
        origin: tuple[pathlib.Path, str] | None = None,
    ):
        """Joins shards without copying their tokens.

        Args:
          tokens: of each shard, integers [n].
          documents: of each shard, int64 [documents, 2]: start in the shard, raw bytes.
          bos: whether documents are preceded by BOS.
          origin: (folder, split) of mapped files, so that another process maps them too.
        """
        self.bos = bos
        self._origin = origin
        for t, d in zip(tokens, documents, strict=True):
            chex.assert_rank([t, d], [1, 2])
        self._tokens = [np.asarray(t) for t in tokens]  # slices faster than np.memmap
        sizes = np.array([len(t) for t in tokens], np.int64)
        self._base = np.cumsum(sizes) - sizes
        self.size = int(sizes.sum())
        based = zip(documents, self._base, strict=True)
        self.starts = np.concatenate([d[:, 0] + base for d, base in based])
        self.raw_bytes = np.concatenate([d[:, 1] for d in documents])

    def __reduce__(self) -> Any:
        return super().__reduce__() if self._origin is None else (_open_stream, self._origin)

    def gather(self, start: np.ndarray, length: np.ndarray, width: int) -> np.ndarray:
        """Reads slices.

        Args:
          start: int64 [n].
          length: int64 [n], at most `width`.
          width: tokens in a row of the result.

        Returns:
          int32 [n, width]: row i holds `length[i]` tokens from `start[i]`, then zeros.
        """
        out = np.zeros((len(start), width), np.int32)
        first = np.searchsorted(self._base, start, side='right') - 1
        slices = zip(first.tolist(), start.tolist(), length.tolist(), strict=True)
        for i, (shard, a, n) in enumerate(slices):
            done = 0
            while done < n:
                offset = a + done - int(self._base[shard])
                piece = self._tokens[shard][offset : offset + n - done]
                out[i, done : done + len(piece)] = piece
                done += len(piece)
                shard += 1
        return out


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared folder, open for reading.

    Attributes:
      folder: where it is.
      manifest: what `prepare` returned.
      splits: the stream of each split.
    """

    folder: pathlib.Path
    manifest: dict[str, Any]
    splits: dict[str, TokenStream]

    @property
    def digest(self) -> str:
        """Names the content: source, tokenizer and format."""
        return self.manifest['digest']

    def tokenizer(self) -> KeptTokenizer:
        """Loads the tokenizer's copy.

        Raises:
          DataError: it is damaged.
        """
        kept = tokenizer_copy.load(self.folder / 'tokenizer')
        if kept.tokenizer.digest != self.manifest['tokenizer_digest']:
            raise DataError(
                f'{self.folder / "tokenizer"} is damaged (another digest); {_again(self.folder)}'
            )
        return kept


def open_prepared(folder: str | os.PathLike, *, verify: bool = True) -> Prepared:
    """Opens a prepared folder and maps its shards.

    Args:
      folder: written by `prepare`.
      verify: read everything once and compare checksums (some 4 GB/s where the files are in
        memory); sizes are always compared.

    Raises:
      DataError: no such folder, another format, or a file that is missing, truncated or damaged.
    """
    folder = pathlib.Path(folder).expanduser()
    manifest = _read_manifest(folder)
    splits = {}
    for split, facts in manifest['splits'].items():
        pairs = [_open_shard(folder, shard, manifest['dtype'], verify) for shard in facts['shards']]
        splits[split] = TokenStream(
            [t for t, _ in pairs],
            [d for _, d in pairs],
            bos=manifest['bos_id'] is not None,
            origin=(folder, split),
        )
    return Prepared(folder, manifest, splits)


def _open_stream(folder: pathlib.Path, split: str) -> TokenStream:
    return open_prepared(folder, verify=False).splits[split]


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise DataError(
            f'{folder} holds no prepared data (no {_MANIFEST}); make it with '
            f'python -m effjax.prepare --config=... --output={folder}.'
        )
    manifest = cache.read_json(path)
    if manifest is None:
        raise DataError(f'{path} is damaged (its checksum differs); {_again(folder)}')
    if manifest['format'] != FORMAT:
        raise DataError(
            f'{folder} has format {manifest["format"]}, this version reads {FORMAT}; '
            f'{_again(folder)}'
        )
    return manifest


def _open_shard(
    folder: pathlib.Path, facts: Mapping[str, Any], dtype: str, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for part, kind in (('tokens', dtype), ('documents', '<i8')):
        path = folder / f'{facts["name"]}.{part}'
        size = path.stat().st_size if path.is_file() else -1
        if size != facts[f'{part}_size']:
            what = 'is missing' if size < 0 else f'has {size} bytes'
            raise DataError(f'{path} {what}, not {facts[f"{part}_size"]} bytes; {_again(folder)}')
        array = np.memmap(path, dtype=kind, mode='r')
        if verify and zlib.crc32(array) != facts[f'{part}_crc32']:
            raise DataError(f'{path} is damaged (its checksum differs); {_again(folder)}')
        arrays.append(array)
    return arrays[0], arrays[1].reshape(-1, 2)


def _again(folder: pathlib.Path) -> str:
    return f'delete {folder} and prepare it again.'


def cached(
    source: Any,
    kept: KeptTokenizer,
    cache_dir: pathlib.Path,
    *,
    progress: Progress | None = None,
) -> Prepared:
    """Opens the prepared data of (source, tokenizer, format) in the cache, made if need be.

    Raises:
      DataError: it cannot be written, or is there and damaged.
    """
    name = cache.key(FORMAT, source.describe()['digest'], kept.tokenizer.digest)
    folder = cache_dir / 'prepared' / name
    if not (folder / _MANIFEST).is_file():
        with _alone(folder.parent / f'{name}.lock'):
            if not (folder / _MANIFEST).is_file():
                prepare(source, kept, folder, progress=progress)
    return open_prepared(folder)


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other process of this machine holds the lock; one that dies lets go of it."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there two processes do the same work, harmlessly
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open('w')
    except OSError as e:
        raise DataError(
            f'cannot write to the cache {path.parent} ({e.strerror}); set EFFJAX_CACHE or '
            'config.data.cache to a folder that can be written.'
        ) from e
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class PreparedSource:
    """`dict(kind='prepared', path=DIR)`: what `python -m effjax.prepare` wrote.

    It has the splits and the tokenizer that it was prepared with. `documents` decodes.
    """

    modality: ClassVar[str] = 'text'
    one_document: ClassVar[bool] = False

    def __init__(self, *, path: str, verify: bool = True):
        """Opens the folder.

        Args:
          path: a prepared folder.
          verify: read everything once and compare checksums.

        Raises:
          DataError: nothing there, or damaged.
        """
        self.prepared = open_prepared(path, verify=verify)
        self.splits = tuple(self.prepared.splits)

    def documents(self, split: str) -> Iterator[Document]:
        """Streams the documents of a split, decoded (a lossy tokenizer shows)."""
        if split not in self.splits:
            raise DataError(
                f'{self.prepared.folder} has no split {split!r}; it has {", ".join(self.splits)}.'
            )
        stream, tokenizer = self.prepared.splits[split], self.prepared.tokenizer().tokenizer
        lengths = np.diff(stream.starts, append=stream.size).tolist()
        for i, (start, n) in enumerate(zip(stream.starts.tolist(), lengths, strict=True)):
            ids = stream.gather(np.array([start]), np.array([n]), n)[0, int(stream.bos) :]
            yield Document(f'{split}:{i}', tokenizer.decode(ids.tolist()), 'prepared')

    def describe(self) -> dict[str, Any]:
        """Returns what the original source said of itself."""
        return dict(self.prepared.manifest['source'])


def summary(manifest: Mapping[str, Any]) -> str:
    """Returns a manifest in a few lines for people."""
    lines = [f'digest {manifest["digest"]}, vocabulary {manifest["vocab_size"]}']
    for split, facts in manifest['splits'].items():
        per_byte = facts['bytes'] / max(1, facts['tokens'] - facts['documents'])
        lines.append(
            f'{split}: {facts["documents"]:,} documents, {facts["bytes"]:,} bytes, '
            f'{facts["tokens"]:,} tokens ({per_byte:.2f} bytes each), {len(facts["shards"])} shards'
        )
    return '\n'.join(lines)
