"""Processes started by torchrun: rank and exit. Does not import torch."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

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
    pr_set_pdeathsig = 1  # its number in linux/prctl.h
    if local_rank() is not None:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """Exit with a code.

    With several processes this skips the interpreter's shutdown, in which gloo's threads may still
    hold tensors and sometimes abort the process (github.com/pytorch/pytorch/pull/179291).
    """
    if local_rank() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
