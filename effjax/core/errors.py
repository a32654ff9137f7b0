"""The errors that a user can cause, each one clear sentence: what was wrong, where, what to do.

Commands catch `EffjaxError` and print it as one line on stderr; anything else is a bug and keeps
its traceback.
"""


class EffjaxError(Exception):
    """Base of every error that effjax raises on purpose."""


class ConfigError(EffjaxError, ValueError):
    """A config that cannot run: unknown key, wrong type, impossible value."""


class DataError(EffjaxError, ValueError):
    """Data that is missing, empty, unreadable or does not fit the model."""


class CheckpointError(EffjaxError, RuntimeError):
    """A checkpoint that cannot be written, read, verified, or belongs to another run."""


class DeviceError(EffjaxError, RuntimeError):
    """Too few devices, or a device that cannot do what was asked."""


class TrainingError(EffjaxError, RuntimeError):
    """Training that had to stop, such as a loss that is not finite."""


class StudyError(EffjaxError, ValueError):
    """A study that cannot be run or judged: unequal evaluations, missing seeds, stale results."""
