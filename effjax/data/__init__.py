"""Data: sources, tokenizers, packing, and the resumable loader.

A *source* is a class whose keyword-only arguments are its config, and which owns its held-out
split. A text source (`modality == 'text'`) streams `Document`s:

    splits          ('train', 'valid'), or ('train',) where nothing is held out
    one_document    True when the source is one long document, split by position
    documents(split) -> Iterator[Document], lazily, always in the same order
    describe() -> dict: counts, bytes, skipped files, `digest` of both splits' content

An image source (`modality == 'image'`) is indexed:

    splits, image_shape (H, W, C), classes, class_names
    examples(split) -> Examples: `len`, and
        `[indices] -> dict(image=uint8 [N, H, W, C], label=int32 [N])`
    arrays(split) -> (images, labels), everything at once
    describe() -> dict

A source of synthetic rows (`modality == 'rows'`) is indexed too:

    splits, seq_len T, queries Q (labelled positions in a row), vocab_size
    examples(split) -> Examples: `len`, and
        `[indices] -> dict(tokens=int32 [N, T], at=int32 [N, Q], labels=int32 [N, Q])`
    describe() -> dict

`build(config)` turns `config.data` into a `Dataset`, and `Loader` feeds training from it.
Importing this package imports neither tensorflow-datasets, grain, tokenizers nor pyarrow.
"""

import importlib
from typing import Any

from effjax.data.documents import Document

SOURCES = {
    'digits': 'effjax.data.sources.digits:Digits',
    'induction': 'effjax.data.sources.induction:Induction',
    'idx': 'effjax.data.sources.idx:Idx',
    'images': 'effjax.data.sources.folder:ImageFolder',
    'jsonl': 'effjax.data.sources.jsonl:Jsonl',
    'listops': 'effjax.data.sources.listops:ListOps',
    'mixture': 'effjax.data.mixture:Mixture',
    'mqar': 'effjax.data.sources.mqar:Mqar',
    'none': 'effjax.data.sources.none:no_data',
    'parquet': 'effjax.data.sources.parquet:Parquet',
    'prepared': 'effjax.data.shards:PreparedSource',
    'selective_copy': 'effjax.data.sources.selective_copy:SelectiveCopy',
    'stdlib': 'effjax.data.sources.stdlib:Stdlib',
    'text': 'effjax.data.sources.text:TextFiles',
    'tfds': 'effjax.data.sources.tfds:open_tfds',
}

_LAZY = {
    'DataInfo': 'effjax.data.dataset',
    'Dataset': 'effjax.data.dataset',
    'build': 'effjax.data.dataset',
    'Loader': 'effjax.data.loader',
    'TOKENIZERS': 'effjax.data.tokenizers',
}

__all__ = ['SOURCES', 'TOKENIZERS', 'DataInfo', 'Dataset', 'Document', 'Loader', 'build']


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
