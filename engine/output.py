"""Standard output that outlives its terminal."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


@contextmanager
def lasting_output() -> Iterator[None]:
    """While this lasts, printing fails neither where a terminal or a pipe goes away nor on a full
    disk: what cannot be written is lost.

    Streams that are no files (those of tests) are left as they are.
    """
    # The number of a stream that is closed would go to the next file that is opened, and with it
    # whatever a library prints there.
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
    """The same stream by a LastingFile; stream is None where it was closed from the start."""
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
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class LastingFile(io.FileIO):
    """A file that takes whatever is written, also where it cannot be."""

    def write(self, data: Any) -> int:
        """Write, or lose it; returns how many bytes are dealt with."""
        written: int | None = None  # of a pipe that is full, and not to be waited for
        with suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written
