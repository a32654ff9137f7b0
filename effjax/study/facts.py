"""What else was measured of a method: one line on its card, beside the paired studies.

Experiments that are no paired study (recall, lengths of rows, crossovers) leave one line a method
in `experiments/<name>/results/facts.json`; `python tools/verdicts.py` puts them on the cards.
"""

import json
import pathlib
from collections.abc import Mapping

from effjax.core.errors import StudyError
from effjax.core.registry import suggest
from effjax.training.files import write_json_atomic

FILE = 'results/facts.json'


def write(
    results: str | pathlib.Path, what: str, device: str, date: str, lines: Mapping[str, str]
) -> None:
    """Writes an experiment's facts.

    Args:
      results: the folder `experiments/<name>/results`.
      what: what was measured, in some words.
      device: on what hardware.
      date: when, as YYYY-MM-DD.
      lines: id of a method in `effjax/methods.toml` -> what was found of it, a phrase.
    """
    file = pathlib.Path(results) / pathlib.PurePath(FILE).name
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, {'what': what, 'device': device, 'date': date, 'lines': dict(lines)})


def stored(root: str | pathlib.Path, methods: Mapping[str, object]) -> dict[str, list[str]]:
    """Returns method -> Markdown lines of the facts under `root/experiments`.

    Args:
      root: of the repository.
      methods: the catalogue.

    Raises:
      StudyError: a file that holds no facts, or those of a method that is not in the catalogue.
    """
    root, out = pathlib.Path(root), dict[str, list[str]]()
    for path in sorted((root / 'experiments').rglob(FILE)):
        at = path.parents[1].relative_to(root).as_posix()
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
            head = f'[{found["what"]}](../../{at}/README.md), {found["device"]}, {found["date"]}'
            lines = {str(method): f'- {head}: {line}.' for method, line in found['lines'].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(
                f'{path} holds no facts ({error}); run its experiment again.'
            ) from error
        for method, line in lines.items():
            if method not in methods:
                raise StudyError(f'{path}: no method {method!r}.' + suggest(method, methods))
            out.setdefault(method, []).append(line)
    return out
