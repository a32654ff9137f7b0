"""No data: for configs that are only looked at, by `--dry_run`."""

from effjax.core.errors import DataError


def no_data() -> None:
    """Refuses: whoever opens a source wants something to train on.

    Raises:
      DataError: always.
    """
    raise DataError(
        "config.data.kind 'none' holds nothing to train on and is for --dry_run only; name a "
        'source, such as config.data.kind=stdlib.'
    )
