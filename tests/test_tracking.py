"""metrics.jsonl, the progress display and Weights & Biases, against the real SDK offline."""

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, TINY, read_summary, write_corpus
from forked import Child

from engine.ablation.tracked import log_table
from engine.metrics_file import MetricsFile
from engine.tracking import Tracker, WandbOptions, sync_command


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_python(code: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, as W&B's hooks and exit handlers need."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# metrics.jsonl


def test_lines_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "old"}\n')
    file = MetricsFile(path)
    written = []
    for number in (0.5, float("nan"), float("inf"), float("-inf")):
        file.write({"event": "train", "loss": number, "averaged": False})
        finite = number if number == 0.5 else None
        written.append({"event": "train", "loss": finite, "averaged": False})
        assert read_lines(path) == written
        assert file.size == path.stat().st_size
    with pytest.raises(TypeError, match="Tensor"):
        file.write({"loss": torch.tensor(1.0)})
    assert read_lines(path) == written
    file.close()
    file.close()


# the terminal

EPOCH = """
import sys
from engine.progress import Progress
from engine.tracking import warn
for epoch in (1, 2):
    with Progress(9, 4, f"epoch {epoch}", "update", timed=False) as progress:
        for _ in range(6):  # one more than was expected
            progress.update(note="loss=4.00")
        warn("careful,\\n  please")
    print("| result |", flush=True)
"""


def read_terminal(terminal: int) -> str:
    """What a process shows on its terminal, until it ends."""
    shown = b""
    with suppress(OSError):  # the other end was closed
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    return shown.decode()


def on_a_terminal(code: str, columns: int = 80) -> tuple[str, str]:
    """(stdout, stderr) of a script whose stderr is a terminal and whose stdout is a pipe."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
    ) as process:
        os.close(slave)
        shown = read_terminal(master)
        assert process.stdout is not None
        printed = process.stdout.read().decode()
    assert process.returncode == 0, shown
    return printed, shown


@pytest.mark.parametrize("columns", [80, 0])
def test_a_bar_on_a_terminal_and_none_in_a_pipe(columns: int) -> None:
    printed, shown = on_a_terminal(EPOCH, columns)
    assert printed == "| result |\n" * 2
    assert "epoch 1:  44%" in shown  # starts where the epoch was left
    assert "epoch 2: 100%" in shown
    assert "10/10 updates, loss=4.00" in shown
    # the warning has a line of its own: the bar was wiped before, and drawn again after
    assert shown.count("\rwarning: careful, please\r\n") == 2
    result = run_python(EPOCH)
    assert (result.returncode, result.stdout) == (0, "| result |\n" * 2)
    assert result.stderr == "warning: careful, please\n" * 2


def test_a_run_on_a_terminal(tmp_path: Path) -> None:
    """One line an epoch, a bar that fits, and the best model at the end."""
    corpus, save = write_corpus(tmp_path / "corpus", lines=200), tmp_path / "run.pt"
    flags = [*TINY, "--data", corpus, "--save", save, "--epochs", 3, "--lr", 5]
    size = struct.pack("HHHH", 24, 60, 0, 0)
    child = Child(flags, lambda: fcntl.ioctl(0, termios.TIOCSWINSZ, size), terminal=True)
    shown = read_terminal(child.terminal)
    assert child.wait().code == 0
    lines = [line.rpartition("\r")[2] for line in shown.split("\r\n")]
    epoch = r"\| epoch (\d)/3 \| ppl train +[\d.]+ valid +([\d.]+) ([* ]) \| [\d.]+ s \| lr 5(.*)"
    found = [match.groups() for line in lines if (match := re.fullmatch(epoch, line))]
    assert [number for number, *_ in found] == ["1", "2", "3"]
    ppl = [float(value) for _, value, *_ in found]
    assert [mark == "*" for *_, mark, _ in found] == [
        value < min([math.inf, *ppl[:number]]) for number, value in enumerate(ppl)
    ]
    assert [bool(re.fullmatch(r" \| [\d.]+ s left", left)) for *_, left in found] == [
        True,
        True,
        False,
    ]
    best = 1 + ppl.index(min(ppl))
    assert f"| the best model is {save}, of epoch {best}, valid ppl {min(ppl):.2f}: " in shown
    bars = [frame for frame in shown.replace("\r\n", "\r").split("\r") if " updates" in frame]
    assert re.search(
        r"^epoch [123]/3: .* \d+/\d+ updates, ppl [\d.]+, [\d.]+ s left", "\n".join(bars), re.M
    )
    assert max(map(len, bars)) <= 60
    assert "end of epoch" not in shown
    assert "batches" not in shown


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The real SDK, without this machine's settings and keys, shut down afterwards."""
    module = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    module.teardown()
    yield module
    try:
        module.teardown()
    except Exception:  # the service may have been killed
        module.teardown()


