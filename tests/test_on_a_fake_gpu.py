"""All of a GPU's update is on the GPU, and nothing waits for it: on one that is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch knows real GPUs")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_an_update_stays_on_the_gpu(tmp_path: Path) -> None:
    library = tmp_path / "fake_gpu.so"
    options = ["-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in include_paths())]
    for path in library_paths():
        options += [f"-L{path}", f"-Wl,-rpath,{path}"]
    source = HERE / "fake_gpu.cpp"
    command = ["c++", *options, str(source), "-o", str(library), "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    done = subprocess.run(
        [sys.executable, str(HERE / "on_fake_gpu.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "evaluation"
