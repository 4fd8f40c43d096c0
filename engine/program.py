"""How programs start and end: a line and an exit code for whatever a user can cause."""

import importlib
import os
import sys
import warnings
from collections.abc import MutableMapping, Sequence

from data.errors import DataError
from engine.errors import PeerError, RunError, UsageError
from engine.launch import is_follower
from engine.output import lasting_output

# How often one of libgomp's threads looks for work before it sleeps: some 10 microseconds, as long
# as the pauses in an LSTM's time loop, and short enough that programs that share cores do not keep
# each other waiting (benchmarks/threads.py). libgomp's own number is 300,000.
SPIN_COUNT = "500"


def run_program(name: str, argv: Sequence[str] | None) -> int:
    """Import a program and run it; turn what a user can cause into one line on stderr.

    It goes on where stdout or stderr are closed, or go away: see lasting_output.

    Args:
        name: module whose `run` takes the command line.
        argv: the command line; None: this process's own.

    Returns:
        The exit code: 0 done, 2 a flag or value that cannot be, 1 anything else.
    """
    share_cores(os.environ)
    # A masked weight is never part of cuDNN's flat buffer: the copy it warns of is intended.
    warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
    with lasting_output():
        return _run(name, sys.argv[1:] if argv is None else argv)


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Let libgomp's threads spin for SPIN_COUNT only, unless the user has chosen otherwise.

    libgomp reads this when torch is loaded.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


def _run(name: str, argv: Sequence[str]) -> int:
    try:
        importlib.import_module(name).run(argv)
    except UsageError as error:
        return _fail(str(error), 2)
    except PeerError as error:
        print(f"error: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr)
        return 1
    except (DataError, RunError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; pip install -r requirements.txt does it")
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        where = "GPU's memory" if type(error).__name__ == "OutOfMemoryError" else "memory"
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
    special = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return special or any(words in str(error) for words in known)


def _fail(message: str, code: int = 1) -> int:
    if not is_follower():
        print(f"error: {message}", file=sys.stderr)
    return code
