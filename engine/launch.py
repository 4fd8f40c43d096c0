"""How a process begins and ends, also one of several that torchrun started.

Imports next to nothing, since Ctrl-C before `leave` is called ends in a traceback.
"""

import os
import signal
import sys
from collections.abc import Callable

# Environment variables that torchrun sets.
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def local_rank() -> int | None:
    """This process's number on its machine; None unless torchrun started several processes."""
    values = [os.environ.get(name, "") for name in LAUNCH]
    if not all(values) or not all(value.isdigit() for value in values[:3]):
        return None
    return int(os.environ["LOCAL_RANK"]) if int(os.environ["WORLD_SIZE"]) > 1 else None


def is_follower() -> bool:
    """True if this process is not rank 0, which alone prints and writes."""
    return local_rank() is not None and os.environ["RANK"] != "0"


def end_with_agent() -> None:
    """Let Linux send this process SIGTERM when torchrun's agent, its parent, is killed.

    Else the processes would train on, and hold the run's lock against those that torchrun starts
    next. No-op for a process that torchrun has not started.
    """
    if local_rank() is None:
        return
    import ctypes
    from contextlib import suppress

    pr_set_pdeathsig = 1  # its number in linux/prctl.h
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def leave(program: Callable[[], int]) -> None:
    """Run a program and exit with the code that it returns.

    Until it handles Ctrl-C itself (engine.program.run_program), which it cannot before its modules
    are imported, Ctrl-C ends the process at once, without a traceback.

    With several processes this skips the interpreter's shutdown, in which gloo's threads may still
    hold tensors and sometimes abort the process (github.com/pytorch/pytorch/pull/179291).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = program()
    if local_rank() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
