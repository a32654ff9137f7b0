"""The whole search in memory: the same answer for any order and division, and its rules."""

import random

import numpy as np
import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data.dedup import Settings, candidates, clusters, near, near_duplicates, verify
from effjax.data.dedup.near import prepare, resolve
from effjax.data.documents import Document


def document(name: str, text: str, source: str = 'a') -> Document:
    return Document(name, text, source)


def prose(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f'w{draw.randrange(3000)}' for _ in range(count)]


@pytest.fixture(scope='module')
def corpus(edit) -> list[Document]:
    """Originals, copies, chains of edits, empties, all in two sources."""
    draw = random.Random(1)
    out = [document(f'empty{i}', ' ' * i) for i in range(3)] + [document('dots', '...')]
    for i in range(40):
        words = prose(draw.randint(3, 300), i)
        for version in range(draw.randint(1, 5)):
            name = f'{draw.getrandbits(32):08x}-{i}-{version}'
            joint = draw.choice([' ', '  ', '\n'])
            out.append(document(name, joint.join(words), draw.choice('ab')))
            # Each is an edit of the one before: a chain, whose ends resemble each other less.
            words = edit(words, draw.choice([1.0, 0.9, 0.8, 0.7]), draw)
    return out


SETTINGS = [
    Settings(),
    Settings(threshold=0.5, sources=('b',), prefer='shortest'),
    Settings(threshold=0.3, centres=1, bands=64, rows=1, permutations=64),
    Settings(threshold=0.6, centres=2, bands=32, rows=2, kind='chars', n=9, fold_case=True),
]


@pytest.mark.parametrize('settings', SETTINGS)
def test_the_same_for_any_order_and_any_division(corpus, settings):
    expected = near_duplicates(corpus, settings)
    assert expected.counts['near'] > 0 and expected.counts['exact'] > 0
    draw = random.Random(2)
    for trial in range(6):
        shuffled = draw.sample(corpus, len(corpus))
        assert near_duplicates(shuffled, settings) == expected
        parts: list[list[Document]] = [[] for _ in range(draw.randint(1, 9))]
        for one in shuffled:
            draw.choice(parts[trial % 2 :] or parts).append(one)  # some parts are empty
        made = [prepare(part, settings) for part in parts]
        assert resolve(made, settings) == expected
        assert resolve(made[::-1], settings) == expected


@pytest.mark.parametrize('batch', [0, 1, 5000])
def test_batches_do_not_show(corpus, batch, monkeypatch):
    expected = near_duplicates(corpus, Settings())
    monkeypatch.setattr(near, 'BATCH', batch)
    assert near_duplicates(iter(corpus), Settings()) == expected


def slow_clusters(documents: list[Document], settings: Settings) -> set[frozenset[str]]:
    """All pairs that share a band and reach the threshold, then components; by text."""
    texts = sorted(prepare(documents, settings).texts.items())
    found = [(i, j) for j in range(len(texts)) for i in range(j)]
    kept = [
        (i, j)
        for i, j in found
        if texts[i][1].shingles.size
        and (texts[i][1].keys == texts[j][1].keys).any()
        and verify.jaccard(texts[i][1].shingles, texts[j][1].shingles) >= settings.threshold
    ]
    roots = clusters.components(len(texts), np.array(kept, np.int64).reshape(-1, 2))
    number = {digest: i for i, (digest, _) in enumerate(texts)}
    groups: dict[int, set[str]] = {}
    for e in prepare(documents, settings).entries:
        groups.setdefault(int(roots[number[e.digest]]), set()).add(e.id)
    return {frozenset(g) for g in groups.values()}


@pytest.mark.parametrize('threshold', [0.3, 0.6, 0.8])
def test_clusters_are_the_components_of_all_similar_pairs(corpus, threshold):
    """The guarantee, where no bucket is larger than the centres can cover."""
    settings = Settings(threshold=threshold)
    result = near_duplicates(corpus, settings)
    assert result.counts['large_buckets'] == 0
    groups: dict[str, set[str]] = {}
    for d in result.decisions:
        groups.setdefault(d.cluster, set()).add(d.id)
    assert {frozenset(g) for g in groups.values()} == slow_clusters(corpus, settings)


