"""Whatever a user can get wrong: one line, the right exit code, and nothing harmed."""

import json
import math
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, Result, read_summary, write_corpus
from test_checkpoint import bad_file

from engine.ablation import runs as ablation_runs
from engine.ablation.table import Row
from training.divergence import divergence

Run = Callable[..., Result]

OUT_OF_RANGE = [
    "--emsize 0", "--emsize -3", "--emsize 2.5", "--emsize ten", "--emsize 99999999999999999999999",
    "--nhid 0", "--nlayers 0",
    "--model QRNN", "--model nonsense",
    "--dropout 1", "--dropout -0.1", "--dropout nan", "--dropouth 1.5", "--dropouti 1",
    "--dropoute 1", "--wdrop 1", "--wdrop x", "--alpha -1", "--beta inf", "--wdecay -1e-9",
    "--optimizer rmsprop", "--lr 0", "--lr -1", "--lr nan", "--lr inf", "--clip -1",
    "--batch-size 0", "--batch_size 1.5", "--bptt 0", "--bptt-scheme random", "--epochs 0",
    "--k1 0", "--k1 -2", "--k1 1.5", "--k1 3", "--k1 3 --bptt-scheme randomized",
    "--k1 3 --bptt-scheme full", "--keep-prob 0 --bptt-scheme randomized",
    "--keep-prob 1 --bptt-scheme randomized", "--keep-prob nan --bptt-scheme randomized",
    "--keep-prob 0.5", "--keep-prob 0.5 --bptt-scheme fixed", "--keep-prob 0.5 --bptt-scheme full",
    "--max-updates 0", "--grad-filter-normalize", "--grad-filter 0 --grad-filter-normalize",
    "--nonmono -1", "--nonmono-decay 2", "--loss-scale no",
    "--loss-scale-bounds 2 1", "--when 0", "--when one", "--seed -1",
    "--seed 4294967296", "--device tpu", "--device cuda:99", "--device meta", "--device ''",
    "--cuda", "--save nosuffix", "--resume auto", "--checkpoint-every 0",
    "--checkpoint-minutes 0", "--eval-batch-size 0", "--test-batch-size 0", "--samples -1",
    "--log-interval 0", "--wandb maybe", "--nosuchflag", "stray", "@nosuchrecipe.txt",
]  # fmt: skip


def only_line(result: Result, code: int) -> str:
    """The one line on stderr, after the checks that every error has to pass."""
    assert result.code == code, result
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1
    return result.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("flags", OUT_OF_RANGE)
def test_flags_out_of_range(run: Run, tmp_path: Path, flags: str) -> None:
    argv = shlex.split(flags)
    result = run("--data", tmp_path / "nowhere", *argv)
    line = only_line(result, 2)
    assert argv[0].lstrip("-@").replace("_", "-")[:8] in line.replace("_", "-")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there_is_named_as_given(run: Run, tmp_path: Path) -> None:
    line = only_line(run("--resume", "nothere/last.pt"), 1)
    assert line.startswith("nothere/last.pt: no such run, or it has no checkpoint yet (give")
    (tmp_path / "vocab.txt").touch()
    exported = f"{tmp_path}: an exported model has no run; finetune.py goes on from it"
    assert only_line(run("--resume", tmp_path), 1) == exported
    for kind, message in (
        ("other shape", "a model without its run; finetune.py goes on from it"),
        ("original", "refused, because loading it would run code"),
    ):
        path = bad_file(kind, tmp_path)
        assert only_line(run("--resume", path), 1).startswith(f"{path}: {message}")


def test_recipe_that_is_missing_or_not_text(run: Run, tmp_path: Path) -> None:
    assert only_line(run("@no.txt"), 2) == "@no.txt: No such file or directory"
    assert "a recipe is given as @FILE" in only_line(run("recipes/demo.txt"), 2)
    assert "did you mean --data?" in only_line(run("--dataa", tmp_path), 2)
    (tmp_path / "recipe").write_bytes(b"\xff\xfe\x00")
    assert only_line(run(f"@{tmp_path / 'recipe'}"), 2) == f"@{tmp_path / 'recipe'}: not UTF-8 text"


