"""What counts as the same text: Unicode forms, case, white space; digests of documents and lines.

Bytes become text once, by `decode`; everything after that sees `str`. Two texts are exact
duplicates when their normalised forms are equal:

1. byte order marks are dropped wherever they stand, and lone surrogates become U+FFFD;
2. Unicode's canonical composition (NFC): an accent may be one character or two;
3. with `fold_case`, full case folding, and NFC again;
4. every run of white space is one space, and none stands at either end.

NFC and case folding of a character never change once Unicode has assigned it, so that a digest
stays what it is under a later Python, for text of characters that both know.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator

import numpy as np

from effjax.core.errors import ConfigError, DataError

BY = ('line', 'paragraph')
_BLOCK = 1 << 18  # characters worked on at once: bounds what is made on the way
_ASCII = re.compile(r'[\x00-\x7f]')
_SURROGATES = re.compile('[\ud800-\udfff]')
# A line ends at a line feed; a paragraph at a line of nothing but white space.
_BREAKS = {'line': re.compile(r'\n'), 'paragraph': re.compile(r'\n(?:[^\S\n]*\n)+')}


def decode(data: bytes, invalid: str = 'replace') -> str:
    """Reads UTF-8.

    Args:
      data: the document's bytes.
      invalid: 'replace' (each maximal invalid part becomes U+FFFD, as the WHATWG has it) or
        'refuse'.

    Raises:
      ConfigError: another word for `invalid`.
      DataError: invalid bytes, and they are refused.
    """
    if invalid not in ('replace', 'refuse'):
        raise ConfigError(f"invalid must be 'replace' or 'refuse', got {invalid!r}.")
    try:
        return data.decode('utf-8', 'strict' if invalid == 'refuse' else 'replace')
    except UnicodeDecodeError as e:
        raise DataError(
            f'not UTF-8 at byte {e.start} (0x{data[e.start]:02x}); convert the text, or set '
            "invalid='replace'."
        ) from None


def canonical(text: str, fold_case: bool = False) -> str:
    """Returns steps 1 to 3: all but the white space. What shingles are made from."""
    if text.isascii():
        return text.lower() if fold_case else text
    text = _composed(_SURROGATES.sub('\ufffd', text.replace('\ufeff', '')))
    # Folding can decompose what was composed.
    return _composed(text.casefold()) if fold_case else text


def normalise(text: str, fold_case: bool = False) -> str:
    """Returns the normalised form of a text; the form of a form is itself."""
    return ''.join(_collapsed(canonical(text, fold_case)))


def document_digest(text: str, fold_case: bool = False) -> bytes:
    """Returns 16 bytes of BLAKE2b over the normalised text in UTF-8.

    Equal for exact duplicates. Two among n different texts share a digest with odds of about
    n^2 / 2^129: never, for any corpus.
    """
    return measure(text, fold_case)[0]


def measure(text: str, fold_case: bool = False) -> tuple[bytes, int]:
    """Returns the document's digest, and the bytes of its normalised form."""
    hashed, size = hashlib.blake2b(digest_size=16), 0
    for part in _collapsed(canonical(text, fold_case)):
        data = part.encode()
        hashed.update(data)
        size += len(data)
    return hashed.digest(), size


def pieces(text: str, by: str = 'paragraph') -> np.ndarray:
    """Finds the lines or paragraphs of a text that hold more than white space.

    Returns:
      int64 [N, 2]: where each starts and ends in `text`, in characters, line breaks left out.

    Raises:
      ConfigError: `by` is not one of `BY`.
    """
    if by not in BY:
        raise ConfigError(f'pieces are by {" or ".join(BY)}, got {by!r}.')
    spans, start = [], 0
    for found in _BREAKS[by].finditer(text):
        spans.append((start, found.start()))
        start = found.end()
    spans.append((start, len(text)))
    kept = [(a, b) for a, b in spans if a < b and not text[a:b].isspace()]
    return np.array(kept, np.int64).reshape(-1, 2)


def piece_digests(
    text: str, by: str = 'paragraph', fold_case: bool = False
) -> tuple[np.ndarray, list[bytes]]:
    """Returns the spans of `pieces`, and the `document_digest` of each: equal for equal pieces."""
    spans = pieces(text, by)
    return spans, [document_digest(text[a:b], fold_case) for a, b in spans.tolist()]


def _composed(text: str) -> str:
    """Returns the NFC of a text, made block by block where it is not its own already.

    `unicodedata.normalize` takes dozens of bytes a character while it works.
    """
    if unicodedata.is_normalized('NFC', text):
        return text
    out, at = [], 0
    while at < len(text):
        # ASCII never composes with what stands before it: a place to cut.
        found = _ASCII.search(text, at + _BLOCK)
        end = found.start() if found else len(text)
        out.append(unicodedata.normalize('NFC', text[at:end]))
        at = end
    return ''.join(out)


def _collapsed(text: str) -> Iterator[str]:
    """Yields the text in parts, with its white space collapsed: never all words as a list."""
    written = gap = False  # anything yet; and white space since
    for at in range(0, len(text), _BLOCK):
        block = text[at : at + _BLOCK]
        words = block.split()
        if not words:
            gap = True
            continue
        lead = written and (gap or block[0].isspace())
        yield (' ' if lead else '') + ' '.join(words)
        written, gap = True, block[-1].isspace()
