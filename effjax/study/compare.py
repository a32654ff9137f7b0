"""`compare(study, folder)`: everything from a study's data to its findings. Reads top to bottom."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effjax.core.errors import StudyError
from effjax.costs import page
from effjax.study import analysis as analyses
from effjax.study import commands as command_of
from effjax.study import lock, plan, preflight, records, spec, stats, store
from effjax.study.execute import Runner
from effjax.study.records import Analysis, Cell
from effjax.study.spec import AXES, Study
from effjax.study.stopping import Leaving
from effjax.training.files import write_json_atomic, write_text_atomic

Say = Callable[[str], None]
NOISE = pathlib.Path('experiments/noise_floor/results/noise.json')
# Keys in which a baseline may differ from the one whose noise is stored; told, not silent.
_LIKE_NOISE = ('model', 'optimizer', 'schedule')


@dataclasses.dataclass(frozen=True)
class Options:
    """How a study is run; nothing of it changes what is compared.

    Attributes:
      workers: runs side by side, each in a process with a device of its own; 1 runs here.
      any_code: accept stored results of another code version.
      retry_failed: run again what failed or diverged.
      probe: measure speed and noise with short runs before the study, where neither is known.
      commands: what the report says makes the study again.
    """

    workers: int = 1
    any_code: bool = False
    retry_failed: bool = False
    probe: bool = True
    commands: tuple[str, ...] = ()


def compare(
    study: Study,
    out: str | pathlib.Path,
    options: Options | None = None,
    *,
    say: Say = print,
) -> Analysis:
    """Runs what is missing of a study and returns its findings, written to its folder too.

    Args:
      study: what is compared.
      out: the study's folder; the same folder goes on where it stopped.
      options: how it is run.
      say: takes lines for the user.

    Raises:
      StudyError: a study that cannot be run or judged, stored results that are not its own, or
        another process that works in the folder.
      Stopped: a signal came; a `StudyError` too.
    """
    with Leaving():
        return _compare(study, pathlib.Path(out), options or Options(), say)


def _compare(study: Study, folder: pathlib.Path, options: Options, say: Say) -> Analysis:
    spec.check(study)
    facts = preflight.examine(study)
    batched = preflight.batched(study, facts)
    runner = Runner(
        folder,
        plan.code_version(),
        batched=batched,
        devices=devices(study, options.workers),
        any_code=options.any_code,
        retry_failed=options.retry_failed,
        inputs={name: fact.inputs for name, fact in facts.items()},
        say=say,
    )
    for line in overview(study, facts, batched=batched):
        say(line)
    todo = [*plan.tuning(study), *_finals(study, ())]
    missing = sum(len(runner.missing(g)) for g in todo)  # also refuses foreign results, at once
    with lock.held(folder):
        write_json_atomic(folder / 'study.json', spec.to_json(study))
        probe = options.probe and missing == sum(len(g.jobs) for g in todo)
        _work(study, runner, facts, probe=probe, say=say)
        return report(study, folder, options.commands)


def _work(
    study: Study, runner: Runner, facts: Mapping[str, preflight.Facts], *, probe: bool, say: Say
) -> None:
    """Runs all that is missing, in order: what tells speed and noise, tuning, what is judged."""
    if probe:
        runner.discard_stale(plan.probes(study))
        runner.run([plan.probes(study)])
    folder, workers = runner.out, len(runner.devices)
    for line in expectation(study, facts, folder, batched=runner.batched, workers=workers):
        say(line)
    runner.run(plan.tuning(study))
    runner.run(_finals(study, collect(study, folder)))


def report(study: Study, out: str | pathlib.Path, commands: Sequence[str] = ()) -> Analysis:
    """Analyses what a study's folder holds and writes analysis.json, report.html and report.md.

    Args:
      study: what is compared.
      out: its folder.
      commands: what makes the study again.

    Raises:
      StudyError: nothing has been run yet, or runs were judged on different data.
    """
    from effjax.study import markdown
    from effjax.study import report as html

    folder = pathlib.Path(out)
    cells = collect(study, folder)
    if all(c.status == 'missing' for c in cells):
        raise StudyError(f'{folder} holds no finished run of {study.name}; run the study first.')
    jobs = _jobs(study, cells)
    _check_judged_alike(study, folder, jobs)
    codes = sorted({code for job in jobs for code in store.codes_of(job, folder)})
    notes = []
    if len(codes) > 1:
        notes.append(
            f'The runs were made by {len(codes)} versions of the code ({", ".join(codes)}).'
        )
    remarks = collections.Counter(store.note(job, folder).get('remark') for job in jobs)
    notes += [f'{count} runs: {text}.' for text, count in remarks.items() if text]
    found = analyses.analyse(
        study,
        cells,
        code='+'.join(codes),
        commands=commands,
        scale=_scale(study, folder, cells),
        sources={a.name: _source(a.source_run) for a in study.arms if a.source_run},
        notes=notes,
    )
    found = _with_commands(study, found)
    write_json_atomic(folder / 'analysis.json', records.to_json(found))
    write_text_atomic(folder / 'report.md', markdown.render(found))
    html.write(found, folder)
    return found


def collect(study: Study, folder: pathlib.Path) -> list[Cell]:
    """Returns every cell of a study's tuning and judged runs, those not run yet included."""
    tuned = [store.collect(job, folder, study.metric) for g in plan.tuning(study) for job in g.jobs]
    finals = [
        store.collect(job, folder, study.metric) for g in _finals(study, tuned) for job in g.jobs
    ]
    return [*tuned, *finals]


