"""Reports of whole, unfinished and damaged runs."""

import html.parser
import json
import math
import re
import subprocess
import sys

import pytest

from effjax import report
from effjax.core.errors import DataError
from effjax.costs import Clock, Ledger, StepCost, mfu

FLOPS = {'attention': 2e9, 'ffn': 6e9, 'head': 1e9}


def make_run(folder, *, steps=200, summary=True, end=2.0, every=50, device='cpu', cut=0):
    """Writes a run's folder with the real ledger and clock; `cut` bytes off metrics.jsonl."""
    folder.mkdir(parents=True)
    ledger, lines = Ledger(), []
    cost = StepCost(FLOPS, 1.1e10, 1e6, 4, 1000, 1024)
    for step in range(1, steps + 1):
        ledger.add_step(cost, stage='main')
        loss = end + 5 * math.exp(-step / 20)
        row = {
            'step': step, 'loss': loss, 'lr': 1e-3 * (1 - step / steps), 'tokens': ledger.tokens,
            'examples': ledger.examples, 'model_flops': ledger.model_flops,
            'hardware_flops': ledger.hardware_flops, 'seconds': 0.5 * step,
            'tokens_per_second': 2000.0, 'grad_norm': 1 / step, 'stage': 0, 'skipped': 0,
        }  # fmt: skip
        if every and step % every == 0:
            row['eval'] = {
                'valid': {
                    'loss': loss,
                    'bits_per_byte': loss / 2,
                    'accuracy': 0.25,
                    'tokens': 5000.0,
                }
            }
        lines.append(row)
    lines[2].update(skipped=1, loss=None)
    text = ''.join(json.dumps(row) + '\n' for row in lines)
    (folder / 'metrics.jsonl').write_text(text[: len(text) - cut])
    config = {'name': f'my <{folder.name}>', 'steps': steps, 'model': {'kind': 'decoder'}}
    (folder / 'config.json').write_text(json.dumps(config))
    if summary:
        ledger.add_wasted_steps(3, model_flops=2.7e10)
        (folder / 'summary.json').write_text(json.dumps(make_summary(ledger, lines, device)))
    return folder


def make_summary(ledger, lines, device):
    return {
        'final_step': ledger.steps,
        'complete': True,
        'eval': lines[-1].get('eval', {}),
        'ledger': ledger.totals(),
        'clock': {**Clock().to_dict(), 'train': 100.0, 'compile': 7.5},
        'params': 1_234_567,
        'memory': {'compiled': {'temporary': 3 * 2**20}, 'device_peak_bytes': None},
        'joules': 50.0 if device != 'cpu' else None,
        'mfu': mfu(ledger.model_flops, 1e-3, device, hardware_flops=ledger.hardware_flops),
        'gzip_bits_per_byte': 1.25,
        'sample': 'def f(<x>):\n    return x & 1',
        'environment': {'jax': '0.12', 'device': device},
        'warnings': ['no space left'],
    }


