"""A study's folder: what each run left there, read back as `records.Cell`s.

    study.json          the study, resolved
    runs/ARM/PHASE/SHARE/[SETTING/]seed_N/   ordinary runs, each with a cell.json beside its files
    analysis.json report.html report.md

`cell.json` names the config, the code and the data that made a run. A result of another config,
other data or another code version is never mixed in silently.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from effjax.core.errors import StudyError
from effjax.study.plan import Job
from effjax.study.records import Cell
from effjax.training.files import write_json_atomic, write_text_atomic

FILE = 'cell.json'
TRACE = 'error.txt'
# How a run is made, beside config and code; older notes lack it.
_MADE: dict[str, Any] = {'inputs': {}, 'workers': 1, 'remark': ''}


def begin(
    job: Job,
    out: pathlib.Path,
    code: str,
    inputs: Mapping[str, str] | None = None,
    workers: int = 1,
) -> None:
    """Notes that a run has begun, before it writes anything of its own.

    Args:
      job: the run.
      out: the study's folder.
      code: digest of the code that runs; a run that goes on from a checkpoint keeps those before.
      inputs: digests of what its config reads, as `preflight.Facts`.
      workers: runs that go on side by side, each in a process of its own.
    """
    folder = out / job.folder
    (folder / TRACE).unlink(missing_ok=True)
    goes_on = any((folder / 'checkpoints').glob('*'))
    before = codes_of(job, out) if goes_on else []
    codes = [*(c for c in before if c != code), code]
    made = {**_MADE, 'codes': codes, 'inputs': dict(inputs or {}), 'workers': workers}
    _write(job, folder, made, 'running', '')


def end(job: Job, out: pathlib.Path, code: str, status: str, error: str = '') -> None:
    """Notes how a run ended: 'done', 'diverged' or 'failed'."""
    began = note(job, out)
    made = {'codes': began.get('codes') or [code], **{k: began.get(k, v) for k, v in _MADE.items()}}
    _write(job, out / job.folder, made, status, ' '.join(error.split()))


def fail(job: Job, out: pathlib.Path, code: str, error: str, trace: str) -> None:
    """Notes that a run failed; keeps in its folder what tells a developer where."""
    folder = out / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / TRACE, trace)
    named = f'{job.folder}/{TRACE}'
    end(job, out, code, 'failed', f'{error.rstrip().rstrip(".")} (traceback in {named})')


def remark(job: Job, out: pathlib.Path, text: str) -> None:
    """Notes how a run that has begun is made otherwise than was asked; the report will say it."""
    write_json_atomic(out / job.folder / FILE, {**note(job, out), 'remark': text})


def status(
    job: Job,
    out: pathlib.Path,
    code: str,
    *,
    any_code: bool = False,
    inputs: Mapping[str, str] | None = None,
) -> str:
    """Returns 'missing', 'running' (begun, not ended), 'done', 'diverged' or 'failed'.

    Args:
      job: the run.
      out: the study's folder.
      code: digest of the code that runs now.
      any_code: accept results of another code version.
      inputs: digests of what its config reads now; what an older note lacks is not compared.

    Raises:
      StudyError: the folder holds another config's result, or one of other data or another code
        version.
    """
    found = _read(out / job.folder / FILE)
    if found is None:
        return 'missing'
    if found['digest'] != job.digest:
        raise StudyError(
            f'{out / job.folder} holds the result of another config (the study or a config file '
            'was changed since); give another --out, or delete that folder.'
        )
    _check_inputs(job, out / job.folder, found.get('inputs', {}), inputs or {})
    if found['code'] != code and not any_code:
        raise StudyError(
            f'{out / job.folder} was made by another version of the code ({found["code"]}, now '
            f'{code}); give another --out to start afresh, or --any_code to take old and new '
            'results together, which the report will say.'
        )
    if found['status'] == 'done' and _read(out / job.folder / 'summary.json') is None:
        return 'missing'  # lost or cut: it runs again
    return str(found['status'])


def note(job: Job, out: pathlib.Path) -> dict[str, Any]:
    """Returns what `cell.json` says of a run; {} where it has not begun."""
    return _read(out / job.folder / FILE) or {}


def codes_of(job: Job, out: pathlib.Path) -> list[str]:
    """Returns the digests of the code versions that made a stored run, in order."""
    found = note(job, out)
    return found.get('codes') or ([found['code']] if found else [])  # older notes have one


_INPUTS = {
    'data': 'training data',
    'reference': 'table of reference time',
    'init_from': 'run that it begins from',
    'teacher': 'run of its teacher',
}


def _check_inputs(
    job: Job, folder: pathlib.Path, made: Mapping[str, str], now: Mapping[str, str]
) -> None:
    for key, digest in now.items():
        if made.get(key, digest) == digest:
            continue
        data = job.config['data']
        held_out = data.get('valid_path') if key.startswith('evaluation') else ''
        name = held_out or data.get('path') or data['kind']
        name = job.config['reference'] if key == 'reference' else name
        name = f'the newest checkpoint of {key}' if key in ('init_from', 'teacher') else name
        what = _INPUTS.get(key)
        raise StudyError(
            f'{folder} was made before the {what or "held-out data"} changed: {name} holds '
            f'something else now (digest {made[key][:16]} then, {digest[:16]} now); put the old '
            'content back, or give another --out to start afresh.'
        )


def collect(job: Job, out: pathlib.Path, metric: str) -> Cell:
    """Returns what a run left, whatever its state."""
    folder = out / job.folder
    found = note(job, out)
    told = found['status'] if found and found['digest'] == job.digest else 'missing'
    summary = _read(folder / 'summary.json')
    lost = told == 'running' or (told == 'done' and summary is None)
    known = 'missing' if lost else told
    base: dict[str, Any] = {
        'arm': job.arm, 'phase': job.phase, 'seed': job.seed, 'fraction': job.fraction,
        'settings': dict(job.settings), 'workdir': job.folder,
        'error': found['error'] if known != 'missing' else '',
    }  # fmt: skip
    if known == 'missing' or summary is None:
        return Cell(status=known, **base)
    value = _metric(summary.get('eval', {}), metric)
    if known == 'done' and (value is None or not math.isfinite(value)):
        known, value = 'diverged', None
        base['error'] = base['error'] or f'its {metric} is not a finite number'
    return Cell(
        status=known,
        value=value if known == 'done' else None,
        costs=costs(summary),
        curve=_curve(folder / 'metrics.jsonl', metric),
        environment={
            **summary['environment'],
            'batched': (summary.get('batched') or {}).get('lanes', 0),
            'workers': found.get('workers', 1),
            'finished': found['finished'],
        },
        **base,
    )


def costs(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the columns of `records.COSTS` that a run's summary tells."""
    ledger, clock, memory = summary['ledger'], summary['clock'], summary.get('memory') or {}
    compiled = memory.get('compiled') or {}
    same = (
        'steps', 'tokens', 'tokens_computed', 'examples', 'model_flops', 'hardware_flops',
        'optimizer_flops', 'reference_seconds',
    )  # fmt: skip
    return {
        **{key: ledger.get(key) for key in same},
        'seconds': clock['train'] + clock['data'],
        'data_seconds': clock['data'],
        'compile_seconds': clock['compile'],
        'eval_seconds': clock['eval'],
        'device_seconds': sum(clock['device_seconds'].values()),
        'joules': summary.get('joules'),
        'params': summary['params'],
        'peak_bytes': memory.get('device_peak_bytes') or compiled.get('total'),
    }


def _curve(file: pathlib.Path, metric: str) -> list[dict[str, float | None]]:
    columns = ('tokens', 'model_flops', 'hardware_flops', 'reference_seconds', 'seconds')
    out = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut off
        value = _metric(row.get('eval') or {}, metric)
        if value is not None:
            point = {'steps': row['step'], **{key: row.get(key) for key in columns}}
            out.append({**point, 'value': value})
    return out


def _metric(evaluations: Mapping[str, Any], metric: str) -> float | None:
    name, _, key = metric.partition('.')
    value = (evaluations.get(name) or {}).get(key)
    return None if value is None else float(value)


def _write(job: Job, folder: pathlib.Path, made: Mapping[str, Any], state: str, error: str) -> None:
    import datetime

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    told = {
        'digest': job.digest, 'code': made['codes'][-1], **made, 'status': state, 'error': error,
        'finished': now, 'phase': job.phase, 'arm': job.arm, 'seed': job.seed,
        'fraction': job.fraction, 'settings': job.settings,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / FILE, told)


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
