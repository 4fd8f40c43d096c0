"""The project installed by pip -e, and used from another folder."""

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from test_ideas import copy_project


def test_everything_is_installed() -> None:
    """Each module and package at the top is listed, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["py-modules"]
    assert modules == sorted(path.stem for path in ROOT.glob("*.py"))
    outside = {"tests", "benchmarks"}
    for folder in {path.parent for path in ROOT.glob("*/*.py")}:
        assert (folder / "__init__.py").exists() == (folder.name not in outside), folder


def test_the_python_api_from_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    copy_project(project)
    (project / "requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    # What is installed here is there, too.
    own = venv / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (own / "outer.pth").write_text(sysconfig.get_path("purelib"))
    python = str(venv / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    flags = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-e", str(project)]
    installed = subprocess.run([*pip, *flags], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    elsewhere.mkdir()
    code = (
        "import awd_lstm, engine.checkpoint as c, kernels.choose, training.trainer\n"
        "from data.corpus import Vocabulary\n"
        "from model import RNNModel\n"
        "model, words = RNNModel('LSTM', 3, 4, 5, 1), Vocabulary(['a', 'b', '<eos>'])\n"
        "c.write_checkpoint(c.Path('m.pt'), c.model_payload(model, words))\n"
        "print(awd_lstm.__file__, awd_lstm.load('m.pt').score('a b').tokens)"
    )
    command = [python, "-I", "-c", code]
    used = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert used.stdout == f"{project / 'awd_lstm.py'} 3\n", used.stderr