@pytest.mark.parametrize('centres', [1, 3])
def test_large_buckets_join_only_what_is_similar(corpus, centres):
    """With few centres clusters may be finer, never coarser, and the answer says how many."""
    settings = Settings(threshold=0.3, bands=64, rows=1, permutations=64, centres=centres)
    result = near_duplicates(corpus, settings)
    assert result.counts['large_buckets'] > 0
    coarse = slow_clusters(corpus, settings)
    groups: dict[str, set[str]] = {}
    for d in result.decisions:
        groups.setdefault(d.cluster, set()).add(d.id)
    assert all(any(g <= c for c in coarse) for g in groups.values())


def test_decisions_are_about_keepers_that_are_kept(corpus):
    result = near_duplicates(corpus, Settings(threshold=0.6))
    by_id = {d.id: d for d in result.decisions}
    assert list(by_id) == sorted(d.id for d in corpus)
    for d in result.decisions:
        keeper = by_id[d.keeper]
        assert keeper.why == 'kept' and keeper.cluster == d.cluster
        assert (d.why == 'kept') == (d.id == d.keeper)
        assert d.jaccard == 1.0 if d.why != 'near' else 0 < d.jaccard <= 1
    assert len(result.kept) == result.counts['clusters'] == len({d.cluster for d in by_id.values()})
    total = sum(result.counts[w] for w in ('kept', 'exact', 'near'))
    assert total == result.counts['documents'] == len(corpus)


def test_what_is_kept_stays_kept():
    """Deduplicating the result removes nothing, where clusters hold no chains."""
    documents = [document(f'{i}-{k}', ' '.join(prose(80, i))) for i in range(20) for k in range(3)]
    result = near_duplicates(documents, Settings())
    kept = [d for d in documents if d.id in set(result.kept)]
    assert len(kept) == 20
    assert near_duplicates(kept, Settings()).kept == result.kept


def test_the_keep_rule():
    words = prose(100, 5)
    short, long = ' '.join(words[:95]), ' '.join(words)
    documents = [
        document('d', short, 'trusted'),
        document('c', long, 'web'),
        document('b', long + '\n', 'web'),
        document('a', short, 'web'),
    ]

    def decided(**changes) -> dict[str, tuple[str, str]]:
        result = near_duplicates(documents, Settings(**changes))
        return {d.id: (d.keeper, d.why) for d in result.decisions}

    # The longest; of two equal texts the smallest id.
    assert decided() == {
        'a': ('b', 'near'),
        'b': ('b', 'kept'),
        'c': ('b', 'exact'),
        'd': ('b', 'near'),
    }
    assert decided(prefer='shortest')['d'] == ('a', 'exact')
    # A trusted source comes before length.
    assert decided(sources=('trusted',))['a'] == ('d', 'exact')
    assert decided(sources=('trusted',))['b'] == ('d', 'near')
    assert decided(sources=('web', 'trusted'))['d'] == ('b', 'near')


def test_documents_without_words_have_exact_duplicates_only():
    documents = [document(n, t) for n, t in (('a', ''), ('b', ' \n'), ('c', '...'), ('d', '?!'))]
    result = near_duplicates(documents, Settings(threshold=0.1))
    assert [d.why for d in result.decisions] == ['kept', 'exact', 'kept', 'kept']
    assert result.counts['without_words'] == 3
    assert near_duplicates([], Settings()).decisions == []
    assert near_duplicates([document('a', '')], Settings()).kept == ['a']


def test_clusters_are_named_by_content():
    """The name stays when ids, order and unrelated documents change."""
    words = prose(100, 6)
    pair = [document('x', ' '.join(words)), document('y', ' '.join(words[:95]))]
    name = near_duplicates(pair, Settings()).decisions[0].cluster
    renamed = [document('q', pair[1].text), document('p', pair[0].text), document('z', 'new')]
    again = near_duplicates(renamed, Settings())
    assert {d.cluster for d in again.decisions if d.id in 'pq'} == {name}
    assert len(bytes.fromhex(name)) == 16


