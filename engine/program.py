"""How programs end: a line and an exit code for whatever a user can cause."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

import torch

from data.errors import DataError
from engine.errors import PeerError, RunError, UsageError
from engine.ranks import is_follower


def run_program(program: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Run a program's body; turn what a user can cause into one line on stderr.

    It goes on where stdout or stderr are closed, or go away: see lasting_output.

    Returns:
        The exit code: 0 done, 2 a flag or value that cannot be, 1 anything else.
    """
    with lasting_output():
        return _run(program, argv)


def _run(program: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    try:
        program(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return _fail(str(error), 2)
    except PeerError as error:
        print(f"error: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr)
        return 1
    except (DataError, RunError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        where = "GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return _fail(
            f"the {where} is too small; a smaller model, --batch-size or --bptt needs less"
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}")
    return 0


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


def _is_memory(error: Exception) -> bool:
    """A tensor did not fit; on a CPU torch says so in a RuntimeError like any other."""
    known = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    special = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return special or any(words in str(error) for words in known)


def _fail(message: str, code: int = 1) -> int:
    if not is_follower():
        print(f"error: {message}", file=sys.stderr)
    return code