def overview(study: Study, facts: Mapping[str, preflight.Facts], *, batched: bool) -> list[str]:
    """Returns what is about to be compared, in a few lines."""
    tunes = sum(len(g.jobs) for g in plan.tuning(study))
    finals = len(study.arms) * len(study.fractions) * len(study.seeds)
    shares = ', '.join(f'{f:.0%}' for f in study.fractions)
    lines = [
        f'{study.name}: {finals + tunes} runs: {len(study.arms)} arms x {len(study.seeds)} seeds x '
        f'{len(study.fractions)} budgets ({shares}), and {tunes} for tuning {study.tune_key}'
        if tunes
        else f'{study.name}: {finals} runs: {len(study.arms)} arms x {len(study.seeds)} seeds x '
        f'{len(study.fractions)} budgets ({shares}), nothing tuned',
        f'budget of a full run: {_amount(study)}; judged by {study.metric}; '
        + ('the runs of one arm and budget share a compiled step' if batched else 'run by run'),
    ]
    for arm in study.arms:
        fact = facts[arm.name]
        steps = f', {fact.steps} steps' if fact.steps is not None else ''
        what = ' '.join([arm.config, *arm.overrides]).strip() or 'as it is'
        lines.append(
            f'  {arm.name}: {what}; {page.si(fact.params)} parameters, '
            f'{page.si(fact.step_flops, "FLOP")} a step{steps}'
        )
    return lines


def expectation(
    study: Study,
    facts: Mapping[str, preflight.Facts],
    folder: pathlib.Path,
    *,
    batched: bool,
    workers: int = 1,
) -> list[str]:
    """Returns how long the rest will take and the smallest effect that the seeds can show.

    Both come from short runs of the baseline in the folder, or from the stored noise floor of the
    same workload; what is not known is said to be so.

    Raises:
      StudyError: a budget in time, energy or hardware FLOPs that those runs show to be too small.
    """
    probes = [store.collect(job, folder, study.metric) for job in plan.probes(study).jobs]
    ended = [c for c in probes if c.status == 'done']
    preflight.reach(study, facts, ended)
    minutes = _minutes(study, facts, folder, ended, batched=batched)
    lines = ['time: not known before something has run here']
    if minutes is not None:
        shared = f' on {workers} devices' if workers > 1 else ''
        lines = [f'about {minutes / workers:.1f} minutes{shared} to go']
    return [*lines, _smallest(study, ended)]


# ---- parts -------------------------------------------------------------------------------------


def _finals(study: Study, cells: Sequence[Cell]) -> list[plan.Group]:
    """Returns the judged runs of all arms, interleaved, so that a drift hits all alike.

    The full budget comes first: a study cut short can then be judged at equal budget. Before the
    tuning has ended the first value of each grid stands for the winner.
    """
    groups: list[list[plan.Group]] = []
    for arm in study.arms:
        settings: dict[str, Any] = {}
        if study.grid_of(arm):
            tuning = analyses.tune(study, arm, cells)
            settings = {study.tune_key: tuning.chosen if tuning else study.grid_of(arm)[0]}
        groups.append(plan.final(study, arm, settings)[::-1])
    return [g for same_budget in zip(*groups, strict=True) for g in same_budget]


