"""Runs a program; turns errors that a user can cause into one line and an exit code."""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import MutableMapping, Sequence

from data.errors import DataError, WriteError
from data.files import FULL
from engine.errors import PeerError, RunError, UsageError
from engine.launch import end_with_agent, is_follower
from engine.output import lasting_output, one_line
from engine.tracking import warn

# Spin iterations of libgomp's idle threads before they sleep: about 10 microseconds, as long as the
# pauses in an LSTM's time loop, and short enough for programs that share cores
# (benchmarks/threads.py). libgomp's default is 300,000.
SPIN_COUNT = "500"
# Work space of cuBLAS in buffers of one size. With two sizes, its default, cuDNN's recurrent layers
# take whichever is free, and need not give the same numbers twice.
CUBLAS_WORKSPACE = ":4096:8"
# What OpenMP, numpy's OpenBLAS and torch's MKL read as they are loaded.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_program(name: str, argv: Sequence[str] | None, parse: str | None = None) -> int:
    """Import a program and run it; print an error that a user can cause as one line on stderr.

    Args:
        name: module with a function `run` that takes the command line.
        argv: the command line; None: this process's.
        parse: MODULE.FUNCTION that parses the command line without torch: it is called before the
            program is imported, so that --help and a mistyped flag need neither torch nor time,
            and the libraries that compute start no more threads than --threads.

    Returns:
        The exit code: 0 for success, 2 for an invalid flag or value, 1 for any other error.
    """
    share_cores(os.environ)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    end_with_agent()
    # A masked weight is never part of cuDNN's flat buffer: torch copies it, as intended.
    warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
    with lasting_output():
        return _run(name, sys.argv[1:] if argv is None else argv, parse)


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Set libgomp's spin count, unless the user has set one; call it before torch is imported."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


def _run(name: str, argv: Sequence[str], parse: str | None) -> int:
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see engine.launch.leave
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if parse is not None:
            module, _, function = parse.rpartition(".")
            parsed = getattr(importlib.import_module(module), function)(argv)
            args = parsed[0] if isinstance(parsed, tuple) else parsed
            if args.threads is not None:
                os.environ.update(dict.fromkeys(THREADS, str(args.threads)))
        program = importlib.import_module(name)
        warn_if_busy()
        program.run(argv)
    except UsageError as error:
        return _fail(str(error), 2)
    except PeerError as error:
        print(f"error: rank {os.environ.get('RANK', 0)}: {one_line(str(error))}", file=sys.stderr)
        return 1
    except (DataError, RunError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; pip install -r requirements.txt does it")
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        where = "GPU's memory" if type(error).__name__ == "OutOfMemoryError" else "memory"
        return _fail(
            f"the {where} is too small; a smaller model, --batch-size or --bptt needs less"
        )
    except WriteError as error:
        full = error.errno in FULL
        way_on = "; nothing was lost, and with more room the same command goes on"
        return _fail(f"{error}{way_on if full else ''}")
    except UnicodeEncodeError as error:
        if error.encoding == "utf-8":
            raise
        cause = f"the locale's encoding, {error.encoding}, cannot name this file"
        return _fail(f"{error.object}: {cause}; PYTHONUTF8=1 does")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}")
    return 0


def warn_if_busy() -> None:
    """Warn if more processes want to run on this machine than it has cores."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except OSError:
        return
    if load > cores and not is_follower():
        warn(
            f"the machine is busy (load average {load:.1f} on {cores} cores): times will be longer"
        )


def is_memory(error: Exception) -> bool:
    """True if memory was too small; on a CPU torch raises a plain RuntimeError for that."""
    known = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    special = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return special or any(words in str(error) for words in known)


def _fail(message: str, code: int = 1) -> int:
    if not is_follower():
        print(f"error: {one_line(message)}", file=sys.stderr)
    return code
