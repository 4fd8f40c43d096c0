"""metrics.jsonl, the progress display and Weights & Biases, against the real SDK offline."""

import fcntl
import functools
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
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, TINY, write_corpus

from engine.ablation.tracked import log_table
from engine.metrics_file import MetricsFile
from engine.tracking import Tracker, WandbOptions, sync_command

DISABLED = WandbOptions()
OFFLINE = WandbOptions(mode="offline", project="test", name="a run", group="g", tags=("x", "y"))


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
        assert path.read_bytes().endswith(b"}\n")
        assert read_lines(path) == written
        assert file.size == path.stat().st_size
    file.close()
    file.close()


def test_tensors_are_refused_and_leave_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    with pytest.raises(TypeError, match="Tensor"):
        file.write({"loss": torch.tensor(1.0)})
    file.write({"loss": 1.0})
    file.close()
    assert read_lines(path) == [{"loss": 1.0}]


@pytest.mark.parametrize("tail", ["", '{"step": 3}\n{"step": 4}\n', '{"step": 3}\n{"st'])
def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path: Path, tail: str) -> None:
    MetricsFile(tmp_path / "new.jsonl", keep_bytes=0).close()  # before the first line
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "name": "é"})
    file.write({"step": 2})
    size = file.size
    file.close()
    path.write_text(path.read_text() + tail)
    file = MetricsFile(path, keep_bytes=size)
    assert file.size == size == path.stat().st_size
    file.write({"step": 3})
    assert file.size == path.stat().st_size
    file.close()
    assert [record["step"] for record in read_lines(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "keep", "expected"),
    [
        ("1 2", 500, "1 2 gap2"),  # shorter
        ("1 2", 5, "gap0"),  # another file, cut within a line
        (None, 12, "gap0"),
        ("1 \0\0\0 2", 500, "1 gap1 2 gap2"),
        ("1 [] { 2", 29, "1 gap1 2"),
    ],
)
def test_what_is_missing_is_marked_as_a_gap(
    tmp_path: Path, content: str | None, keep: int, expected: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        words = content.split(" ")
        path.write_text("".join(f'{{"step": {w}}}\n' if w.isdigit() else f"{w}\n" for w in words))
    file = MetricsFile(path, keep_bytes=keep)
    assert file.damage is not None
    assert file.size == path.stat().st_size
    file.write({"step": 9})
    file.close()
    shown = [f"{line.get('event', '')}{line['step']}" for line in read_lines(path)]
    assert shown == [*expected.split(), "9"]


def test_tracker_without_wandb(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", {}, DISABLED)
    tracker.log("train", step=10, epoch=1, loss=2.0)
    state = json.loads(json.dumps(tracker.state_dict()))
    tracker.log("valid", step=10, epoch=1, ppl=float("inf"))
    tracker.summarize(test_ppl=3.0)
    tracker.close()
    path = tmp_path / "run" / "metrics.jsonl"
    train = {"event": "train", "step": 10, "epoch": 1, "loss": 2.0}
    assert read_lines(path) == [train, {"event": "valid", "step": 10, "epoch": 1, "ppl": None}]
    assert state == {"metrics_bytes": len(json.dumps(train)) + 1, "wandb_id": None}
    Tracker(tmp_path / "run", {}, DISABLED, state).close()
    assert read_lines(path) == [train]
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


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


def on_a_terminal(code: str, columns: int = 80, both: bool = False, **env: str) -> tuple[str, str]:
    """(stdout, stderr) of a script whose stderr is a terminal and whose stdout is a pipe.

    both: stdout is the terminal, too.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=slave if both else subprocess.PIPE,
        stderr=slave,
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the other end was closed
                break
            if not chunk:
                break
            shown += chunk
        printed = process.stdout.read() if process.stdout is not None else b""
    os.close(master)
    assert process.returncode == 0, shown.decode()
    return printed.decode(), shown.decode()


@pytest.mark.parametrize("columns", [80, 0])
def test_a_bar_on_a_terminal(columns: int) -> None:
    pytest.importorskip("tqdm")
    printed, shown = on_a_terminal(EPOCH, columns)
    assert printed == "| result |\n" * 2
    assert "epoch 1:  44%" in shown  # starts where the epoch was left
    assert "epoch 2: 100%" in shown
    assert "10/10 updates, loss=4.00" in shown
    # the warning has a line of its own: the bar was wiped before, and drawn again after
    assert shown.count("\rwarning: careful, please\r\n") == 2


def test_no_bar_in_a_pipe_or_without_tqdm() -> None:
    result = run_python(EPOCH)
    assert (result.returncode, result.stdout) == (0, "| result |\n" * 2)
    assert result.stderr == "warning: careful, please\n" * 2
    printed, shown = on_a_terminal("import sys; sys.modules['tqdm'] = None\n" + EPOCH)
    assert printed == "| result |\n" * 2
    assert shown == "warning: careful, please\r\n" * 2


def test_a_run_on_a_terminal(tmp_path: Path) -> None:
    """One line an epoch, a bar that fits, and the best model at the end."""
    pytest.importorskip("tqdm")
    corpus, save = write_corpus(tmp_path / "corpus", lines=200), tmp_path / "run.pt"
    flags = [*TINY, "--data", str(corpus), "--save", str(save), "--epochs", "3", "--lr", "5"]
    shown = on_a_terminal(f"import main; main.main({flags!r})", columns=60, both=True)[1]
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


@functools.cache
def records(run_folder: Path) -> list[dict[str, Any]]:
    """What a finished run's .wandb file holds, in order."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines()]


def offline_folders(folder: Path) -> list[Path]:
    """In the order in which they were made: the names begin with the time."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def started(run_folder: Path) -> dict[str, Any]:
    run: dict[str, Any] = next(r["run"] for r in records(run_folder) if r["type"] == "run")
    return run


def summary_of(folders: list[Path]) -> dict[str, Any]:
    found = [r["summary"]["update"] for f in folders for r in records(f) if r["type"] == "summary"]
    return {key: value for update in found for key, value in update.items()}


def history(run_folder: Path) -> list[dict[str, Any]]:
    return [r["history"]["item"] for r in records(run_folder) if r["type"] == "history"]


def events(run_folder: Path) -> list[tuple[str, int]]:
    """(kind of event, update) of each row."""
    return [
        (kind, row["step"])
        for row in history(run_folder)
        for kind in {key.split("/")[0] for key in row if "/" in key}
    ]


def logged(folder: Path) -> list[tuple[str, int]]:
    return [(r["event"], r["step"]) for r in read_lines(folder / "metrics.jsonl")]


def log_updates(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log("train", step=step, epoch=1, loss=1.0 / step, lr=30.0)


def test_an_offline_run_holds_everything(
    wandb: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path / "PTB", {"lr": 30.0, "data": "data/penn"}, OFFLINE)
    tracker.log("train", step=200, epoch=1, loss=6.5, ppl=665.1, lr=30.0, grad_norm=0.3)
    tracker.log("valid", step=200, epoch=1, loss=6.0, ppl=403.4, averaged=False)
    tracker.log("averaging", step=200, epoch=1)
    tracker.log("train", step=400, epoch=2, loss=float("nan"), ppl=float("inf"))
    tracker.log("test", step=400, loss=5.5, ppl=244.7, bpc=7.9)
    tracker.summarize(best_valid_ppl=403.4, test_ppl=244.7)
    [run_folder] = offline_folders(tmp_path / "PTB")
    assert tracker.wandb_url == str(run_folder)
    tracker.close(exit_code=0)
    assert capfd.readouterr() == ("", "")

    run, found = started(run_folder), records(run_folder)
    assert run["run_id"] == tracker.state_dict()["wandb_id"]
    assert (run["project"], run["display_name"]) == ("test", "a run")
    assert (run["run_group"], run["tags"]) == ("g", ["x", "y"])
    assert {"lr": 30, "data": "data/penn"}.items() <= run["config"]["update"].items()
    metrics = [r["metric"] for r in found if r["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "step" for m in metrics)

    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history(run_folder)]
    assert rows[0]["train/grad_norm"] == 0.3
    valid = {"epoch": 1, "loss": 6, "ppl": 403.4, "averaged": False}
    assert rows[1] == {"step": 200, **{f"valid/{key}": value for key, value in valid.items()}}
    assert rows[2] == {"step": 200, "averaging/epoch": 1}
    assert rows[3]["train/loss"] == "NaN"
    assert rows[4] == {"step": 400, "test/loss": 5.5, "test/ppl": 244.7, "test/bpc": 7.9}
    assert {"best_valid_ppl": 403.4, "test_ppl": 244.7}.items() <= summary_of([run_folder]).items()
    assert [r["exit"].get("exit_code", 0) for r in found if r["type"] == "exit"] == [0]


def test_a_resumed_run_continues_its_wandb_run(wandb: Any, tmp_path: Path) -> None:
    """Through a session without W&B; elsewhere it starts a new one, with the whole history."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    state: dict[str, Any] | None = None
    for first, options in ((1, OFFLINE), (3, DISABLED), (5, OFFLINE)):
        tracker = Tracker(here, {}, options, state)
        log_updates(tracker, first, first + 1)
        state = json.loads(json.dumps(tracker.state_dict()))
        tracker.close()
    assert state is not None
    folders = offline_folders(here)
    assert {started(path)["run_id"] for path in folders} == {state["wandb_id"]}
    assert [started(path).get("resume", False) for path in folders] == [False, True]
    updates = [("train", step) for step in range(1, 8)]
    assert [events(path) for path in folders] == [updates[:2], updates[4:6]]

    elsewhere.mkdir()
    (elsewhere / "metrics.jsonl").write_bytes((here / "metrics.jsonl").read_bytes())
    tracker = Tracker(elsewhere, {}, OFFLINE, state)
    log_updates(tracker, 7, 7)
    tracker.close()
    [run_folder] = offline_folders(elsewhere)
    assert started(run_folder)["run_id"] != state["wandb_id"]
    assert events(run_folder) == updates == logged(elsewhere)


def test_project_and_name_come_from_the_environment(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    Tracker(tmp_path, {}, WandbOptions(mode="offline")).close()
    run = started(offline_folders(tmp_path)[0])
    assert (run["project"], run["display_name"], run["run_group"]) == ("p", "n", "g")
    assert run["tags"] == ["a", "b"]


def test_a_run_has_its_folder_s_name_and_a_command_to_upload_it(wandb: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my PTB"
    state: dict[str, Any] = {}
    assert sync_command(folder) is None
    for _ in range(2):
        tracker = Tracker(folder, {}, WandbOptions(mode="offline"), state)
        state = tracker.state_dict()
        tracker.close()
    new, resumed = offline_folders(folder)
    assert started(new)["display_name"] == "my PTB"
    assert not started(resumed).get("display_name")  # W&B keeps the one that it has
    command = sync_command(folder)
    assert command is not None
    # As a shell reads it, and only lists it.
    listed = subprocess.run(
        ["sh", "-c", command.replace("wandb sync", "ls -d")], capture_output=True, text=True
    )
    assert listed.stdout.split("\n")[:-1] == [str(new), str(resumed)]
    assert sync_command(tmp_path, "*") == f"wandb sync {tmp_path}/*/wandb/offline-run-*"


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
    run = started(folder)
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
    runs = [started(path) for path in folders]
    assert len(runs) == 2
    assert len({run["run_id"] for run in runs}) == 1
    assert (runs[0]["project"], runs[0]["tags"]) == ("p", ["a", "b"])
    assert runs[0]["display_name"] == "run"
    [samples] = (folders[1] / "files" / "media" / "table").glob("samples*.table.json")
    written = json.loads(samples.read_text())["data"]
    assert [f"| It writes: {sentence}" for [sentence] in written] == last.out.splitlines()[-2:]
    assert runs[0]["config"]["update"]["nhid"] == 8
    sent = [event for path in folders for event in events(path)]
    # the test at the end of the first session is in W&B, too
    assert set(logged(tmp_path / "run")) <= set(sent)
    assert len(sent) == len(set(sent))
    ours = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("test_ppl", "best_valid_ppl"):
        assert summary_of(folders)[name] == pytest.approx(ours[name])


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
