"""main.py: what it prints and writes, its dry run, and the original's commands."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REAL_DATA, ROOT, TINY, Result, read_events, read_summary, write_corpus
from original import COMMANDS, CUT_SHORT, WORD_LEVEL

import assembly
import training.requests
import training.state
from data.corpus import load_corpus
from engine.checkpoint import load_model
from engine.checkpoint_writer import CheckpointWriter
from evaluation.evaluate import evaluate
from evaluation.plain import Plain
from flags.training import parse_training, settle_scheme
from kernels.lstm_cpu import can_pack
from model import count_parameters
from programs.plan import memory_needed, steps_per_epoch
from training.update import Updater

Run = Callable[..., Result]


def test_a_run_writes_what_the_contract_says(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    save = tmp_path / "run.pt"
    result = run(*TINY, "--data", corpus_folder, "--save", save, "--epochs", 2, "--samples", 2)
    assert result.code == 0
    lines = result.out.splitlines()
    number = r" *\d+\.\d\d"
    bits = r" *\d+\.\d{3}"
    epoch = rf"\| end of epoch   \d \| time:{number}s \| valid loss{number} \| valid ppl{number} "
    epochs = [line for line in lines if re.fullmatch(epoch + rf"\| valid bpc{bits}", line)]
    assert len(epochs) == 2
    end = rf"\| End of training \| test loss{number} \| test ppl{number} \| test bpc{bits}"
    assert re.fullmatch(end, lines[-3])
    assert all(line.startswith("| It writes: w") for line in lines[-2:])
    assert re.search(
        rf"^\| epoch   1 \|     3/ +\d+ batches \| lr 2.00000 \| ms/batch{number} "
        rf"\| loss{number} \| ppl{number} \| bpc{bits}$",
        result.err,
        re.MULTILINE,
    )

    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} >= {
        "last.pt", "metrics.jsonl", "config.json", "summary.json",
    }  # fmt: skip
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "train": "step epoch loss ppl lr grad_norm tokens_per_second seconds",
        "valid": "step epoch loss ppl averaged seconds",
        "test": "step loss ppl bpc",
    }
    assert {event["event"] for event in events} == set(keys)
    for event in events:
        assert set(event) == {"event", *keys[event["event"]].split()}
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["nhid"] == 8
    assert config["argv"][:2] == ["--emsize", "6"]
    assert config["versions"]["torch"] == torch.__version__
    summary = json.loads((folder / "summary.json").read_text())
    valid = [event["ppl"] for event in events if event["event"] == "valid"]
    assert summary["best_valid_ppl"] == min(valid)
    assert summary["test_ppl"] == events[-1]["ppl"]
    assert summary["best_epoch"] == valid.index(min(valid)) + 1
    assert summary["epochs"] == 2
    assert summary["diverged"] is False
    assert summary["parameters"] == sum(p.numel() for p in load_model(save)[0].parameters())
    assert summary["peak_memory_bytes"] > 1e7
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0


def test_where_the_time_goes(
    run: Run, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock at which an update takes 25 s, a validation 10 and a file 100, and nothing else.

    A checkpoint is due a minute after the one before was written, so after each third update.
    """
    now, written = [0.0], list[tuple[int, int]]()

    def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            now[0] += seconds
            return work(*args, **keywords)

        return timed

    def write(self: CheckpointWriter, path: Path, payload: dict[str, Any], *_: object) -> None:
        if path.name == "last.pt":
            written.append((payload["position"]["epoch"], payload["position"]["batch"]))
        write_file(self, path, payload)

    write_file = CheckpointWriter.write
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(training.state, "time", clock)
    monkeypatch.setattr(training.requests, "time", clock)
    monkeypatch.setattr(Updater, "__call__", taking(25, Updater.__call__))
    monkeypatch.setattr("training.evaluated_model.evaluate", taking(10, evaluate))
    monkeypatch.setattr(CheckpointWriter, "write", taking(100, write))
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--epochs", 2]
    result = run(*flags, "--bptt-scheme", "fixed", "--checkpoint-minutes", 1, "--log-interval", 1)
    assert result.code == 0, result.err

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    first, second = (line["step"] for line in events if line["event"] == "valid")
    assert first == second - first > 6
    due = list(range(3, first, 3))
    assert written == [(1, batch) for batch in due] + [(2, 0)] + [(2, b) for b in due] + [(3, 0)]
    speeds = [line["tokens_per_second"] for line in events if line["event"] == "train"]
    assert speeds[: first - 1] == pytest.approx([40 / 25] * (first - 1))
    assert re.findall(r"ms/batch (\S+)", result.err) == ["25000.00"] * second
    times = [line["seconds"] for line in events if line["event"] == "train"]
    assert times[: first - 1] == [25 * n + 100 * ((n - 1) // 3) for n in range(1, first)]
    took = 25 * first + 10 + 100 * len(due)  # what comes after a validation is the next epoch's
    assert re.findall(r"time: (\S+)s", result.out)[0] == f"{took:.2f}"
    words = (corpus_folder / "train.txt").read_text().replace("\n", " <eos> ").split()
    summary = read_summary(tmp_path / "run.pt")
    tokens = 2 * (len(words) // 4 - 1) * 4
    assert summary["tokens_per_second"] == pytest.approx(tokens / (25 * second))
    validated = [line for line in events if line["event"] == "valid"]
    assert validated[0]["seconds"] == pytest.approx(took)
    best = [line["ppl"] for line in validated]
    files = len(written) + (2 if best[1] < best[0] else 1)
    assert summary["seconds"] == pytest.approx(25 * second + 20 + 100 * files)


def test_what_is_printed_last(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    """An epoch that is cut short is not called ended; the end of training is the last line."""
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates", 2]
    result = run(*flags, "--bigram")
    assert "| within epoch   1 | time" in result.out
    assert "end of epoch" not in result.out
    bigram, last = result.out.splitlines()[-2:]
    assert "| Interpolated bigram model of the same text | test ppl " in bigram
    assert last.startswith("| End of training | test loss")


def test_an_earlier_run_is_kept(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates"]
    assert run(*flags, 1).err.count("warning") == 0
    first = (tmp_path / "run.pt").read_bytes()
    result = run(*flags, 2)
    assert f"warning: the run that was in {tmp_path / 'run'} is now in" in result.err
    run(*flags, 3)
    assert (tmp_path / "run.1.pt").read_bytes() == first
    assert json.loads((tmp_path / "run.2" / "summary.json").read_text())["updates"] == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 3


def test_adam_with_a_learning_rate_of_sgd_warns(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates", 1]
    warning = "warning: --optimizer adam with --lr 30, which is a learning rate for sgd"
    assert warning in run(*flags, "--optimizer", "adam", "--lr", 30).err
    assert "warning: --opt" not in run(*flags, "--optimizer", "adam", "--lr", 0.01).err


def test_dry_run_says_what_it_would_do_and_writes_nothing(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--epochs", 7]
    result = run(*flags, "--dry-run", "--precision", "fp32")
    assert (result.code, result.err) == (0, "")
    for what in ("tokens", "vocabulary", "parameters", "updates per epoch", "memory"):
        assert f"| {what} " in result.out
    forecast = r"an epoch \(.* validation\), .* for 7 epochs and the test; [\d,]+ MiB at the peak"
    assert re.search(rf"\| fp32 .*{forecast}", result.out)
    assert "bf16" not in result.out
    both = run(*flags, "--dry-run", "--bptt-scheme", "full")
    assert bool(re.search(rf"--precision bf16 .*{forecast}", both.out)) == can_pack(torch.bfloat16)
    # Callbacks log, here of each update.
    logging = ("--diagnostics", 1, "--loss-scale", "dynamic", "--loss-scale-window", 1)
    assert run(*flags, "--dry-run", "--precision", "fp32", *logging).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.slow
def test_a_forecast_comes_true(tmp_path: Path) -> None:
    """Time within a factor of two, as machines are busy at times, and memory within a fifth."""
    corpus = write_corpus(tmp_path / "corpus", lines=20_000, words=2000)
    flags = [
        *("--data", corpus, "--save", tmp_path / "run.pt", "--epochs", 2, "--batch-size", 20),
        *("--emsize", 150, "--nhid", 200, "--test-batch-size", 10, "--device", "cpu"),
    ]
    command = [sys.executable, str(ROOT / "main.py"), *map(str, flags)]
    plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
    subprocess.run(command, capture_output=True, check=True)
    found = re.search(r"\| fp32 .*, ([\d.]+) (s|min) for 2 epochs.*; ([\d,]+) MiB", plan.stdout)
    assert found is not None
    seconds = float(found[1]) * {"s": 1, "min": 60}[found[2]]
    summary = read_summary(tmp_path / "run.pt")
    assert seconds == pytest.approx(summary["seconds"], rel=1.0)
    peak = float(found[3].replace(",", "")) * 2**20
    assert peak == pytest.approx(summary["peak_memory_bytes"], rel=0.2)


def planned(corpus_folder: Path, *flags: object, devices: int = 1) -> tuple[int, int, int]:
    """Updates of an epoch, bytes of an update and parameters of the model."""
    corpus = load_corpus(corpus_folder)
    args, _ = parse_training([str(flag) for flag in [*TINY, "--data", corpus_folder, *flags]])
    settle_scheme(args)
    with torch.device("meta"):
        model = assembly.build_model(args, len(corpus.vocabulary))
    updates = assembly.build_scheme(args).expected_windows(steps_per_epoch(args, corpus))
    return round(updates), memory_needed(args, model, corpus, devices), count_parameters(model)


def test_updates_and_memory_of_the_schemes(corpus_folder: Path) -> None:
    def plan(*flags: object) -> tuple[int, int]:
        return planned(corpus_folder, "--emsize", 60, "--nhid", 90, *flags)[:2]

    words = (corpus_folder / "train.txt").read_text().replace("\n", " <eos> ").split()
    steps = len(words) // 4 - 1
    assert steps > 100
    updates, memory = plan("--bptt-scheme", "fixed", "--bptt", 20)
    assert updates == math.ceil(steps / 20)
    assert plan("--bptt-scheme", "fixed", "--bptt", 20, "--k1", 5)[0] == math.ceil(steps / 5)
    assert plan("--bptt-scheme", "fixed", "--bptt", 20, "--k1", 40) == (
        math.ceil(steps / 40),
        memory,
    )
    randomized = plan("--bptt-scheme", "randomized", "--bptt", 20, "--keep-prob", 0.75)
    assert randomized[0] == round(1 + (steps - 1) // 20 / 4)
    full = plan("--bptt-scheme", "full", "--bptt", 20)
    assert full[0] == 1
    assert memory <= full[1] < randomized[1]
    assert plan("--bptt-scheme", "full", "--bptt", 9999)[1] > 1.5 * memory


def test_what_the_optimizer_keeps_is_counted(corpus_folder: Path) -> None:
    """Beside weights and gradients: nothing, the average, or Adam's two moments.

    Of several devices, on each.
    """

    def needed(*flags: str, devices: int = 1) -> int:
        _, memory, parameters = planned(corpus_folder, *flags, devices=devices)
        assert parameters == weights
        return memory

    weights = 31 * (6 + 1) + 4 * 8 * (6 + 8 + 2) + 4 * 6 * (8 + 6 + 2)
    plain = needed("--no-asgd")
    assert needed() - plain == 4 * weights
    for flags in (["--optimizer", "adam"], ["--optimizer", "adam", "--no-asgd"]):
        assert needed(*flags) - plain == 2 * 4 * weights
    assert needed(devices=2) == needed("--batch-size", "2") < needed()


@pytest.mark.parametrize("scheme", ["variable", "full"])
def test_quick_writes_all_files_of_a_part_of_the_text(
    run: Run, tmp_path: Path, scheme: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus", lines=2000)
    flags = [*TINY, "--data", corpus, "--save", tmp_path / "run.pt", "--bptt-scheme", scheme]
    result = run(*flags, "--lr", 0.1, "--quick")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1].endswith(" | --quick: of a part of the text")
    assert (tmp_path / "run.pt").exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "last.pt", "metrics.jsonl", "config.json", "summary.json",
    }  # fmt: skip
    summary = read_summary(tmp_path / "run.pt")
    assert (summary["updates"], summary["diverged"]) == (3, False)
    assert "of the first words of each text" in summary["quick"]
    text = load_corpus(corpus).test[: 3 * 10 + 1]  # three windows of --bptt 10, of one column
    loss = evaluate(Plain(load_model(tmp_path / "run.pt")[0]), text, 1)
    events = [e for e in read_events(tmp_path / "run.pt") if e["event"] == "test"]
    assert events[0]["loss"] == pytest.approx(loss)
    assert "| finished: 3 updates are done" in run("--resume", tmp_path / "run.pt").err


SMALL = ["--emsize", "16", "--nhid", "16", "--device", "cpu", "--test-batch-size", "50"]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no corpora in {REAL_DATA}")
@pytest.mark.parametrize(
    ("command", "size"),
    [
        (WORD_LEVEL[0], SMALL),
        pytest.param(WORD_LEVEL[0], [], marks=pytest.mark.slow),
        pytest.param(WORD_LEVEL[1], [], marks=pytest.mark.slow),
    ],
    ids=["penn, small", "penn", "wikitext-2"],
)
def test_commands_of_the_original_run(command: str, size: list[str], tmp_path: Path) -> None:
    """As they stand, cut short, on the real corpora."""
    (tmp_path / "data").symlink_to(REAL_DATA.resolve())
    argv = [sys.executable, str(ROOT / "main.py"), *command.split(), *size, "--max-updates", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() if not size else 1)}
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("| End of training | test loss")


@pytest.mark.parametrize(
    "size", [SMALL[:4], pytest.param([], marks=pytest.mark.slow)], ids=["small", "as it stands"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_the_original_follow_each_other(
    name: str, size: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for the corpus, where --data points; what they start from stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    write_corpus(tmp_path / "data" / name, lines=250)
    saved: dict[Path, bytes] = {}
    for command in COMMANDS[name]:
        program, *argv = command.split()
        argv += [*(size if program == "main.py" else []), *CUT_SHORT.get(program, [])]
        assert importlib.import_module(program.removesuffix(".py")).main(argv) == 0, command
        assert {path: path.read_bytes() for path in saved} == saved
        saved = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}


def test_parameters_of_the_papers_model() -> None:
    args, _ = parse_training(WORD_LEVEL[0].split())
    assert sum(p.numel() for p in assembly.build_model(args, 10_000).parameters()) == 24_221_600


@pytest.mark.parametrize(
    ("module", "code", "printed"),
    [("engine.program", -signal.SIGINT, ""), ("torch", 1, "error: interrupted\n")],
)
def test_control_c_during_imports_leaves_no_traceback(module: str, code: int, printed: str) -> None:
    program = (
        "import builtins, os, runpy, signal, sys\n"
        "load = builtins.__import__\n"
        "def interrupt(name, *rest):\n"
        f"    if name == {module!r}:\n"
        "        builtins.__import__ = load\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = interrupt\n"
        "sys.argv = ['main.py', '--quick']\n"
        "runpy.run_path('main.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", printed)
