"""What experiments leave for the cards: written, read, put on the card, refused."""

import json

import pytest

from effjax.core.errors import StudyError
from effjax.study import card, facts
from effjax.study.crossover import Point
from experiments.crossover import run as crossover
from experiments.induction import run as induction

METHODS = card.catalogue()


def test_facts_come_to_the_card(tmp_path):
    folder = tmp_path / 'experiments' / 'recall'
    facts.write(folder / 'results', 'Recall', 'NVIDIA H200', '2026-11-30', {'h3': 'accuracy 0.9'})
    found = facts.stored(tmp_path, METHODS)
    line = '- [Recall](../../experiments/recall/README.md), NVIDIA H200, 2026-11-30: accuracy 0.9.'
    assert found == {'h3': [line]}
    text = card.render('h3', {}, methods=METHODS, facts=found['h3'])
    assert f'\nAlso measured:\n\n{line}\n' in text
    # Made anew from itself it is the same, and a fact that is gone leaves nothing.
    assert card.render('h3', {}, text, METHODS, found['h3']) == text
    assert 'Also measured' not in card.render('h3', {}, text, METHODS)


def test_what_is_no_fact_is_said(tmp_path):
    file = tmp_path / 'experiments' / 'recall' / 'results' / 'facts.json'
    file.parent.mkdir(parents=True)
    for text in ('{', '[]', '{"what": "x"}'):
        file.write_text(text)
        with pytest.raises(StudyError, match=r'facts\.json holds no facts \(.*run its experiment'):
            facts.stored(tmp_path, METHODS)
    facts.write(file.parent, 'Recall', 'cpu', '2026-11-30', {'h33': 'x'})
    with pytest.raises(StudyError, match="no method 'h33'. Did you mean 'h3'"):
        facts.stored(tmp_path, METHODS)


def test_experiments_name_methods_of_the_catalogue():
    from experiments.recall.page import METHODS as recall

    for named in (recall, crossover.METHODS, induction.METHODS):
        assert set(named.values()) <= set(METHODS)


def test_a_crossover_says_where_each_begins_to_win(tmp_path):
    points = [
        Point(mixer, length, 1, seconds=seconds, ran='linear_recurrence=xla')
        for mixer, times in {'attention': (1.0, 4.0), 'retnet(heads=8)': (2.0, 2.0)}.items()
        for length, seconds in zip((1024, 2048), times, strict=True)
    ]
    saved = {'conditions': {'width': 64, 'device': 'cpu'}, 'points': [vars(p) for p in points]}
    crossover.write_facts(tmp_path, saved, '2026-11-30')
    lines = json.loads((tmp_path / 'facts.json').read_text())['lines']
    assert lines == {
        'retnet': '`retnet(heads=8)` takes less time than attention from about 1,448 tokens on '
        '(between 1,024 and 2,048) (linear_recurrence=xla)'
    }


def test_induction_keeps_the_newest_of_a_mixer_and_rate(tmp_path):
    def row(rate, at_512, date='2026-11-30'):
        tested = {'64': 1.0, '256': 1.0, '512': at_512}
        return {'mixer': 'h3', 'rate': rate, 'tested': tested, 'device': 'cpu', 'date': date}

    induction.publish([row(2e-4, 0.1), row(1e-3, 0.2)], tmp_path)
    induction.publish([row(2e-4, 0.3, '2026-12-01')], tmp_path)
    kept = json.loads((tmp_path / 'results.json').read_text())
    assert [(r['rate'], r['tested']['512']) for r in kept] == [(2e-4, 0.3), (1e-3, 0.2)]
    found = json.loads((tmp_path / 'facts.json').read_text())
    assert found['lines'] == {'h3': 'accuracy by length of the row: 1.00 at 256, 0.30 at 512'}
    assert found['date'] == '2026-12-01'
