"""Standard output and error that never fail."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within this context stdout and stderr discard what they cannot write.

    So a closed terminal or pipe or a full disk does not end a run, nor does a character that the
    stream's encoding lacks, which is replaced. Streams that are not files (as in tests) are left
    unchanged.
    """
    # If a standard stream is closed, the next opened file would get its descriptor and receive
    # what libraries print. Open the null device on these descriptors instead.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    out, err = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    """Wrap a stream around a LastingFile; None: the stream was closed at the start."""
    if stream is None:
        return io.TextIOWrapper(LastingFile(descriptor, "w", closefd=False), write_through=True)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO):
        return stream
    with suppress(OSError):
        stream.flush()
    file = LastingFile(raw.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        file if stream.buffer is raw else io.BufferedWriter(file),  # raw: python -u
        encoding=stream.encoding,
        errors="replace" if stream.errors in ("strict", "surrogateescape") else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def one_line(message: str) -> str:
    """The message with line ends and other characters that cannot be printed as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


class LastingFile(io.FileIO):
    """A file whose write never fails; it discards what cannot be written."""

    def write(self, data: Any) -> int:
        """Write or discard data; returns the number of bytes consumed."""
        written: int | None = None  # FileIO returns None for a full non-blocking pipe
        with suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written