BAD_TEXTS = {
    "missing": None,
    "empty": b"",
    "binary": b"the cat\x00\x01\x02 sat\n",
    "not UTF-8": "the caf\u00e9\n".encode("latin-1") * 9,
    "one token": b"\n",
    "shorter than the batch": b"a b\n",
}


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_texts(run: Run, corpus_folder: Path, tmp_path: Path, kind: str, split: str) -> None:
    path = corpus_folder / f"{split}.txt"
    content = BAD_TEXTS[kind]
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    save = tmp_path / "run.pt"
    result = run(*TINY, "--data", corpus_folder, "--save", save, "--test-batch-size", 3)
    assert str(path) in only_line(result, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_texts_that_never_end(run: Run, corpus_folder: Path, tmp_path: Path, split: str) -> None:
    path = corpus_folder / f"{split}.txt"
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.unlink()
        make()
        result = run(*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt")
        assert only_line(result, 1) == f"{path}: not a regular file"
    assert not (tmp_path / "run").exists()


def test_a_message_stays_one_line(run: Run, tmp_path: Path) -> None:
    result = run(*TINY, "--data", f"{tmp_path}/a\nb\x1b[2J\u2028c", "--save", tmp_path / "run.pt")
    assert only_line(result, 1).startswith(rf"{tmp_path}/a\nb\x1b[2J\u2028c: no such folder")


def test_no_corpus(run: Run, tmp_path: Path) -> None:
    flags = [*TINY, "--save", tmp_path / "run.pt"]
    assert str(tmp_path / "nowhere") in only_line(run(*flags, "--data", tmp_path / "nowhere"), 1)
    (tmp_path / "file").write_text("text\n")
    assert str(tmp_path / "file") in only_line(run(*flags, "--data", tmp_path / "file"), 1)


def test_a_model_that_cannot_fit(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    size = 2**31 - 1  # hundreds of gigabytes: refused by malloc, where less might be granted
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--emsize", size]
    assert "memory is too small" in only_line(run(*flags), 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", ["variable", "full"])
def test_a_window_that_cannot_fit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus", lines=800)
    flags = [*TINY, "--data", corpus, "--save", tmp_path / "run.pt", "--bptt-scheme", scheme]
    monkeypatch.setattr("programs.plan.available_memory", lambda _: 3 * 2**20)
    flags += ["--max-updates", 1]
    line = only_line(run(*flags, "--bptt", 2000), 2)
    flag = "--bptt-scheme" if scheme == "full" else "--bptt"
    figures = r"an update would need about \d MiB and 3 MiB are available"
    assert re.match(f"argument {flag}: {figures}", line)
    assert not (tmp_path / "run").exists()
    result = run(*flags, "--bptt", 20)
    assert result.code == 0
    assert ("| full BPTT | one update an epoch" in result.err) == (scheme == "full")


@pytest.mark.parametrize("where", ["missing/run.pt", "file/run.pt", "folder.pt"])
def test_output_places(run: Run, corpus_folder: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.pt").mkdir()
    result = run(*TINY, "--data", corpus_folder, "--save", tmp_path / where)
    assert str((tmp_path / where).parent) in only_line(result, 1)
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "folder.pt").iterdir()) == []


def test_a_folder_that_is_no_run_is_left_alone(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    """--save data.pt must not move data/ out of the way."""
    before = {path: path.read_bytes() for path in corpus_folder.glob("*.txt")}
    result = run(*TINY, "--data", corpus_folder, "--save", f"{corpus_folder}.pt")
    assert f"{corpus_folder}: has files that are no run's" in only_line(result, 1)
    assert {path: path.read_bytes() for path in corpus_folder.glob("*.txt")} == before
    assert not (corpus_folder / ".lock").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_unwritable_output(run: Run, corpus_folder: Path) -> None:
    result = run(*TINY, "--data", corpus_folder, "--save", "/proc/run.pt")
    assert "/proc/run: cannot write" in only_line(result, 1)


def test_divergence(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt"]
    assert run(*flags, "--epochs", 1).code == 0
    model, last = tmp_path / "run.pt", tmp_path / "run" / "last.pt"
    state = torch.load(last, weights_only=True)
    update = state["position"]["update"]
    # The second column of a state that explodes in the next update.
    state["hidden"][0][0][0, 1] = float("nan")
    torch.save(state, last)
    before = model.read_bytes(), last.read_bytes()
    result = run("--resume", last, "--epochs", 9, "--checkpoint-every", 1)
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        f"error: loss is nan at update {update + 1} (epoch 2, lr 2): training stopped; "
        "a smaller --lr, or --clip, may help"
    )
    assert (model.read_bytes(), last.read_bytes()) == before
    events = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] is not None for line in events)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["diverged"] is True
    assert summary["test_ppl"] is None


def test_divergence_that_stays_finite(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    """It is warned of as it happens and marked, and training goes on; a short start is no sign."""
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--clip", 0]
    flags += ["--alpha", 0, "--beta", 0, "--wdecay", 0, "--epochs", 3, "--lr", 100]
    assert run(*flags, "--max-updates", 2).code == 0
    assert read_summary(tmp_path / "run.pt")["diverged"] is False
    result = run(*flags)
    assert result.code == 0, result.err
    happened, end = (line for line in result.err.splitlines() if "diverged" in line)
    words = r"\w+ perplexity \S+ is worse than guessing among the vocabulary's 31 words"
    assert re.fullmatch(rf"warning: epoch 1 has diverged: {words}", happened)
    assert end == "warning: this run has diverged"
    summary = read_summary(tmp_path / "run.pt")
    assert (summary["diverged"], summary["epochs"]) == (True, 3)
    assert re.fullmatch(words, summary["cause"])
    table_run = ablation_runs.Run(Row("a"), 1, [], dict(epochs=3), tmp_path / "run.pt")
    assert ablation_runs.read_state(table_run).kind == "diverged"


def test_what_divergence_is() -> None:
    log_words = math.log(1000)
    for loss, early, whether in [
        (1.1 * log_words - 0.01, False, False),
        (1.1 * log_words + 0.01, False, True),
        (2 * log_words - 0.01, True, False),
        (2 * log_words + 0.01, True, True),
        (math.inf, True, True),
        (math.nan, False, False),
    ]:
        assert bool(divergence("test", loss, 1000, early)) == whether


def test_divergence_by_learning_rate(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--epochs", 50]
    assert run(*flags, "--lr", 1e31).code == 2  # torch could not take it
    result = run(*flags, "--lr", 1e30)
    assert result.code == 1
    assert " at update " in result.err.splitlines()[-1]
    assert not (tmp_path / "run.pt").exists()