class Checker(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects the text."""

    VOID = frozenset({'meta', 'input', 'br'})

    def __init__(self):
        super().__init__()
        self.stack, self.text, self.count = [], '', {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attrs:
            assert name not in ('src', 'href', 'onclick'), (name, value)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != 'style':
            self.text += data


def page_of(path):
    text = path.read_text(encoding='utf-8')
    checker = Checker()
    checker.feed(text)
    assert not checker.stack
    assert 'script' not in checker.count
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)', text)
    return checker


def test_report_of_a_finished_run(tmp_path):
    path = report.write(make_run(tmp_path / 'run'))
    assert path == tmp_path / 'run' / 'report.html'
    page = page_of(path)
    for words in (
        'my <run>', 'finished after 200 steps', 'Loss against steps', 'Loss against model FLOPs',
        'Loss against seconds', 'Learning rate', 'Throughput', 'valid bits per byte', '1.0001',
        '5,000', 'attention', '22.2 %', '66.7 %', '200,000', '204,800',
        '1.800 TFLOP', '2.200 TFLOP', '1.222', '1 min 40 s', '7.50 s', '3.00 MiB', 'no meter',
        'No MFU: no peak known for cpu', 'gzip -9 takes 1.250 bits per byte', '20.0% fewer',
        'def f(<x>):', '1 skipped steps (gradient not finite): 3', 'no space left',
        '3 steps were lost', '27.00 GFLOP', '1.235 M',
    ):  # fmt: skip
        assert words in page.text, words
    assert page.count['svg'] == 3 + 3 + 2 + 3  # losses twice, two metrics, three curves
    assert page.count['details'] == 1
    assert not list(path.parent.glob('*.tmp'))


def test_mfu_states_its_convention(tmp_path):
    page = page_of(report.write(make_run(tmp_path / 'run', device='NVIDIA H200')))
    assert 'MFU 181.9 %: model FLOPs (multiply-add 2, causal attention T(T+1)/2' in page.text
    assert '989.4 TFLOP/s dense bfloat16' in page.text
    assert '50 J' in page.text
    assert '0.250 mJ' in page.text


def test_report_of_an_unfinished_run_with_half_a_last_line(tmp_path):
    page = page_of(report.write(make_run(tmp_path / 'run', summary=False, cut=30)))
    assert 'unfinished: 199 steps so far, of 200 steps' in page.text
    assert '1 incomplete line(s) of metrics.jsonl left out' in page.text
    assert '199.0 k' in page.text
    assert '1 min 40 s' in page.text  # 99.5 s
    assert 'valid bits per byte' in page.text  # of step 150


def test_report_of_a_stopped_run(tmp_path):
    folder = make_run(tmp_path / 'run')
    summary = json.loads((folder / 'summary.json').read_text())
    (folder / 'summary.json').write_text(json.dumps({**summary, 'complete': False}))
    assert 'stopped by a signal after 200 steps' in page_of(report.write(folder)).text


def test_report_before_the_first_step_and_without_evals(tmp_path):
    folder = tmp_path / 'new'
    folder.mkdir()
    (folder / 'config.json').write_text('{"name": "new", "budget": "240s"}')
    page = page_of(report.write(folder))
    assert 'unfinished: 0 steps so far, of 240s' in page.text
    assert 'no data' in page.text
    page = page_of(report.write(make_run(tmp_path / 'run', every=0)))
    assert 'training loss' in page.text
    assert 'no evaluation yet' in page.text


def test_each_step_counts_once_and_in_order(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    rows = [{'step': 1, 'loss': 3.0}, {'step': 3, 'loss': 9.0}, {'step': 2, 'loss': 2.0},
            {'step': 3, 'loss': 1.0}]  # fmt: skip
    text = '\n'.join(map(json.dumps, rows)) + '\n\nnot json\n[1]\n{"loss": 1}\n'
    (folder / 'metrics.jsonl').write_text(text)
    run = report.read(folder)
    assert run.column('loss') == ([1, 2, 3], [3.0, 2.0, 1.0])
    assert run.damaged == 3


def test_gzip_is_compared_with_the_evaluation_that_covers_most():
    part, whole = {'bits_per_byte': 1.0, 'tokens': 10.0}, {'bits_per_byte': 1.5, 'tokens': 99.0}
    sentence = report._gzip_sentence({'whole': whole, 'part': part}, 2.0)
    assert sentence.endswith('on the held-out files; the model (whole) takes 25.0% fewer.')
    assert report._gzip_sentence({'whole': whole}, 1.0).endswith('takes 50.0% more.')
    assert report._gzip_sentence({'digits': {'accuracy': 1.0}}, 1.0).endswith('held-out files.')


def test_comparison(tmp_path):
    runs = [
        make_run(tmp_path / 'a' / 'run', end=2.0),
        make_run(tmp_path / 'b' / 'run', end=1.8, steps=150),
        make_run(tmp_path / 'other', summary=False),
    ]
    path = report.write_comparison(runs, tmp_path / 'page.html')
    page = page_of(path)
    for words in ('3 runs', 'run (1)', 'run (2)', 'other: unfinished', 'Evaluation loss against'):
        assert words in page.text, words
    assert page.count['svg'] == 3 + 3 + 2
    assert page.text.index('run (1)') < page.text.index('run (2)')


def test_comparison_falls_back_on_training_loss(tmp_path):
    runs = [make_run(tmp_path / 'a'), make_run(tmp_path / 'b', every=0)]
    page = page_of(report.write_comparison(runs, tmp_path / 'page.html'))
    assert 'a train (smoothed)' in page.text
    assert 'b train (smoothed)' in page.text


def test_no_run(tmp_path):
    with pytest.raises(DataError, match=r"no run in '.*': it has none of metrics\.jsonl"):
        report.write(tmp_path)


def test_command(tmp_path, capsys):
    a, b = make_run(tmp_path / 'a'), make_run(tmp_path / 'b')
    assert report.main([str(a)]) == 0
    assert capsys.readouterr().out == f'{a / "report.html"}\n'
    assert report.main([str(a), str(b), '--output', str(tmp_path / 'both.html')]) == 0
    assert (tmp_path / 'both.html').exists()
    capsys.readouterr()
    assert report.main([str(tmp_path / 'missing')]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: no run in ')
    assert error.count('\n') == 1


def test_help_needs_no_jax():
    code = 'import sys, effjax.report; sys.exit("jax" in sys.modules or "flax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
