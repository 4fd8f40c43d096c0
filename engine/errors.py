"""Errors that a user can cause or has to handle; each message is one line."""


class UsageError(Exception):
    """An invalid flag or value: exit code 2."""


class RunError(Exception):
    """A run cannot start or continue; names the file or flag and the cause."""


class CheckpointError(RunError):
    """A checkpoint cannot be read, or not without running code in it."""


class DivergenceError(RunError):
    """The loss or the gradient is no longer finite."""


class PeerError(RunError):
    """Another process of the run has ended or cannot be reached."""
