"""Reference time: what a step takes on a named device, from a calibration table."""

from collections.abc import Mapping
from typing import Any


def reference_seconds(config: Mapping[str, Any]) -> float | None:
    """Returns the seconds that `config.reference` charges for one step, None without a table."""
    return None