def test_punctuation_alone_makes_a_near_duplicate_of_similarity_one():
    documents = [
        document('a', 'one two, three four five six'),
        document('b', 'one two three four five six.'),
    ]
    result = near_duplicates(documents, Settings())
    assert [(d.why, d.jaccard) for d in result.decisions] == [('kept', 1.0), ('near', 1.0)]


def test_a_pair_is_verified_once(corpus, monkeypatch):
    seen: list[tuple[int, int]] = []
    similar = verify.similar

    def spy(sets, pairs, threshold):
        seen.extend(map(tuple, pairs.tolist()))
        return similar(sets, pairs, threshold)

    monkeypatch.setattr(verify, 'similar', spy)
    settings = Settings(threshold=0.3, bands=64, rows=1, permutations=64)
    result = near_duplicates(corpus, settings)
    assert len(seen) == len(set(seen)) == result.counts['verified']
    texts = sorted(prepare(corpus, settings).texts.items())
    wordy = [i for i, (_, t) in enumerate(texts) if t.shingles.size]
    keys = np.concatenate([texts[i][1].keys for i in wordy])
    everything = candidates.pairs(keys, np.repeat(wordy, 64), 64)
    assert set(seen) < {tuple(p) for p in everything.tolist()}


def test_hundreds_of_variants_of_one_text_are_cheap(edit):
    """Of 45 thousand pairs, most are connected by the time they come up."""
    words = prose(60, 8)
    draw = random.Random(0)
    documents = [document(f'{i:03d}', ' '.join(edit(words, 0.85, draw))) for i in range(300)]
    result = near_duplicates(documents, Settings(threshold=0.6))
    assert result.counts['clusters'] == 1
    assert result.counts['verified'] < 4_000


def test_ids_must_differ():
    documents = [document('a', 'x'), document('b', 'y')]
    with pytest.raises(DataError) as e:
        resolve([prepare(documents, Settings()), prepare(documents[:1], Settings())], Settings())
    assert str(e.value) == (
        "two documents have the id 'a'; ids name what is removed and must differ."
    )


def test_parts_of_other_settings_are_not_mixed():
    parts = [prepare([document('a', 'x')], Settings()), prepare([], Settings(seed=1))]
    with pytest.raises(DataError) as e:
        resolve(parts, Settings())
    assert str(e.value) == (
        'a part was prepared with seed=1, not 0; prepare it again with these settings.'
    )


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'threshold': 0}, 'threshold must be above 0 and at most 1, got 0.'),
        ({'threshold': 1.1}, 'threshold must be above 0 and at most 1, got 1.1.'),
        ({'n': 0}, 'n, the words of a shingle, must be at least 1, got 0.'),
        ({'kind': 'bytes'}, "kind must be 'words' or 'chars', got 'bytes'."),
        ({'prefer': 'newest'}, "prefer must be 'longest' or 'shortest', got 'newest'."),
        ({'centres': 0}, 'centres must be at least 1, got 0.'),
        ({'permutations': 0}, 'permutations must be at least 1, got 0.'),
        ({'recall': 1.0}, 'recall must be above 0 and below 1, got 1.0.'),
        ({'sources': ('a', 'b', 'a')}, 'sources names one twice: a, b, a.'),
        (
            {'bands': 9},
            'bands and rows are given together, or both 0 to be chosen; got 9 and 0.',
        ),
        (
            {'bands': 20, 'rows': 7},
            '20 bands of 7 rows need 140 permutations, and there are 128; raise permutations, or '
            'lower bands or rows.',
        ),
        (
            {'permutations': 1, 'threshold': 0.5},
            'no bands of 1 permutations find a pair at Jaccard 0.5 with probability 0.98; raise '
            'permutations or threshold, or lower recall.',
        ),
    ],
)
def test_bad_settings_say_so(changes, sentence):
    with pytest.raises(ConfigError) as e:
        Settings(**changes)
    assert str(e.value) == sentence


def test_settings_choose_bands_and_rows():
    assert Settings().cut == (18, 7)
    assert Settings(bands=16, rows=8).cut == (16, 8)
    assert near.Settings(threshold=0.5).cut[1] < 7
