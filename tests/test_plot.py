"""plot.py: runs that are done, under way, resumed or damaged; labels; what it says otherwise."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from test_bad_input import only_line

import plot
from engine.history import read_history
from flags.plotting import tell_apart
from programs.plot import labels

pytest.importorskip("matplotlib")


@pytest.fixture
def draw(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run plot.py in this process."""

    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = plot.main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def write_run(folder: Path, epochs: int, flags: dict[str, Any] | None = None) -> Path:
    """The files of a run of ten updates an epoch, three lines each, and no last.pt yet."""
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        place = dict(epoch=epoch, ppl=100 - 5.0 * epoch, loss=math.log(100 - 5 * epoch))
        for row in (4, 8, 10):
            step = 10 * (epoch - 1) + row
            rates = dict(lr=30.0, grad_norm=0.1, seconds=36.0 * step)
            lines.append(dict(event="train", step=step, **place, **rates))
        lines.append(dict(event="valid", step=10 * epoch, seconds=361.0 * epoch, **place))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if flags is not None:
        (folder / "config.json").write_text(json.dumps(dict(flags=flags, fingerprint="x")))
    return folder


def test_a_run_of_main_stopped_and_resumed(
    draw: Callable[..., Result], run: Callable[..., Result], flags: list[str], tmp_path: Path
) -> None:
    save = tmp_path / "run.pt"
    argv = [*flags, "--save", save, "--resume", "auto", "--epochs", 3]
    assert run(*argv, "--max-updates", 5).code == 0
    for name in (save, tmp_path / "run" / "last.pt", tmp_path / "run"):
        assert read_history(name).folder == tmp_path / "run"
    assert draw(save, "--x", "epoch").err == (
        f"error: {tmp_path}/run/metrics.jsonl: no epoch has ended yet; "
        "--x update shows what there is\n"
    )
    assert run(*argv).code == 0
    result = draw(save, "--x", "time", "--output", tmp_path / "x", "--format", "pdf")
    assert result == (0, f"| {tmp_path}/x.pdf\n", "")
    assert (tmp_path / "x.pdf").stat().st_size > 5000
    history = read_history(save)
    valid, averaging = history.of("valid"), history.of("averaging")
    best = min(valid, key=lambda line: line["loss"])
    by_update, by_epoch = (history.curves(x, "run") for x in ("update", "epoch"))
    assert by_update.valid == ([v["step"] for v in valid], [v["ppl"] for v in valid])
    assert by_update.best == (best["epoch"], best["step"], best["ppl"])
    assert by_epoch.best == (best["epoch"], best["epoch"], best["ppl"])
    assert by_epoch.averaging is not None
    assert by_epoch.averaging[:2] == (averaging[0]["epoch"], averaging[0]["epoch"])
    hours = history.curves("time", "run").train[0]
    assert 0 < hours[0] < hours[-1]
    assert hours == sorted(hours)
    assert 3600 * hours[-1] < json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]


def test_a_run_under_way_with_a_cut_line_and_a_gap(
    draw: Callable[..., Result], tmp_path: Path
) -> None:
    """Its third epoch has ended in the file, half a line is being written."""
    folder = write_run(tmp_path / "run", 3)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    null = json.dumps(dict(json.loads(lines[5]), ppl=None, grad_norm=None)) + "\n"
    gap = json.dumps(dict(event="gap", step=8)) + "\n"
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], gap, lines[4], null, *lines[7:10]])
                                          + lines[10][:20])  # fmt: skip
    assert draw(folder, "--format", "png").out == f"| {tmp_path}/run-curves.png\n"
    curves = read_history(folder).curves("epoch", "run")
    # The first epoch's end is lost: the places come from that of the second.
    assert curves.train[0] == pytest.approx([0.4, 0.8, math.nan, 1.4, 1.8, 2.4, 2.8], nan_ok=True)
    assert [math.isnan(y) for y in curves.train[1]] == [*[False] * 2, True, False, True] + [
        False
    ] * 2
    assert curves.best == (2, 2.0, 90.0)


