"""The ledger: exact sums, exact saving, what counts towards a budget and what does not."""

import json

from effjax.core.cost import Cost
from effjax.costs import Ledger, StepCost

# GPT-3's size: one step is beyond 2^53, where floats stop being exact.
COSTS = {
    'attention': Cost(matmul=2.0**40 * 3, scan=5.0),
    'ffn': Cost(matmul=2.0**55),
    'hyena': Cost(fft=0.4),
}
STEP = StepCost.train(
    COSTS, hardware_flops=2.0**57 + 2**10, optimizer_flops=12.0, examples=4, tokens=100,
    tokens_computed=128,
)  # fmt: skip
MODEL = 3 * (3 * 2**40 + 5) + 3 * 2**55 + 1  # 3 x 0.4 rounds to 1


def stepped(n=3, ledger=None, stage=''):
    ledger = ledger or Ledger()
    for _ in range(n):
        ledger.add_step(STEP, stage=stage)
    return ledger


def test_a_training_step_is_three_forward_passes():
    assert STEP.model_flops == MODEL
    forward = StepCost.forward(COSTS, tokens=7)
    assert forward.model_flops == 3 * 2**40 + 5 + 2**55
    assert forward.tokens == 7
    assert forward.hardware_flops is None


def test_totals():
    totals = stepped().totals()
    assert totals['model_flops'] == 3 * MODEL
    assert totals['parts'] == {'attention': 9 * (3 * 2**40 + 5), 'ffn': 9 * 2**55, 'hyena': 3}
    assert sum(totals['parts'].values()) == totals['model_flops']
    assert totals['hardware_flops'] == 3 * (2**57 + 2**10)
    assert totals['optimizer_flops'] == 36
    assert (totals['steps'], totals['examples']) == (3, 12)
    assert (totals['tokens'], totals['tokens_computed']) == (300, 384)


def test_restored_ledger_goes_on_with_the_same_numbers():
    whole = stepped(7, stepped(4, stage='short'), stage='long')
    first = stepped(2, stepped(4, stage='short'), stage='long')
    first = Ledger.from_dict(json.loads(json.dumps(first.to_dict())))
    again = stepped(5, first, stage='long')
    assert again.to_dict() == whole.to_dict()
    assert again.totals() == whole.totals()
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())


def test_saved_dict_is_a_copy():
    ledger = stepped(1)
    saved = ledger.to_dict()
    stepped(1, ledger)
    other = Ledger.from_dict(saved)
    stepped(1, other)
    assert (saved['stages']['']['steps'], ledger.steps, other.steps) == (1, 2, 2)


def test_stages_stand_apart_and_add_up():
    ledger = stepped(5, stepped(2, stage='short'), stage='long')
    stages = ledger.totals()['stages']
    assert list(stages) == ['short', 'long']
    assert [s['steps'] for s in stages.values()] == [2, 5]
    assert sum(s['model_flops'] for s in stages.values()) == ledger.model_flops == 7 * MODEL


def test_forward_passes_are_charged_once_and_evaluation_is_not():
    ledger = stepped(1)
    forward = StepCost.forward(COSTS, tokens=100, examples=4, hardware_flops=1000.0)
    ledger.add_forward(forward, purpose='teacher')
    ledger.add_forward(forward, purpose='teacher')
    ledger.add_forward(forward, purpose='eval')
    extra = 2 * (3 * 2**40 + 5 + 2**55)
    assert ledger.model_flops == MODEL + extra
    assert ledger.tokens == 100  # nothing was trained on the teacher's tokens
    totals = ledger.totals()
    assert totals['forward'] == {'teacher': extra}
    assert totals['eval']['passes'] == 1
    assert totals['eval']['model_flops'] == extra // 2
    assert totals['hardware_flops'] == 2**57 + 2**10 + 2000


def test_unknown_hardware_flops_are_never_a_sum_too_small():
    ledger = stepped(1, stage='known')
    ledger.add_step(StepCost.train(COSTS), stage='unknown')
    stepped(1, ledger, stage='unknown')
    totals = ledger.totals()
    assert ledger.hardware_flops is None
    assert totals['stages']['known']['hardware_flops'] == 2**57 + 2**10
    assert totals['stages']['unknown']['hardware_flops'] is None
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))).hardware_flops is None


def test_waste_is_no_progress():
    ledger = stepped(4)
    last = {
        'step': 6, 'tokens': 600, 'model_flops': 6 * MODEL, 'hardware_flops': None, 'seconds': 9.5,
    }  # fmt: skip
    assert ledger.add_waste_since(last, seconds=6.0) == 2
    assert ledger.add_waste_since({'step': 4, 'tokens': 400}) == 0
    ledger.add_wasted_steps(1)
    totals = ledger.totals()
    assert totals['wasted'] == {
        'steps': 3, 'tokens': 200, 'model_flops': 2 * MODEL, 'hardware_flops': 0, 'seconds': 3.5,
    }  # fmt: skip
    assert totals['steps'] == ledger.steps == 4


def test_waste_that_another_ledger_booked_is_taken_up():
    lost, restored = stepped(4), stepped(4)
    lost.add_wasted_steps(3, tokens=300, seconds=2.5)
    for _ in range(2):  # the same sum again is no more
        restored.take_waste(lost.wasted)
        assert restored.wasted == lost.wasted
    restored.add_wasted_steps(1)
    restored.take_waste(lost.wasted)
    assert restored.wasted['steps'] == 4


def test_skipped_steps_are_charged_and_counted():
    ledger = stepped(3)
    ledger.add_skipped()
    assert ledger.totals()['skipped'] == 1
    assert ledger.model_flops == 3 * MODEL


def test_what_another_run_cost_counts_beside_the_own_steps():
    ledger, source = Ledger(), stepped(4)
    ledger.add_source('teacher', source.totals(), seconds=3.0, charged=True)
    ledger.add_source('init_from', source.totals(), seconds=5.0, charged=False)
    for _ in range(2):
        ledger.add_step(STEP, stage='main')
    assert ledger.steps == 2
    for name in ('tokens', 'examples', 'model_flops'):
        assert 2 * getattr(ledger, name) == 3 * getattr(source, name)
    assert ledger.computed == (2 * MODEL, stepped(2).hardware_flops)
    totals = ledger.totals()
    assert [found['model_flops'] for found in totals['sources'].values()] == [4 * MODEL] * 2
    assert totals['model_flops'] == 6 * MODEL and sum(totals['parts'].values()) == 2 * MODEL
    assert ledger.source_seconds == 3.0
    assert Ledger.from_dict(ledger.to_dict()).computed == ledger.computed
    timed = Ledger()
    timed.add_source('init_from', {'reference_seconds': 5.0}, charged=True)
    assert timed.reference_seconds == 5.0  # before its first step, too
    ledger.add_source('unknown', {'model_flops': 1.0}, charged=True)
    assert ledger.hardware_flops is None and ledger.reference_seconds is None
