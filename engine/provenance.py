"""Versions and commit, for config.json."""

import platform
import subprocess
from pathlib import Path

import numpy as np
import torch


def versions() -> dict[str, str]:
    """Versions of Python, torch, numpy and, on a GPU, CUDA and cuDNN."""
    found = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def cpu_name() -> str:
    """The CPU's model, as the system names it; its architecture if it does not."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_name(device: torch.device) -> str | None:
    """The GPU's model; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def git_commit() -> str | None:
    """The code's commit, with "-dirty" if tracked files differ from it; None outside git."""
    folder = Path(__file__).resolve().parent

    def git(*command: str) -> str:
        result = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        return result.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if dirty else "")
