"""metrics.jsonl, the progress display and Weights & Biases, against the real SDK offline."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from engine import tracking
from engine.metrics_file import MetricsFile
from engine.tracking import Progress, Tracker, WandbOptions, log_table, warn

ROOT = Path(__file__).resolve().parents[1]
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
    file = MetricsFile(path)
    for number in range(3):
        file.write({"event": "train", "step": number, "loss": 0.5})
        assert path.read_bytes().endswith(b"}\n")
        assert len(read_lines(path)) == number + 1
        assert file.size == path.stat().st_size
    file.close()
    file.close()


def test_a_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "old"}\n')
    file = MetricsFile(path)
    file.write({"event": "new"})
    file.close()
    assert read_lines(path) == [{"event": "new"}]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_becomes_null(tmp_path: Path, number: float) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"ppl": number, "loss": 1.5, "averaged": False})
    file.close()
    assert read_lines(path) == [{"ppl": None, "loss": 1.5, "averaged": False}]
    assert path.read_text() == '{"ppl": null, "loss": 1.5, "averaged": false}\n'


def test_tensors_are_refused_and_leave_no_half_line(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    with pytest.raises(TypeError, match="Tensor"):
        file.write({"loss": torch.tensor(1.0)})
    file.write({"loss": 1.0})
    file.close()
    assert read_lines(path) == [{"loss": 1.0}]


@pytest.mark.parametrize("tail", ["", '{"step": 3}\n{"step": 4}\n', '{"step": 3}\n{"st'])
def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path: Path, tail: str) -> None:
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


def test_a_checkpoint_before_the_first_line_can_be_resumed(tmp_path: Path) -> None:
    for content in (None, "", '{"step": 1}\n{'):
        path = tmp_path / "metrics.jsonl"
        if content is not None:
            path.write_text(content)
        file = MetricsFile(path, keep_bytes=0)
        file.write({"step": 1})
        file.close()
        assert read_lines(path) == [{"step": 1}]


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
from engine.tracking import Progress, warn
for epoch in (1, 2):
    with Progress(10, 4, f"epoch {epoch}") as progress:
        for _ in range(3):
            progress.update(2)
            progress.report("| interval |", loss="4.00")
        warn("careful,\\n  please")
    print("| result |", flush=True)
"""


def on_a_terminal(code: str, columns: int = 80, **env: str) -> tuple[str, str]:
    """(stdout, stderr) of a script whose stderr is a terminal and whose stdout is a pipe."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=subprocess.PIPE,
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
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(master)
    assert process.returncode == 0, shown.decode()
    return printed.decode(), shown.decode()


@pytest.mark.parametrize("columns", [80, 0])
def test_a_bar_on_a_terminal(columns: int) -> None:
    pytest.importorskip("tqdm")
    printed, shown = on_a_terminal(EPOCH, columns)
    assert printed == "| result |\n" * 2
    assert "| interval |" not in shown
    assert "epoch 1:  40%" in shown  # starts where the epoch was left
    assert "epoch 2: 100%" in shown
    assert "loss=4.00" in shown
    # the warning has a line of its own: the bar was wiped before, and drawn again after
    assert shown.count("\rwarning: careful, please\r\n") == 2


def test_lines_in_a_pipe() -> None:
    result = run_python(EPOCH)
    assert result.returncode == 0
    assert result.stdout == "| result |\n" * 2
    assert result.stderr == ("| interval |\n" * 3 + "warning: careful, please\n") * 2
    assert "\r" not in result.stderr


def test_a_terminal_without_tqdm_says_so_once() -> None:
    printed, shown = on_a_terminal("import sys; sys.modules['tqdm'] = None\n" + EPOCH)
    assert printed == "| result |\n" * 2
    assert shown.count("tqdm is not installed") == 1
    assert shown.count("| interval |\r\n") == 6
    assert shown.count("warning: careful, please\r\n") == 2


def test_the_bar_can_be_forced(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    with Progress(None, description="epoch 7", bar=True) as progress:
        progress.update()
        progress.report("line", loss=1.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 7" in captured.err
    assert "line" not in captured.err
    with Progress(3, bar=False) as progress:
        progress.report("line", loss=1.0)
    assert capsys.readouterr().err == "line\n"


def test_warn_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    warn("first\nsecond")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: first second\n")


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
    """What a run's .wandb file holds, in order."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines()]