def _jobs(study: Study, cells: Sequence[Cell]) -> list[plan.Job]:
    return [job for g in [*plan.tuning(study), *_finals(study, cells)] for job in g.jobs]


def _with_commands(study: Study, found: Analysis) -> Analysis:
    """Adds to each arm what trains it by itself, at the first seed and the full budget."""
    arms = {}
    for group in _finals(study, found.cells)[: len(study.arms)]:
        job = group.jobs[0]
        arms[job.arm] = {**found.arms[job.arm], 'commands': [command_of.of_arm(study, job)]}
    return dataclasses.replace(found, arms=arms)


def _check_judged_alike(study: Study, folder: pathlib.Path, jobs: Sequence[plan.Job]) -> None:
    """Refuses finished runs whose metric was taken on different batches."""
    key = f'evaluation {preflight.evaluation_of(study)}'
    first: dict[str, plan.Job] = {}
    for job in jobs:
        found = store.note(job, folder)
        digest = found.get('inputs', {}).get(key)
        if digest and found['status'] == 'done' and found['digest'] == job.digest:
            first.setdefault(digest, job)
    if len(first) > 1:
        one, other, *_ = (folder / job.folder for job in first.values())
        raise StudyError(
            f'{one} and {other} were judged on different held-out data, so that their '
            f'{study.metric} cannot be compared; run the study again in another --out.'
        )


def devices(study: Study, workers: int) -> list[str]:
    """Returns a device for each worker, as `Runner` takes them.

    Raises:
      StudyError: more workers than devices, or workers that share what the budget measures.
    """
    if workers == 1:
        return ['']
    import jax

    kind = jax.default_backend()
    if kind == 'cpu' and study.axis in ('seconds', 'joules'):
        raise StudyError(
            f'--workers={workers} on a CPU: the runs share its cores, so that a budget in '
            f'{AXES[study.axis][1]} means nothing for one of them; use --workers=1, or a budget '
            'in flops or tokens.'
        )
    count = jax.local_device_count()
    if kind == 'gpu' and workers > count:
        raise StudyError(f'{workers} workers need as many devices, and there are {count}.')
    if kind == 'tpu':
        raise StudyError('--workers above 1 needs GPUs or CPUs: the runs of a TPU host share it.')
    named = [d for d in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if d]
    ids = named or [str(i) for i in range(count)]
    return [ids[i] if kind == 'gpu' else f'cpu{i}' for i in range(workers)]


def _amount(study: Study) -> str:
    unit = {'seconds': 's', 'reference_seconds': 's', 'joules': 'J'}.get(study.axis, '')
    text = page.si(study.budget, unit) if unit else page.si(study.budget)
    return f'{text} {AXES[study.axis][1]}'


def _scale(study: Study, folder: pathlib.Path, cells: Sequence[Cell]) -> str:
    """Returns the workload in words, from the baseline's first finished run at the full budget."""
    done = [c for c in cells if c.arm == study.baseline.name and c.status == 'done']
    done = [c for c in done if c.fraction == 1.0] or done
    if not done:
        return ''
    summary = json.loads((folder / done[0].workdir / 'summary.json').read_text())
    params, tokens = done[0].costs['params'], done[0].costs['tokens']
    data = summary.get('data') or {}
    name = data.get('source') or ''
    counted = f'{page.si(tokens)} tokens' if tokens else f'{done[0].costs["examples"]} examples'
    return f'{page.si(params or 0)} parameters, {counted}' + (f' of {name}' if name else '')


def _source(folder: str) -> dict[str, float | None]:
    file = pathlib.Path(folder) / 'summary.json'
    try:
        return store.costs(json.loads(file.read_text()))
    except (OSError, ValueError) as e:
        raise StudyError(
            f'source_run {folder!r} has no readable summary.json, so that the cost of the reused '
            'model cannot be charged; give the folder of a finished run.'
        ) from e


def _minutes(
    study: Study,
    facts: Mapping[str, preflight.Facts],
    folder: pathlib.Path,
    probes: Sequence[Cell],
    *,
    batched: bool,
) -> float | None:
    """Estimates the minutes of what is missing, from the speed of runs of the baseline."""
    cells = [*collect(study, folder), *probes]
    done = [c for c in cells if c.arm == study.baseline.name and c.status == 'done']
    compiling, judging = _overheads(done)
    total = 0.0
    for group in [*plan.tuning(study), *_finals(study, cells)]:
        states = [store.collect(job, folder, study.metric).status for job in group.jobs]
        left = sum(state == 'missing' for state in states)
        if not left:
            continue
        job = group.jobs[0]
        seconds = _training_seconds(study, facts[job.arm], done)
        if seconds is None:
            return None
        total += left * seconds * job.fraction
        judged = judging * _evaluations(study, facts[job.arm], job)
        total += (compiling + judged) * (1 if batched else left)
    return total / 60


