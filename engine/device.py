"""The device of a run: its choice and its memory."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

from engine.errors import UsageError


def select_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device named by --device.

    Args:
        name: auto, cpu, cuda or cuda:N.
        local_rank: rank of this process on its machine under torchrun; selects the GPU.

    Raises:
        UsageError: another name, or this machine has no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"argument --device: {name!r} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"argument --device: {name!r}: PyTorch sees no CUDA device here")
        if (device.index or 0) >= torch.cuda.device_count():
            number = torch.cuda.device_count()
            raise UsageError(f"argument --device: {name!r}: this machine has {number} CUDA devices")
    return device


def use_threads(number: int | None) -> None:
    """Compute with this many CPU threads (None: as many as torch chose)."""
    if number is not None:
        torch.set_num_threads(number)


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep the memory of freed tensors.

    By default it returns large blocks to the system at once; the page faults of the next update's
    tensors then take a quarter of a CPU's time.

    Returns:
        False if the C library is not glibc.
    """
    trim_threshold, mmap_max = -1, -4  # their numbers in glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def release_freed_memory() -> bool:
    """Return the memory of freed tensors to the system; False if the C library is not glibc.

    Between training and evaluation, whose tensors differ in size: each would find the other's
    memory in pieces that do not fit, and take more.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def reset_peak_memory(device: torch.device) -> bool:
    """Return free memory to the system, so that peak_memory counts from here on.

    Returns:
        False if the system cannot do that: the peak remains that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.init()  # before it there are no statistics to reset, which is an error
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if not release_freed_memory():
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes VmRSS
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, bytes: torch's on a GPU, or resident in the process on a CPU.

    Torch's is what its allocator holds. A graph's memory is a part of that which no tensor has
    between its capture and its replays.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):  # which a sandbox's kernel may lack
            return int(line.split()[1]) * 1024
    # Not on Linux, where it includes the peak of the parent process.
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: a GPU's free memory, or a CPU's without swapping.

    On Linux the kernel's MemAvailable within a container's limit; elsewhere the physical memory.
    """
    if device.type == "cuda":
        torch.cuda.init()
        return int(torch.cuda.mem_get_info(device)[0])
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    information, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if information.exists():
        lines = information.read_text().splitlines()
        amounts += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        amounts.append(int(text))
    return min(amounts)