def test_a_run_cut_short_has_the_epochs_that_are_whole(tmp_path: Path) -> None:
    """By --max-updates, within an epoch or at its end: both validate at the last update."""
    folder = write_run(tmp_path / "run", 1, dict(max_updates=10))
    for epochs in (0, 1):
        (folder / "summary.json").write_text(json.dumps(dict(epochs=epochs)))
        assert ("no epoch has ended yet" in read_history(folder).lacks("epoch")) == (epochs == 0)


def test_fine_tuning_in_its_first_epoch(draw: Callable[..., Result], tmp_path: Path) -> None:
    """Epoch 0, the model as it was, has no length that the first epoch's could be taken from."""
    folder = write_run(tmp_path / "run", 1)
    before = json.dumps(dict(event="valid", step=0, epoch=0, ppl=99.0)) + "\n"
    lines = [before, *(folder / "metrics.jsonl").read_text().splitlines(keepends=True)]
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "no epoch has ended yet" in only_line(draw(folder, "--x", "epoch"), 1)
    (folder / "metrics.jsonl").write_text("".join(lines))
    curves = read_history(folder).curves("epoch", "run")
    assert (curves.train[0], curves.valid[0]) == ([0.4, 0.8, 1.0], [0.0, 1.0])


def test_runs_are_told_apart_by_their_flags(draw: Callable[..., Result], tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", 3, dict(seed=1, save="one.pt", clip=0.25))
    two = write_run(tmp_path / "two", 2, dict(seed=1, save="two.pt", wdrop=0.0, untied=True))
    new = write_run(tmp_path / "new", 0, {})
    long = write_run(tmp_path / ("l" * 120), 1)
    with contextlib.chdir(tmp_path):
        assert draw("one", "--format", "png").out == "| one-curves.png\n"
        for runs, name in (([long], long.name), ([long, one], f"{long.name}-and-1-more")):
            assert draw(*runs, "--format", "png").out == f"| {name}-curves.png\n"
    result = draw(one, two, new)
    assert result.err == f"warning: left out: {new}/metrics.jsonl: nothing was logged yet\n"
    assert result.out == f"| {tmp_path}/one-two-curves.png, {tmp_path}/one-two-curves.pdf\n"

    found = [read_history(path).flags for path in (one, two)]
    assert tell_apart(found) == ["no --untied --wdrop 0.5", "--untied --wdrop 0"]
    assert plot_labels(one, two) == tell_apart(found)
    again = tmp_path / "again"
    shutil.copytree(one, again)
    assert plot_labels(one, again) == ["one", "again"]
    assert plot_labels(one, again, two)[1] == "again no --untied --wdrop 0.5"
    assert plot_labels(one) == ["one"]
    (one / "config.json").write_text("damaged")
    assert plot_labels(one, two) == ["one", "two"]


def test_a_name_that_is_no_utf_8(draw: Callable[..., Result], tmp_path: Path) -> None:
    folders = [write_run(tmp_path / os.fsdecode(name), 1) for name in (b"a\xff", b"_\xff")]
    for runs in (folders[:1], folders):
        assert draw(*runs, "--output", tmp_path / "x").code == 0
        assert (tmp_path / "x.pdf").stat().st_size > 5000


def plot_labels(*folders: Path) -> list[str]:
    return labels([read_history(folder) for folder in folders])


def test_what_is_missing_is_said_in_a_line(draw: Callable[..., Result], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    metrics = run / "metrics.jsonl"
    for name in ("none", "none.pt", "none/last.pt"):
        line = only_line(draw(tmp_path / name), 1)
        assert line.startswith(f"{tmp_path / name}: no such run (looked for ")
    assert "--x" in only_line(draw(run, "--x", "day"), 2)
    assert "RUN" in only_line(draw(), 2)
    assert "--output: '.' names no file" in only_line(draw(run, "--output", "."), 2)
    assert "nowhere: no such folder" in only_line(draw(run, "--output", tmp_path / "nowhere/a"), 1)
    odd = ('{"event": "valid", "step": 1}', '{"event": "train", "epoch": 1, "step": null}')
    metrics.write_text("\n".join(["[1]", "\0", *odd, '{"event": "averaging", "step": 1}', ""]))
    assert f"{metrics}: nothing was logged yet" in only_line(draw(run), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
