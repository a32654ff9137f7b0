"""A study's folder: what each run left there, read back as `records.Cell`s.

    study.json          the study, resolved
    runs/ARM/PHASE/SHARE/[SETTING/]seed_N/   ordinary runs, each with a cell.json beside its files
    analysis.json report.html report.md

`cell.json` names the config and the code that made a run. A result of another config or another
code version is never mixed in silently.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from effjax.core.errors import StudyError
from effjax.study.plan import Job
from effjax.study.records import Cell
from effjax.training.files import write_json_atomic

FILE = 'cell.json'


def begin(job: Job, out: pathlib.Path, code: str) -> None:
    """Notes that a run has begun, before it writes anything of its own."""
    folder = out / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    _write(job, folder, code, 'running', '')


def end(job: Job, out: pathlib.Path, code: str, status: str, error: str = '') -> None:
    """Notes how a run ended: 'done', 'diverged' or 'failed'."""
    _write(job, out / job.folder, code, status, ' '.join(error.split()))


def status(job: Job, out: pathlib.Path, code: str, *, any_code: bool = False) -> str:
    """Returns 'missing', 'running' (begun, not ended), 'done', 'diverged' or 'failed'.

    Args:
      job: the run.
      out: the study's folder.
      code: digest of the code that runs now.
      any_code: accept results of another code version.

    Raises:
      StudyError: the folder holds another config's result, or another code version's.
    """
    found = _read(out / job.folder / FILE)
    if found is None:
        return 'missing'
    if found['digest'] != job.digest:
        raise StudyError(
            f'{out / job.folder} holds the result of another config (the study or a config file '
            'was changed since); give another --out, or delete that folder.'
        )
    if found['code'] != code and not any_code:
        raise StudyError(
            f'{out / job.folder} was made by another version of the code ({found["code"]}, now '
            f'{code}); give another --out to start afresh, or --any_code to take old and new '
            'results together, which the report will say.'
        )
    if found['status'] == 'done' and _read(out / job.folder / 'summary.json') is None:
        return 'missing'  # lost or cut: it runs again
    return str(found['status'])


def code_of(job: Job, out: pathlib.Path) -> str:
    """Returns the digest of the code that made a stored run, '' without one."""
    found = _read(out / job.folder / FILE)
    return found['code'] if found else ''


def collect(job: Job, out: pathlib.Path, metric: str) -> Cell:
    """Returns what a run left, whatever its state."""
    folder = out / job.folder
    note = _read(folder / FILE)
    told = note['status'] if note and note['digest'] == job.digest else 'missing'
    summary = _read(folder / 'summary.json')
    lost = told == 'running' or (told == 'done' and summary is None)
    known = 'missing' if lost else told
    base: dict[str, Any] = {
        'arm': job.arm, 'phase': job.phase, 'seed': job.seed, 'fraction': job.fraction,
        'settings': dict(job.settings), 'workdir': job.folder,
        'error': note['error'] if note and known != 'missing' else '',
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
            'finished': note['finished'] if note else '',
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


def _write(job: Job, folder: pathlib.Path, code: str, state: str, error: str) -> None:
    import datetime

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    note = {
        'digest': job.digest, 'code': code, 'status': state, 'error': error, 'finished': now,
        'phase': job.phase, 'arm': job.arm, 'seed': job.seed, 'fraction': job.fraction,
        'settings': job.settings,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / FILE, note)


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
