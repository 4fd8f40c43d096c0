"""benchmarks/on_gpu.sh without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = call(tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {sys.executable} sees no GPU on this machine; everything here wants one\n"
    )
    assert not (tmp_path / "out").exists()
    assert call().returncode == 2
