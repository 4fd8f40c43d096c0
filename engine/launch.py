"""What torchrun tells a process, and how one of several ends; without torch."""

import os
import sys
from typing import NoReturn

# The variables in which torchrun describes a process to itself.
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def local_rank() -> int | None:
    """This process's number on its machine, where torchrun has started it among others."""
    values = [os.environ.get(name, "") for name in LAUNCH]
    if not all(values) or not all(value.isdigit() for value in values[:3]):
        return None
    return int(os.environ["LOCAL_RANK"]) if int(os.environ["WORLD_SIZE"]) > 1 else None


def is_follower() -> bool:
    """Another process, rank 0, speaks for this one."""
    return local_rank() is not None and os.environ["RANK"] != "0"


def leave(code: int) -> NoReturn:
    """End the program.

    Of several processes each ends without taking the interpreter down: gloo's threads may still
    hold tensors then, and now and then abort a process that has done all it had to
    (github.com/pytorch/pytorch/pull/179291 tells why).
    """
    if local_rank() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
