"""How programs end: a line and an exit code for whatever a user can cause."""

import os
import sys
from collections.abc import Callable, Sequence

import torch

from data.errors import DataError
from engine.errors import PeerError, RunError, UsageError
from engine.ranks import is_follower


def run_program(program: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Run a program's body; turn what a user can cause into one line on stderr.

    Returns:
        The exit code: 0 done, 2 a flag or value that cannot be, 1 anything else.
    """
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


def _is_memory(error: Exception) -> bool:
    """A tensor did not fit; on a CPU torch says so in a RuntimeError like any other."""
    known = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    special = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return special or any(words in str(error) for words in known)


def _fail(message: str, code: int = 1) -> int:
    if not is_follower():
        print(f"error: {message}", file=sys.stderr)
    return code
