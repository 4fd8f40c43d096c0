"""A damaged file, or another run's, is never taken for what a run had written."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, write_corpus
from test_checkpoint import WORDS, small_model
from test_resume import assert_same, assert_same_run, start

from data.files import atomic_write
from engine import checkpoint_writer
from engine.checkpoint import (
    load_model,
    load_training_state,
    model_details,
    model_payload,
    write_checkpoint,
)
from engine.errors import CheckpointError

Run = Callable[..., Result]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_a_weight(path: Path) -> None:
    """A bit of the embedding, which torch.load takes as it is."""
    payload = torch.load(path, weights_only=True)
    weights = payload.get("weights") or payload["model"]
    values = weights["encoder.weight"].numpy().tobytes()
    flip(path, 8 * (path.read_bytes().index(values) + 30))
    damaged = torch.load(path, weights_only=True)
    weights = damaged.get("weights") or damaged["model"]
    assert weights["encoder.weight"].numpy().tobytes() != values


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus and the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder / "whole.pt", write_corpus(folder / "corpus")) == 0
    return folder


@pytest.mark.parametrize("kind", ["model", "training state"])
def test_a_flipped_bit_is_refused_or_changes_nothing(
    whole: Path, tmp_path: Path, kind: str
) -> None:
    good = whole / "whole.pt" if kind == "model" else whole / "whole" / "last.pt"

    def read(path: Path) -> Any:
        if kind == "model":
            model, words = load_model(path)
            return dict(model.state_dict()), model.config(), words.to_text()
        return load_training_state(path)

    expected, path = read(good), tmp_path / good.name
    draw, refused = random.Random(0), list[str]()
    for _ in range(200):
        path.write_bytes(good.read_bytes())
        flip(path, draw.randrange(8 * path.stat().st_size))
        try:
            found = read(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            assert_same(found, expected)
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refused)
    assert len(refused) > 100  # what is left is padding, and what no reader looks at


def contents(folder: Path) -> dict[Path, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {path: path.read_bytes() for path in files}


def stopped(whole: Path, folder: Path) -> Path:
    """A run that was stopped in its second epoch."""
    save = folder / "run.pt"
    assert start(save, whole / "corpus", "--max-updates", 20) == 0
    return save


@pytest.mark.parametrize("damage", ["bit", "first bit", "truncated", "empty", "zeroed"])
def test_a_damaged_state_is_replaced_by_the_one_before(
    whole: Path, tmp_path: Path, run: Run, damage: str
) -> None:
    save = stopped(whole, tmp_path)
    last, size = tmp_path / "run" / "last.pt", (tmp_path / "run" / "last.pt").stat().st_size
    if damage == "bit":
        flip_a_weight(last)
    elif damage == "first bit":
        flip(last, 0)
    else:
        kept = {"truncated": last.read_bytes()[: size // 2], "empty": b"", "zeroed": bytes(size)}
        last.write_bytes(kept[damage])
    result = run("--resume", save)
    assert result.code == 0, result.err
    [warning] = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert f"{last}: " in warning
    assert str(tmp_path / "run" / "last.previous.pt") in warning
    assert_same_run(whole / "whole.pt", save)


def test_two_damaged_states_are_refused(whole: Path, tmp_path: Path, run: Run) -> None:
    save = stopped(whole, tmp_path)
    for name in ("last.pt", "last.previous.pt"):
        flip_a_weight(tmp_path / "run" / name)
    before = contents(tmp_path)
    result = run("--resume", save)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"error: {tmp_path / 'run' / 'last.previous.pt'}: damaged: " in result.err
    assert "does not match its checksum" in result.err
    assert before == contents(tmp_path)


@pytest.mark.parametrize("what", ["damaged", "another run's", "absent"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_best_model_has_to_be_the_run_s(
    whole: Path, tmp_path: Path, run: Run, what: str, elsewhere: bool
) -> None:
    save = stopped(whole, tmp_path)
    best = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["position"]["best_epoch"]
    assert best == 1
    assert start(tmp_path / "other.pt", whole / "corpus", "--epochs", 1, "--seed", 8) == 0
    for path in (save, tmp_path / "run" / "best.previous.pt"):
        if what == "absent":
            path.unlink(missing_ok=True)
        elif path.exists():
            if what == "damaged":
                flip_a_weight(path)
            else:
                path.write_bytes((tmp_path / "other.pt").read_bytes())
    before = contents(tmp_path)
    result = run("--resume", save, *(["--save", tmp_path / "new.pt"] if elsewhere else []))
    assert (result.code, result.err.count("\n")) == (1, 1)
    cause = {"damaged": "damaged: ", "absent": "no such file", "another run's": "another model, "}
    assert result.err.startswith(f"error: {save}: {cause[what]}")
    assert "where the run to be resumed has its best model, of epoch 1" in result.err
    assert before == contents(tmp_path)


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_between_the_best_model_and_the_state_that_knows_of_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The model on the disk is then a later one than the state's; damaged: the state, too."""
    save, written = tmp_path / "whole.pt", list[Path]()

    def until_the_second_best(path: Path, *rest: Any) -> None:
        if written.count(save) == 2 and path.name == "last.pt":
            raise KeyboardInterrupt
        written.append(path)
        write_checkpoint(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_checkpoint", until_the_second_best)
        assert start(save, whole / "corpus", "--checkpoint-every", 5) == 1
    assert model_details(save)["epoch"] == 2
    if damaged:
        flip_a_weight(tmp_path / "whole" / "last.pt")
    assert start(save, whole / "corpus") == 0
    assert_same_run(whole / "whole.pt", save)


def test_what_is_damaged_is_not_kept(tmp_path: Path) -> None:
    path, keep = tmp_path / "last.pt", tmp_path / "last.previous.pt"
    for number in range(3):
        write_checkpoint(path, model_payload(small_model(), WORDS, number=number), keep)
        assert keep.exists() == (number > 0)
    assert model_details(keep) == {"number": 1}
    flip_a_weight(path)
    write_checkpoint(path, model_payload(small_model(), WORDS, number=3), keep)
    assert (model_details(path), model_details(keep)) == ({"number": 3}, {"number": 1})
    assert sorted(tmp_path.iterdir()) == [keep, path]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_kept_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path, keep = tmp_path / "a", tmp_path / "b"
    for content in ("one", "two", "three"):
        with atomic_write(path, "w", keep=keep) as file:
            file.write(content)
    assert (path.read_text(), keep.read_text()) == ("three", "two")
    keep.unlink()
    os.rename(path, keep)  # noqa: PTH104
    keep_content = keep.read_text()
    path.hardlink_to(keep) if links else path.write_text(keep_content)
    with atomic_write(path, "w", keep=keep) as file:  # killed once after the link was made
        file.write("four")
    assert (path.read_text(), keep.read_text()) == ("four", "three")
    assert sorted(tmp_path.iterdir()) == [path, keep]
