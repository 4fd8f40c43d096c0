"""The project installed by pip -e, and used from another folder."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from test_ideas import copy_project

LOCK = (ROOT / "requirements.lock").read_text()


def test_everything_is_installed() -> None:
    """Each module and package at the top is listed, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["py-modules"]
    assert modules == sorted(path.stem for path in ROOT.glob("*.py"))
    outside = {"tests", "benchmarks"}
    for folder in {path.parent for path in ROOT.glob("*/*.py")}:
        assert (folder / "__init__.py").exists() == (folder.name not in outside), folder


def test_the_lock_has_the_pinned_versions() -> None:
    locked = dict(
        re.findall(r"^([a-z0-9-]+)==(\S+)(?:.*) \\\n    --hash=sha256:[0-9a-f]{64}", LOCK, re.M)
    )
    for name in ("requirements.txt", "requirements-dev.txt"):
        pins = re.findall(r"^(\S+)==(\S+)$", (ROOT / name).read_text(), re.M)
        assert pins
        assert [(package, locked.get(package)) for package, _ in pins] == pins


@pytest.mark.slow
def test_the_python_api_from_another_folder(tmp_path: Path) -> None:
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