def records(run_folder: Path) -> list[dict[str, Any]]:
    """What a finished run's .wandb file holds, in order."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines()]


def offline_folders(folder: Path) -> list[Path]:
    """In the order in which they were made: the names begin with the time."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def started(found: list[dict[str, Any]]) -> dict[str, Any]:
    run: dict[str, Any] = next(record["run"] for record in found if record["type"] == "run")
    return run


def rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    items = [record["history"]["item"] for record in found if record["type"] == "history"]
    return [{k: v for k, v in item.items() if not k.startswith("_")} for item in items]


def logged(folder: Path) -> list[tuple[str, int]]:
    return [(r["event"], r["step"]) for r in read_lines(folder / "metrics.jsonl")]


def test_names_and_the_command_to_upload(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has its folder's name, and goes on there; in another folder it is a new one."""
    folder, state, runs = tmp_path / "my PTB", dict[str, Any](), list[Any]()

    def begin_and_end(place: Path) -> dict[str, Any]:
        tracker = Tracker(place, {}, WandbOptions(mode="offline"), state)
        assert tracker.wandb_url == str(offline_folders(place)[-1])
        runs.append(tracker._wandb._run)
        found = tracker.state_dict()
        tracker.close()
        return found

    assert sync_command(folder) is None
    state = begin_and_end(folder)
    begin_and_end(folder)
    assert [run.name for run in runs] == ["my PTB", None]  # W&B keeps the one that it has
    assert [run.id for run in runs] == [state["wandb_id"]] * 2
    command = sync_command(folder)
    assert command is not None
    # As a shell reads it, and only lists it.
    listed = subprocess.run(
        ["sh", "-c", command.replace("wandb sync", "ls -d")], capture_output=True, text=True
    )
    assert listed.stdout.split("\n")[:-1] == list(map(str, offline_folders(folder)))
    assert sync_command(tmp_path, "*") == f"wandb sync {tmp_path}/*/wandb/offline-run-*"

    wandb.teardown()  # it reads the environment once
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    begin_and_end(tmp_path / "elsewhere")
    assert runs[2].id != state["wandb_id"]
    assert (runs[2].project, runs[2].name, runs[2].group) == ("p", "n", "g")
    assert runs[2].tags == ("a", "b")


def assert_one_warning(text: str) -> None:
    assert text.startswith("warning: Weights & Biases is off")
    assert text.count("\n") == 1


RUN = """
import os, pathlib, signal, sys, time
from engine import tracking
from engine.tracking import Tracker, WandbOptions
tracker = Tracker(sys.argv[1], {"lr": 30.0}, WandbOptions(mode=sys.argv[2]))
for step in range(1, 6):
    tracker.log("train", step=step, loss=1.0)
    if step == 2 and "kill" in sys.argv:
        children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.5)
tracker.summarize(test_ppl=1.0)
tracker.close()
print("trained")
"""


FAILURES = {
    "not installed": ("import sys; sys.modules['wandb'] = None", "online", "wandb"),
    "unreachable": ("from engine import tracking; tracking.INIT_SECONDS = 1.0", "online", ""),
    "raises": ("import wandb; wandb.Run.log = lambda *a: 1 / 0", "offline", "division by zero"),
    "service dies": ("", "offline kill", ""),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_training_goes_on_when_wandb_fails(wandb: Any, tmp_path: Path, kind: str) -> None:
    if kind == "service dies" and not Path("/proc/self/task").exists():
        pytest.skip("finds the service in /proc")
    wandb.teardown()
    before, how, reason = FAILURES[kind]
    server = dict(WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    result = run_python(f"{before}\n{RUN}", tmp_path, *how.split(), **server)
    assert (result.returncode, result.stdout) == (0, "trained\n"), result.stderr
    assert_one_warning(result.stderr)
    assert reason in result.stderr
    assert logged(tmp_path) == [("train", step) for step in range(1, 6)]


def test_a_table_is_a_run_of_its_own(wandb: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [dict(row="base", test_mean=61.5)]
    rows.append(dict(row="- weight drop", test_mean=None))
    options = WandbOptions("offline", None, "demo", "demo", "table")
    log_table(tmp_path / "out", options, rows, None)
    [folder] = offline_folders(tmp_path / "out")
    run = started(records(folder))
    assert (run["project"], run["display_name"]) == ("awd-lstm", "demo")
    assert (run["run_group"], run["job_type"]) == ("demo", "table")
    [file] = (folder / "files" / "media" / "table").glob("*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["row", "test_mean"]
    assert table["data"] == [["base", 61.5], ["- weight drop", None]]
    log_table(tmp_path / "none", WandbOptions(), rows, None)
    assert not (tmp_path / "none").exists()


def test_no_key_is_not_asked_for_on_a_terminal(wandb: Any, tmp_path: Path) -> None:
    wandb.teardown()
    code = f"import sys; sys.argv = ['', {str(tmp_path)!r}, 'online']\n{RUN}"
    printed, shown = on_a_terminal(code)
    assert printed == "trained\n"
    assert_one_warning(shown)
    assert "API key" in shown
    assert len(logged(tmp_path)) == 5


def test_main_with_wandb_from_start_to_resume(
    wandb: Any, corpus_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """The whole program, stopped once: one W&B run with everything in it, each event once."""
    save = tmp_path / "run.pt"
    flags = [*TINY, "--data", corpus_folder, "--save", save, "--epochs", 2, "--resume", "auto"]
    flags += ["--wandb", "offline", "--wandb-project", "p", "--wandb-tags", "a", "b"]
    first = run(*flags, "--max-updates", 8)
    assert first.code == 0
    assert "W&B: " in first.err
    last = run(*flags, "--samples", 2)
    assert last.code == 0
    assert last.err.splitlines()[-1] == f"W&B: to upload the run: {sync_command(tmp_path / 'run')}"
    folders = offline_folders(tmp_path / "run")
    found = [records(folder) for folder in folders]
    first_run, last_run = map(started, found)
    assert first_run["run_id"] == last_run["run_id"]
    assert (first_run["project"], first_run["tags"]) == ("p", ["a", "b"])
    assert first_run["display_name"] == "run"
    assert first_run["config"]["update"]["nhid"] == 8
    metrics = [record["metric"] for record in found[0] if record["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "step" for m in metrics)
    [samples] = (folders[1] / "files" / "media" / "table").glob("samples*.table.json")
    written = json.loads(samples.read_text())["data"]
    assert [f"| It writes: {sentence}" for [sentence] in written] == last.out.splitlines()[-2:]
    pictures = [list((f / "files" / "media" / "images").glob("curves*.png")) for f in folders]
    assert [len(found) for found in pictures] == [1, 1]  # each session ends with a test
    all_rows = [row for records_of in found for row in rows(records_of)]
    sent = [
        row for row in all_rows if not {"samples", "curves"} & {key.split(".")[0] for key in row}
    ]
    kinds = [(next(key for key in row if "/" in key).split("/")[0], row["step"]) for row in sent]
    # the test at the end of the first session is in W&B, too
    assert set(logged(tmp_path / "run")) <= set(kinds)
    assert len(kinds) == len(set(kinds))
    test = next(e for e in read_lines(tmp_path / "run" / "metrics.jsonl") if e["event"] == "test")
    assert sent[-1] == {"step": test["step"]} | {
        f"test/{k}": test[k] for k in ("loss", "ppl", "bpc")
    }
    updates = [r["summary"]["update"] for part in found for r in part if r["type"] == "summary"]
    summary = {key: value for update in updates for key, value in update.items()}
    ours = read_summary(save)
    for name in ("test_ppl", "best_valid_ppl"):
        assert summary[name] == pytest.approx(ours[name])


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--lr", "1e30", "--clip", "0"], 1)])
def test_wandb_is_told_how_a_run_ended(
    corpus_folder: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    code: int,
) -> None:
    wandb = MagicMock()
    wandb.init.return_value.configure_mock(id="id", url="address")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    argv = [*TINY, *flags, "--data", corpus_folder, "--save", tmp_path / "run.pt"]
    assert run(*argv, "--epochs", 1, "--wandb", "offline").code == code
    wandb.init.return_value.finish.assert_called_once_with(exit_code=code)
