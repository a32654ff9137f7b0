"""Signals among processes: what one of them was asked, all of them know at the same step."""

import numpy as np

from effjax.training import signals
from effjax.training.signals import Agreement, agree


def test_one_process_agrees_with_itself():
    assert agree(True) is True and agree(False) is False
    assert Agreement()(True) is True and Agreement()(False) is False


def test_agreement_asks_now_and_then_and_remembers(monkeypatch):
    now, asked = [0.0], []

    def gather(mine):
        asked.append(now[0])
        theirs = np.array([float(now[0] >= 4.0), 0.25])  # the other process wants to stop at 4 s
        return np.stack([mine, theirs])

    monkeypatch.setattr(signals.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, 'process_allgather', gather)
    monkeypatch.setattr(signals.time, 'monotonic', lambda: now[0])
    agreement = Agreement()
    answers = []
    for _ in range(50):  # 0.1 s a call here, 0.25 s there: a question each fourth call
        now[0] += 0.1
        answers.append(agreement(False))
    assert np.allclose(np.diff(asked), 0.4)
    assert answers.index(True) == 40 and all(answers[40:])
