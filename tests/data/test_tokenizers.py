"""Tokenizers: exact round trips, merges worked by hand, the cache, and bad input."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import tokenizers as library

from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import lookup, parameters
from effjax.data import tokenizers
from effjax.data.tokenizers.base import Training
from effjax.data.tokenizers.bpe import byte_symbols

# 20 words, each a document of its own, so that no space belongs to a word.
WORDS = [*['low'] * 4, *['slow'] * 2, *['newest'] * 8, 'stow', *['net'] * 5]
# Worked by hand. Counts: n-e 13, s-t 9, then e-w, w-e and e-st with 8 each: of equals, the pair
# whose left symbol has the smaller id (bytes come before merges) goes first. Then o-w 7, l-ow 6,
# ne-t 5, s-low 2; st-ow is seen once only.
MERGES = [
    ('n', 'e'), ('s', 't'), ('e', 'st'), ('w', 'est'), ('ne', 'west'),
    ('o', 'w'), ('l', 'ow'), ('ne', 't'), ('s', 'low'),
]  # fmt: skip


def build(kind, texts=WORDS, **arguments):
    return tokenizers.build({'kind': kind, **arguments}, lambda: iter(texts))


def random_texts(n, seed=0):
    """Texts of random code points from all planes, with runs of spaces and line ends."""
    rng = random.Random(seed)
    ranges = [(32, 127), (9, 14), (0x80, 0x800), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD7FF)]
    out = []
    for _ in range(n):
        parts = (
            chr(rng.randint(*rng.choice(ranges))) * rng.choice((1, 1, 1, 3)) for _ in range(40)
        )
        out.append(''.join(parts))
    return out


@pytest.fixture(scope='module')
def code_text():
    from effjax.data.sources.stdlib import Stdlib

    documents = Stdlib().documents('valid')
    return [document.text for document, _ in zip(documents, range(12), strict=False)]


@pytest.fixture(scope='module')
def bpe(code_text):
    return build('bpe', code_text, vocab_size=600)


def test_bpe_learns_the_merges_worked_by_hand():
    tokenizer = build('bpe', vocab_size=256 + len(MERGES) + 1)
    assert tokenizer.merges == MERGES
    assert tokenizer.bos_id == tokenizer.vocab_size - 1 == 265
    ids = tokenizer.encode('newest slow')
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == ['newest', ' ', 'slow']


def reference_merges(texts, n):
    """The definition: count all adjacent pairs, merge the most frequent, start again."""
    symbols = byte_symbols()
    order = {symbol: i for i, symbol in enumerate(sorted(symbols))}
    words = Counter(tuple(symbols[b] for b in text.encode()) for text in texts)
    merges = []
    for _ in range(n):
        counts = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += times
        pair = min(counts, key=lambda p: (-counts[p], order[p[0]], order[p[1]]))
        merges.append(pair)
        order.setdefault(''.join(pair), len(order))
        words = Counter({tuple(replay(list(w), [pair])): times for w, times in words.items()})
    return merges


def replay(word, merges):
    """Encoding by its definition: each merge in its order, from left to right."""
    for left, right in merges:
        i = 0
        while i + 1 < len(word):
            if word[i] == left and word[i + 1] == right:
                word[i : i + 2] = [left + right]
            i += 1
    return word


def test_bpe_equals_the_definition_on_random_words():
    rng = random.Random(1)
    texts = [''.join(rng.choices('abcdefgh', k=rng.randint(2, 9))) for _ in range(400)]
    # Runs of one letter are counted in more than one way; they are left out.
    texts = [t for t in texts if all(a != b for a, b in itertools.pairwise(t))]
    tokenizer = build('bpe', texts, vocab_size=256 + 25 + 1)
    assert tokenizer.merges == reference_merges(texts, 25)
    for text in texts[:100]:
        expected = replay(list(text), tokenizer.merges)
        assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == expected


def test_bpe_does_not_depend_on_the_run(code_text):
    one = build('bpe', code_text, vocab_size=400)
    two = build('bpe', code_text, vocab_size=400)
    assert one.digest == two.digest
    assert one.digest != build('bpe', code_text, vocab_size=401).digest


def gpt2(shared_data):
    return build('gpt2', path=str(shared_data / 'tokenizers' / 'gpt2'))


@pytest.mark.parametrize('kind', ['byte', 'bpe', 'gpt2'])
def test_byte_level_round_trip_is_exact(kind, bpe, request):
    if kind == 'gpt2':
        tokenizer = gpt2(request.getfixturevalue('shared_data'))
    else:
        tokenizer = bpe if kind == 'bpe' else build('byte')
    texts = [*random_texts(200), '', ' ', '\r\n\t', '<|endoftext|>', "it's 12  days"]
    ids = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(i) for i in ids] == texts
    assert all(i.dtype == tokenizer.dtype and i.ndim == 1 for i in ids)
    used = np.concatenate(ids)
    assert used.max() < tokenizer.vocab_size
    assert tokenizer.bos_id not in used  # its name inside a text is text
    assert tokenizer.decode([tokenizer.bos_id, *ids[0], tokenizer.bos_id]) == texts[0]
    for seed in range(20):
        data = random.Random(seed).randbytes(300)
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_gpt2_is_openais(shared_data):
    tokenizer = gpt2(shared_data)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (50257, 50256)
    assert tokenizer.encode('Hello world').tolist() == [15496, 995]
    text = (shared_data / 'tinyshakespeare' / 'input.txt').read_text()
    cut = int(len(text) * 0.9)
    # The counts that nanoGPT's data/shakespeare states.
    assert [len(tokenizer.encode(t)) for t in (text[:cut], text[cut:])] == [301_966, 36_059]


def test_char_vocabulary_is_the_text(shared_data):
    text = (shared_data / 'tinyshakespeare' / 'input.txt').read_text()
    tokenizer = build('char', [text])
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (65, None)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert ''.join(sorted(set(text))) == tokenizer.characters


def test_char_separates_documents_and_knows_what_it_does_not_know():
    tokenizer = build('char', ['abé', 'c\U0001f600'])
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (6, 5)
    assert tokenizer.decode([5, *tokenizer.encode('\U0001f600éa')]) == '\U0001f600éa'
    with pytest.raises(DataError, match=r"character 'x' is not .* tokenizer.unknown=True"):
        tokenizer.encode('axb')
    tokenizer = build('char', ['ab', 'c'], unknown=True)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (5, 4)
    assert tokenizer.encode('axb').tolist() == [0, 3, 1]
    assert tokenizer.decode([0, 3]) == 'a\ufffd'


def test_dtype_follows_the_vocabulary():
    tokenizer = build('byte')
    tokenizer.vocab_size = 2**16
    assert tokenizer.dtype == np.uint16
    tokenizer.vocab_size = 2**16 + 1
    assert tokenizer.dtype == np.uint32


@pytest.mark.parametrize(
    'block',
    [
        {'kind': 'bpe', 'vocab_size': 260},
        {'kind': 'char'},
        {'kind': 'wordpiece', 'vocab_size': 28},
    ],
)
def test_trained_tokenizers_are_cached_by_digest(block, tmp_path):
    reads = []

    def documents():
        reads.append(1)
        return iter(WORDS)

    def get(digest):
        return tokenizers.build(block, documents, tmp_path, digest)

    first = get('digest-1')
    files = list((tmp_path / 'tokenizers').iterdir())
    assert (len(files), len(reads)) == (1, 1)
    assert get('digest-1').digest == first.digest
    assert len(reads) == 1
    files[0].write_bytes(files[0].read_bytes()[:-30])  # a truncated file is noticed
    again = get('digest-1')
    assert len(reads) == 2
    assert again.digest == first.digest
    assert (again.encode('lowest') == first.encode('lowest')).all()
    get('digest-2')
    assert len(reads) == 3


def test_sample_does_not_depend_on_order():
    texts = [f'{i} ' * (1 + i % 50) for i in range(300)]
    samples = []
    for seed in range(4):
        random.Random(seed).shuffle(texts)
        samples.append(Training(lambda: iter(list(texts))).sample(5000))
    assert all(s == samples[0] for s in samples)
    assert 3000 < sum(len(t.encode()) for t in samples[0]) <= 5000
    assert Training(lambda: iter(['é' * 10])).sample(5) == ['éé']


# Bad input.


def test_vocabulary_errors():
    with pytest.raises(ConfigError, match=r'at least 257 .256 bytes and a separator., got 256'):
        build('bpe', vocab_size=256)
    with pytest.raises(ConfigError, match=r'more than ids allow'):
        build('bpe', vocab_size=2**40)
    with pytest.raises(DataError, match=r'only 266 BPE entries, not 4096; .*at most 266'):
        build('bpe', vocab_size=4096)
    with pytest.raises(DataError, match=r'no text to train the tokenizer on'):
        build('bpe', [''], vocab_size=300)
    with pytest.raises(DataError, match=r'no text to take characters from'):
        build('char', [])


def test_config_errors():
    with pytest.raises(ConfigError, match=r"unknown tokenizer 'bep'.*mean 'bpe'"):
        build('bep')
    with pytest.raises(ConfigError, match=r"takes no 'vocab_sise'.*mean 'vocab_size'"):
        build('bpe', vocab_sise=3)
    with pytest.raises(ConfigError, match=r'config.data.tokenizer.vocab_size: expected int'):
        tokenizers.check({'kind': 'bpe', 'vocab_size': '4k'})
    for kind in tokenizers.TOKENIZERS:
        component = lookup(tokenizers.TOKENIZERS, kind, 'tokenizer')
        assert component.kind == kind
        assert all(p.annotation is not p.empty for p in parameters(component).values())


def test_gpt2_file_errors(tmp_path, bpe):
    with pytest.raises(DataError, match=r'no tokenizer file'):
        build('gpt2', path=str(tmp_path))
    (tmp_path / 'encoder.json').write_text('{"a":')
    (tmp_path / 'vocab.bpe').write_text('#version: 0.2\na b\n')
    with pytest.raises(DataError, match=r'encoder.json is not JSON'):
        build('gpt2', path=str(tmp_path))
    (tmp_path / 'encoder.json').write_text('{"a": 0, "<|endoftext|>": 1}')
    with pytest.raises(DataError, match=r'do not fit each other'):
        build('gpt2', path=str(tmp_path))


@pytest.fixture
def tokenizer_json(tmp_path):
    model = library.models.BPE(vocab={'a': 0, 'b': 1, 'ab': 2, '<s>': 3}, merges=[('a', 'b')])
    saved = library.Tokenizer(model)
    saved.add_special_tokens(['<s>', '<sep>'])
    saved.enable_truncation(2)
    saved.decoder = library.decoders.Fuse()
    saved.save(str(tmp_path / 'tokenizer.json'))
    return tmp_path


def test_tokenizer_file(tokenizer_json):
    tokenizer = build('file', path=str(tokenizer_json))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (5, 3)
    assert tokenizer.encode('abbab').tolist() == [2, 1, 2]  # not truncated, nothing added
    assert tokenizer.decode([3, 2, 1]) == 'abb'
    assert 3 not in tokenizer.encode('a<s>b')  # a special token's name inside a text is text
    assert build('file', path=str(tokenizer_json), bos='<sep>').bos_id == 4
    with pytest.raises(ConfigError, match=r"has no token '<sepp>'.*mean '<sep>'"):
        build('file', path=str(tokenizer_json / 'tokenizer.json'), bos='<sepp>')


def test_tokenizer_file_without_a_separator_gets_one(tokenizer_json):
    file = tokenizer_json / 'tokenizer.json'
    saved = json.loads(file.read_text())
    saved['added_tokens'] = []
    del saved['model']['vocab']['<s>']
    file.write_text(json.dumps(saved))
    tokenizer = build('file', path=str(file))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (4, 3)
    assert tokenizer.decode([3, 2]) == 'ab'


def test_tokenizer_file_errors(tmp_path):
    with pytest.raises(DataError, match=r'no tokenizer file'):
        build('file', path=str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(DataError, match=r'tokenizer.json is not a tokenizer.json'):
        build('file', path=str(tmp_path))
    (tmp_path / 'tokenizer.json').write_bytes(b'\xff\xfe')
    with pytest.raises(DataError, match=r'is not UTF-8 text'):
        build('file', path=str(tmp_path))
