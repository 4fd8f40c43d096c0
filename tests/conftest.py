"""What several tests need: small corpora, and the programs run in this process."""

import io
import json
import os
import random
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

# Tiny models gain nothing from a second thread, and lose much where the cores are shared. Before
# torch is imported, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where a program asks for several
# Without it cuDNN's recurrent layers need not give the same twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from cudnn_on_cpu import cudnn_on_cpu

import data.files
import engine.metrics_file
import main
from engine.checkpoint import load_model

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("AWD_DATA", ROOT.parent / "shared" / "data"))

TINY = shlex.split(
    "--emsize 6 --nhid 8 --nlayers 2 --batch-size 4 --bptt 10 --lr 2 --eval-batch-size 3 "
    "--dropout 0.2 --dropouth 0.15 --dropouti 0.2 --dropoute 0.05 --wdrop 0.3 --seed 7 "
    "--log-interval 3 --device cpu"
)

MEASURED = {"tokens_per_second", "seconds"}  # fields that differ from run to run


class Result(NamedTuple):
    code: int
    out: str
    err: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):  # masked weights are meant not to be
            expected = "ignore:RNN module weights are not part of single"
            item.add_marker(pytest.mark.filterwarnings(expected))


@pytest.fixture(autouse=True)
def _fresh_random_state() -> Iterator[None]:
    """Each test starts from the same random state, and leaves the one it found."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(autouse=True, scope="session")
def _no_ignored_hangup() -> Iterator[None]:
    """SIGHUP acts as usual, also where the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program warns that the machine is busy, or leaves its number of threads to the next;
    updates are not timed for long."""
    monkeypatch.setattr("engine.program.THREADS", ())
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("training.rehearsal.LEAST_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """A GPU's products of float32 are IEEE's, unless a test or a program says otherwise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def with_cudnn() -> Iterator[None]:
    """cuDNN's LSTM is there, on a CPU, too."""
    with cudnn_on_cpu():
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run main.py in this process: run("--data", …) -> (exit code, stdout, stderr)."""

    threads = torch.get_num_threads()

    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = main.main([str(arg) for arg in argv])
        torch.set_num_threads(threads)  # --threads is the process's
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a program in this process: call(evaluate, "PTB.pt", …) -> (exit code, stdout, stderr)."""

    def run_program(program: ModuleType, *argv: object) -> Result:
        capsys.readouterr()
        code = program.main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run_program


def full_disk_under(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No file of this name can be written, as the kernel has it of a full disk."""

    def fill(file: io.FileIO, path: Path) -> None:
        if path.name == name or path.name.startswith(f".{name}."):
            with Path("/dev/full").open("wb") as full:
                os.dup2(full.fileno(), file.fileno())
            file.truncate = int  # type: ignore  # it cannot

    class Counting(data.files._CountingFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            fill(self, path)

    class Plain(io.FileIO):
        def __init__(self, path: Path, mode: str) -> None:
            super().__init__(path, mode)
            fill(self, path)

    monkeypatch.setattr(data.files, "_CountingFile", Counting)
    monkeypatch.setattr(engine.metrics_file, "FileIO", Plain)


def write_corpus(folder: Path, lines: int = 60, seed: int = 0, words: int = 30) -> Path:
    """A corpus of sentences with some structure: each word suggests the next."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for split, share in (("train", 1.0), ("valid", 0.3), ("test", 0.3)):
        text = []
        for _ in range(int(lines * share)):
            word = draw.randrange(words)
            sentence = []
            for _ in range(draw.randint(3, 9)):
                sentence.append(f"w{word}")
                word = (word * 7 + draw.choice((1, 1, 1, 3))) % words
            text.append(" " + " ".join(sentence) + " \n")
        (folder / f"{split}.txt").write_text("".join(text))
    return folder


def command_line(flags: dict[str, Any]) -> list[str]:
    """Flags by their names; True: a switch that is given; False, None: not given."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value]
            argv += [f"--{name}", *([] if value is True else map(str, values))]
    return argv


def read_events(save: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run, by its best model or its folder, without times."""
    lines = (save.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def read_summary(save: Path) -> dict[str, Any]:
    """The run's summary.json."""
    summary: dict[str, Any] = json.loads((save.with_suffix("") / "summary.json").read_text())
    return summary


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model, a tied matrix once, by the names of plain layers."""
    model, _ = load_model(path)
    return {
        name.replace(".module.", ".").removesuffix("_raw"): weight.detach()
        for name, weight in model.named_parameters()
    }


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Flags of two epochs on a small corpus; averaging starts within them."""
    corpus = write_corpus(tmp_path / "corpus", lines=120)
    return [*TINY, "--data", str(corpus), "--epochs", "2", "--nonmono", "0"]


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")
