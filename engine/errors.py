"""What can go wrong in a run through no fault of the code; each message is one line."""


class UsageError(Exception):
    """A flag or value that cannot be: one line, exit code 2."""


class RunError(Exception):
    """A run that cannot start or go on; names the file or flag and the cause."""


class CheckpointError(RunError):
    """A checkpoint that cannot be written, or read without running what is in it."""


class DivergenceError(RunError):
    """The loss or the gradient is no longer finite."""


class PeerError(RunError):
    """Another of the processes that train together is gone."""
