"""One run from a config to its files, without a page: what commands and studies share."""

import pathlib
from collections.abc import Mapping
from typing import Any

from effjax import parallel
from effjax.core.config import as_dict, check_form
from effjax.training import finish, setup
from effjax.training.files import write_json_atomic
from effjax.training.loop import Trainer


def train(config: Mapping[str, Any], workdir: pathlib.Path) -> tuple[dict[str, Any], str | None]:
    """Trains a config in a folder and writes all its files but the report.

    Args:
      config: a complete config, or plain dicts of that form.
      workdir: the run's folder, made if need be; a run that was stopped there goes on.

    Returns:
      (what `summary.json` holds, the signal that came or None). A signal after the last step leaves
      the run complete; whoever has more to do must still stop.

    Raises:
      ConfigError, DataError, CheckpointError, TrainingError: see `effjax.train.run`.
    """
    check_form(config)
    setup.check(config)
    trainer = Trainer(as_dict(config), workdir)
    stopped_by = trainer.run()
    summary = finish.summary(trainer)
    if parallel.is_primary():
        write_json_atomic(trainer.workdir / 'summary.json', summary)
    return summary, stopped_by or trainer.stop.requested
