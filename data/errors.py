"""The one exception that this package raises for texts, caches and downloads."""


class DataError(Exception):
    """A text, cache or download that cannot be used.

    The message is one line that names the file and the cause, fit to be printed as it stands
    after ``error: ``.
    """
