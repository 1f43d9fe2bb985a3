"""Failures a person running a training can do something about. The command line prints the message and exits with 1."""


class TrainingError(Exception):
    """Base of all failures below; the message says what is wrong, where, and what to do."""


class ConfigError(TrainingError):
    """A preset, setting or value does not exist or does not fit."""


class DataError(TrainingError):
    """The data folder is missing or unreadable, or these are other data than a checkpoint or a report was made with."""


class ResumeError(TrainingError):
    """The checkpoint cannot be continued: its data, settings or code differ from this run's."""


class DivergenceError(TrainingError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class Stopped(TrainingError):
    """The run was asked to end, and was saved; it can be continued.

    Args:
        message: at which step, and why.
        signal_number: of the signal that came; None if the run's deadline did.

    Attributes:
        signal_number: the same.
    """

    def __init__(self, message: str, signal_number: int | None) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StorageError(TrainingError):
    """A checkpoint or report could not be written, usually because the disk is full."""