def _training_seconds(study: Study, fact: preflight.Facts, done: Sequence[Cell]) -> float | None:
    """Returns an arm's seconds at the full budget, by what the baseline's runs took for theirs."""
    if study.axis == 'seconds':
        return study.budget if done else None
    known = study.axis in ('model_flops', 'hardware_flops', 'joules')
    axis = study.axis if known else 'model_flops'
    spent = [(c.costs.get('seconds'), c.costs.get(axis)) for c in done]
    rates = [seconds / amount for seconds, amount in spent if seconds and amount]
    if not rates:
        return None
    amount = study.budget if known else (fact.steps or 0) * fact.step_flops
    return amount * statistics.median(rates)


def _overheads(done: Sequence[Cell]) -> tuple[float, float]:
    """Returns the median seconds of compiling, and of one evaluation, for a run or a group."""
    if not done:
        return 0.0, 0.0
    lanes = [max(1, int(c.environment.get('batched') or 0)) for c in done]
    both = list(zip(done, lanes, strict=True))
    compiling = statistics.median((c.costs['compile_seconds'] or 0) * n for c, n in both)
    judging = statistics.median(
        (c.costs['eval_seconds'] or 0) * n / max(1, len(c.curve)) for c, n in both
    )
    return compiling, judging


def _evaluations(study: Study, fact: preflight.Facts, job: plan.Job) -> float:
    """Returns how often a run takes the study's metric."""
    block = job.trained['evals'].get(preflight.evaluation_of(study)) or {}
    every, share = block.get('every_steps') or 0, block.get('every_share') or 0.0
    steps = (fact.steps or 0) * job.fraction
    return max(1.0, 1 / share if share else 0.0, steps / every if every else 0.0)


def _smallest(study: Study, probes: Sequence[Cell]) -> str:
    """Says the smallest effect that the seeds can show."""
    n = len(study.seeds)
    stored = _stored_noise(study)
    if stored is not None:
        smallest = stats.minimum_detectable(math.sqrt(2) * stored['sd'], n)
        text = (
            f'{n} seeds show differences of {study.metric} from {smallest:.2g} on (80 % power; '
            f'noise floor {stored["sd"]:.2g}, stored'
        )
        if stored['differs']:
            text += f' for a baseline that differs in {", ".join(stored["differs"])}'
        slope, lower = stored.get('slope') or 0.0, study.minimised
        if (slope < 0) if lower else (slope > 0):
            faster = stats.detectable_speedup(stored['sd'], slope, n, lower_is_better=lower)
            return f'{text}), which is a speed-up of {faster:.2f}x'
        return f'{text})'
    sd = analyses.noise(probes)
    if not sd:
        return f'the smallest effect that {n} seeds can show: not known before something has run'
    smallest = stats.minimum_detectable(math.sqrt(2) * sd, n)
    return (
        f'{n} seeds show differences of {study.metric} from about {smallest:.2g} on (80 % power; '
        f'noise {sd:.2g} over {len(probes)} runs of {plan.PROBE_FRACTION:.0%} of the budget, which '
        'is usually more than at its end)'
    )


def _stored_noise(study: Study) -> dict[str, Any] | None:
    """Returns the noise floor that was measured for this config, metric and budget, or None.

    Its `differs` are the keys of the model or its optimizer in which the baseline is another. That
    of a baseline with other data, batches or evaluations is not this one's.
    """
    try:
        entries = json.loads(NOISE.read_text())['workloads']
    except (OSError, ValueError, KeyError):
        return None
    base = study.baseline
    wanted = (base.config or study.config, study.metric, study.axis, float(study.budget))
    mine = {o for o in (*study.overrides, *base.overrides) if not o.startswith('data.path=')}
    for entry in entries:
        if (entry['config'], entry['metric'], entry['axis'], float(entry['budget'])) != wanted:
            continue
        differs = sorted({o.partition('=')[0] for o in mine ^ set(entry.get('overrides', ()))})
        if all(key.partition('.')[0] in _LIKE_NOISE for key in differs):
            return {**entry, 'differs': differs}
    return None