def offline_folders(folder: Path) -> list[Path]:
    """In the order in which they were made: the names begin with the time."""
    return sorted((folder / "wandb").glob("offline-run-*"))


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


def test_disabled_wandb_and_bars_are_not_imported(tmp_path: Path) -> None:
    code = """
import sys
from engine.tracking import Progress, Tracker, WandbOptions
tracker = Tracker(sys.argv[1], {}, WandbOptions())
tracker.log("train", step=1, loss=1.0)
tracker.close()
Progress(3).close()
assert not {"wandb", "tqdm"} & set(sys.modules), sys.modules
"""
    result = run_python(code, tmp_path, WANDB_MODE="online")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_offline_run_holds_everything(
    wandb: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hooks = sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT)
    tracker = Tracker(tmp_path / "PTB", {"lr": 30.0, "data": "data/penn"}, OFFLINE)
    assert (sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT)) == hooks
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

    found = records(run_folder)
    run = next(r["run"] for r in found if r["type"] == "run")
    assert run["run_id"] == tracker.state_dict()["wandb_id"]
    assert (run["project"], run["display_name"]) == ("test", "a run")
    assert (run["run_group"], run["tags"]) == ("g", ["x", "y"])
    assert {"lr": 30, "data": "data/penn"}.items() <= run["config"]["update"].items()
    metrics = [r["metric"] for r in found if r["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "step" for m in metrics)

    rows = [r["history"]["item"] for r in found if r["type"] == "history"]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    mine = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert mine[1] == {
        "step": 200,
        "valid/epoch": 1,
        "valid/loss": 6,
        "valid/ppl": 403.4,
        "valid/averaged": False,
    }
    assert mine[0]["train/grad_norm"] == 0.3
    assert mine[2] == {"step": 200, "averaging/epoch": 1}
    assert mine[3]["train/loss"] == "NaN"
    assert mine[4] == {"step": 400, "test/loss": 5.5, "test/ppl": 244.7, "test/bpc": 7.9}

    summary: dict[str, Any] = {}
    for record in found:
        if record["type"] == "summary":
            summary.update(record["summary"]["update"])
    assert (summary["best_valid_ppl"], summary["test_ppl"]) == (403.4, 244.7)
    assert [r["exit"].get("exit_code", 0) for r in found if r["type"] == "exit"] == [0]


def test_a_resumed_run_sends_each_event_once(wandb: Any, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {"lr": 30.0}, OFFLINE)
    log_updates(tracker, 1, 3)
    state = json.loads(json.dumps(tracker.state_dict()))
    log_updates(tracker, 4, 5)
    tracker.log("test", step=5, loss=1.0)  # not part of what a longer run repeats
    tracker.close(exit_code=1)
    # Interrupted again before the next checkpoint: what to repeat is known from both attempts.
    tracker = Tracker(tmp_path, {"lr": 30.0}, OFFLINE, state)
    log_updates(tracker, 4, 4)
    tracker.close(exit_code=1)
    tracker = Tracker(tmp_path, {"lr": 30.0}, OFFLINE, state)
    log_updates(tracker, 4, 5)
    tracker.log("valid", step=5, epoch=1, loss=1.0)  # the event that the crash left out
    tracker.log("averaging", step=5, epoch=1)
    log_updates(tracker, 6, 7)
    tracker.close()

    folders = offline_folders(tmp_path)
    assert len(folders) == 3
    runs = [r["run"] for path in folders for r in records(path) if r["type"] == "run"]
    assert {run["run_id"] for run in runs} == {state["wandb_id"]}
    assert [run.get("resume", False) for run in runs] == [False, True, True]
    first = [("train", step) for step in range(1, 6)] + [("test", 5)]
    last = [("valid", 5), ("averaging", 5), ("train", 6), ("train", 7)]
    assert [events(path) for path in folders] == [first, [], last]
    own_steps = [row["_step"] for path in folders for row in history(path)]
    assert own_steps == list(range(10))
    lines = [("train", step) for step in range(1, 6)]
    assert logged(tmp_path) == [*lines, *last]


def test_what_wandb_missed_is_sent_on_resume(wandb: Any, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {}, DISABLED)
    log_updates(tracker, 1, 2)
    state = tracker.state_dict()
    tracker.close()
    tracker = Tracker(tmp_path, {}, OFFLINE, state)
    log_updates(tracker, 3, 4)
    state = tracker.state_dict()
    tracker.close()
    tracker = Tracker(tmp_path, {}, DISABLED, state)
    log_updates(tracker, 5, 6)
    assert tracker.state_dict()["wandb_id"] == state["wandb_id"]
    state = tracker.state_dict()
    tracker.close()
    tracker = Tracker(tmp_path, {}, OFFLINE, state)
    log_updates(tracker, 7, 7)
    tracker.close()
    sent = [events(path) for path in offline_folders(tmp_path)]
    updates = [("train", step) for step in range(1, 8)]
    assert sent == [updates[:4], updates[4:]]


def test_a_run_continued_elsewhere_is_a_new_wandb_run(wandb: Any, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "old", {}, OFFLINE)
    log_updates(tracker, 1, 2)
    state = tracker.state_dict()
    tracker.close()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_bytes(
        (tmp_path / "old" / "metrics.jsonl").read_bytes()
    )
    tracker = Tracker(tmp_path / "new", {}, OFFLINE, state)
    log_updates(tracker, 3, 3)
    tracker.close()
    assert tracker.state_dict()["wandb_id"] != state["wandb_id"]
    [run_folder] = offline_folders(tmp_path / "new")
    assert events(run_folder) == [("train", 1), ("train", 2), ("train", 3)]


def test_project_and_name_come_from_the_environment(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_record(folder: Path) -> dict[str, Any]:
        Tracker(folder, {}, WandbOptions(mode="offline")).close()
        [run_folder] = offline_folders(folder)
        return next(r["run"] for r in records(run_folder) if r["type"] == "run")

    assert run_record(tmp_path / "1")["project"] == "awd-lstm"
    wandb.teardown()
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = run_record(tmp_path / "2")
    assert (run["project"], run["display_name"], run["run_group"]) == ("p", "n", "g")
    assert run["tags"] == ["a", "b"]


def assert_one_warning(text: str) -> None:
    assert text.startswith("warning: Weights & Biases is off")
    assert text.count("\n") == 1


def test_training_goes_on_when_a_call_raises(
    wandb: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tracker = Tracker(tmp_path, {}, OFFLINE)
    log_updates(tracker, 1, 2)

    def broken(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("broken\npipe")

    with monkeypatch.context() as patch:
        patch.setattr(type(tracker._wandb._run), "log", broken)
        log_updates(tracker, 3, 4)
    log_updates(tracker, 5, 5)
    tracker.summarize(test_ppl=1.0)
    state = tracker.state_dict()
    tracker.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert_one_warning(err)
    assert "broken pipe" in err
    assert logged(tmp_path) == [("train", step) for step in range(1, 6)]
    # and when it is resumed, W&B gets what it has missed
    tracker = Tracker(tmp_path, {}, OFFLINE, state)
    tracker.close()
    sent = [events(path) for path in offline_folders(tmp_path)]
    assert sent == [[("train", 1), ("train", 2)], [("train", 3), ("train", 4), ("train", 5)]]


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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the service in /proc")
def test_training_goes_on_when_the_service_dies(wandb: Any, tmp_path: Path) -> None:
    wandb.teardown()
    result = run_python(RUN, tmp_path, "offline", "kill")
    assert (result.returncode, result.stdout) == (0, "trained\n"), result.stderr
    assert_one_warning(result.stderr)
    assert logged(tmp_path) == [("train", step) for step in range(1, 6)]


def test_a_table_is_a_run_of_its_own(wandb: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [dict(row="base", test_mean=61.5)]
    rows.append(dict(row="- weight drop", test_mean=None))
    options = WandbOptions("offline", None, "demo", "demo", "table")
    log_table(tmp_path / "out", options, rows, None)
    [folder] = offline_folders(tmp_path / "out")
    [started] = [r["run"] for r in records(folder) if r["type"] == "run"]
    assert (started["run_group"], started["job_type"], started["display_name"]) == (
        "demo", "table", "demo",
    )  # fmt: skip
    [file] = (folder / "files" / "media" / "table").glob("*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["row", "test_mean"]
    assert table["data"] == [["base", 61.5], ["- weight drop", None]]
    log_table(tmp_path / "none", WandbOptions(), rows, None)
    assert not (tmp_path / "none").exists()


def test_training_goes_on_without_wandb(tmp_path: Path) -> None:
    result = run_python("import sys; sys.modules['wandb'] = None\n" + RUN, tmp_path, "online")
    assert (result.returncode, result.stdout) == (0, "trained\n"), result.stderr
    assert_one_warning(result.stderr)
    assert len(logged(tmp_path)) == 5


def test_no_key_is_not_asked_for_on_a_terminal(wandb: Any, tmp_path: Path) -> None:
    wandb.teardown()
    code = f"import sys; sys.argv = ['', {str(tmp_path)!r}, 'online']\n{RUN}"
    printed, shown = on_a_terminal(code)
    assert printed == "trained\n"
    assert_one_warning(shown)
    assert "API key" in shown
    assert len(logged(tmp_path)) == 5


def test_a_server_that_cannot_be_reached_is_given_up_in_time(wandb: Any, tmp_path: Path) -> None:
    wandb.teardown()
    limits = "from engine import tracking\ntracking.INIT_SECONDS = 1.0\n"
    result = run_python(
        limits + RUN,
        tmp_path,
        "online",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert (result.returncode, result.stdout) == (0, "trained\n"), result.stderr
    assert_one_warning(result.stderr)
    assert len(logged(tmp_path)) == 5


class FakeRun:
    """What the SDK returns online for a run of which the server has 50 rows."""

    id = "abc"
    url = "https://example.org/abc"
    step = 50

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, row: dict[str, Any], step: int, commit: bool) -> None:
        assert commit
        self.rows.append((step, row))

    def finish(self, exit_code: int) -> None:
        assert exit_code == 3


def test_rows_go_behind_those_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    asked_for = []

    def init(folder: Path, config: object, options: object, run_id: str | None) -> FakeRun:
        asked_for.append(run_id)
        return run

    monkeypatch.setattr(tracking, "_init", init)
    online = WandbOptions(mode="online")
    tracker = Tracker(tmp_path, {}, online)
    tracker.log("train", step=10, loss=1.0)
    tracker.log("valid", step=10, ppl=2.0)
    assert tracker.wandb_url == "https://example.org/abc"
    tracker.close(exit_code=3)
    Tracker(tmp_path, {}, online, tracker.state_dict()).close(exit_code=3)
    assert asked_for == [None, "abc"]
    assert run.rows == [
        (50, {"step": 10, "train/loss": 1.0}),
        (51, {"step": 10, "valid/ppl": 2.0}),
    ]


def test_a_call_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    with pytest.raises(TimeoutError):
        tracking._within(0.05, release.wait)
    release.set()
    assert tracking._within(5.0, lambda: 3) == 3
    with pytest.raises(SystemExit):
        tracking._within(5.0, lambda: sys.exit(2))


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
    assert run(*flags).code == 0
    folders = offline_folders(tmp_path / "run")
    found = [record for path in folders for record in records(path)]
    runs = [record["run"] for record in found if record["type"] == "run"]
    assert len(runs) == 2
    assert len({r["run_id"] for r in runs}) == 1
    assert (runs[0]["project"], runs[0]["tags"]) == ("p", ["a", "b"])
    assert runs[0]["config"]["update"]["nhid"] == 8
    sent = [event for path in folders for event in events(path)]
    # the first session's own end is in W&B, too
    assert set(logged(tmp_path / "run")) <= set(sent)
    assert len(sent) == len(set(sent))
    summary: dict[str, Any] = {}
    for record in found:
        if record["type"] == "summary":
            summary.update(record["summary"]["update"])
    ours = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_ppl"] == pytest.approx(ours["test_ppl"])
    assert summary["best_valid_ppl"] == pytest.approx(ours["best_valid_ppl"])
