"""The exceptions that this package raises for texts, caches, downloads and files to be written."""


class DataError(Exception):
    """A text, cache or download that cannot be used.

    The message is one line that names the file and the cause, fit to be printed as it stands
    after ``error: ``.
    """


class WriteError(OSError):
    """A file that cannot be written; its old contents are untouched.

    The message is one line, like DataError's; if the disk is full, it has the bytes wanted and
    left.
    """

    def __str__(self) -> str:
        return f"{self.filename}: cannot write: {self.strerror}"
