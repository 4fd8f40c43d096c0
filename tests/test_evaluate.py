"""evaluate.py and pointer.py, from their command lines to their files."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, Result, write_corpus

import awd_lstm
import evaluate as program
import main
import pointer
from data.corpus import Vocabulary
from data.text import read_text
from engine.checkpoint import load_model, model_payload, write_checkpoint
from evaluation.cache import Cache
from evaluation.dynamic import Dynamic, root_mean_squares
from evaluation.evaluate import evaluate, perplexity, score
from evaluation.plain import Plain
from evaluation.predictor import Mean, Predictor, Temperature
from model import RNNModel

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a corpus with <unk>."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "corpus")
    with (corpus / "train.txt").open("a") as file:
        file.write("<unk>\n")
    flags = [*TINY, "--data", str(corpus), "--save", str(folder / "m.pt"), "--epochs", "2"]
    assert main.main(flags) == 0
    return folder / "m.pt"


def summary_of(result: Result, path: Path) -> dict[str, Any]:
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(path.read_text())
    assert f"ppl {found['ppl']:8.2f}" in result.out
    return found


def test_it_finds_what_main_found(call: Run, trained: Path, tmp_path: Path) -> None:
    """The run's own corpus, if no other is named; validation in ten columns."""
    path = tmp_path / "summary.json"
    found = summary_of(call(program, trained, "--summary", path), path)
    run = json.loads((trained.with_suffix("") / "summary.json").read_text())
    assert found["ppl"] == run["test_ppl"]
    assert found["bpc"] == pytest.approx(math.log2(found["ppl"]))
    columns = ["--eval-batch-size", 3]
    found = summary_of(
        call(program, trained, "--split", "valid", *columns, "--summary", path), path
    )
    assert found["ppl"] == run["best_valid_ppl"]
    assert (
        summary_of(call(program, trained, "--split", "valid", "--summary", path), path)["columns"]
        == 10
    )


def test_all_of_it_together(call: Run, trained: Path, tmp_path: Path) -> None:
    model, vocabulary = load_model(trained)
    folder, path = trained.parent / "corpus", tmp_path / "summary.json"
    train, ids = (read_text(folder / f"{name}.txt", vocabulary).ids for name in ("train", "test"))
    roots = root_mean_squares(model, train, 4, 6, most=5)
    networks = [Dynamic(model, 1e-3, 0.01, 6, roots, 1e-4, masks=3 + k) for k in range(2)]
    expected = evaluate(Cache(Temperature(Mean(networks), 1.2), 20, 0.7, 0.15), ids, 1)
    result = call(
        program,
        *(trained, "--data", folder, "--summary", path, "--mc", 2, "--seed", 3),
        *("--temperature", 1.2, "--cache", "--window", 20, "--theta", 0.7, "--lambdasm", 0.15),
        *("--dynamic", "rms", "--lr", 1e-3, "--lamb", 0.01, "--epsilon", 1e-4, "--bptt", 6),
        *("--batch_size", 4, "--max_batches", 5),
    )
    found = summary_of(result, path)
    assert found["loss"] == expected
    settings = dict(lr=1e-3, lamb=0.01, theta=0.7, lambdasm=0.15, window=20, bptt=6, mc=2, seed=3)
    settings |= dict(epsilon=1e-4, batch_size=4, max_batches=5)
    assert settings.items() <= found.items()


def test_pointer_is_the_cache(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the original's command line."""
    folder = trained.parent / "corpus"
    line = f"--data {folder} --save {trained} --lambdasm 0.1279 --theta 0.662 --window 37"
    assert pointer.main([*line.split(), "--bptt", "2000"]) == 0
    model, vocabulary = load_model(trained)
    ids = read_text(folder / "test.txt", vocabulary).ids
    ppl = perplexity(evaluate(Cache(Plain(model), 37, 0.662, 0.1279), ids, 1))
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"\| End of training \| test loss .* \| test ppl +{ppl:.2f} \|.*", last)


def test_any_text(
    call: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files as one text after an <eos>, words that are unknown; by word and by line."""
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("w1 w2 news\nw3\n")
    second.write_text("\nw4 älter")
    words, by_line, path = (tmp_path / name for name in ("words.tsv", "lines.tsv", "s.json"))
    result = call(
        program,
        *(trained, "--text", first, second, "--per-word", words, "--by-line", by_line),
        *("--summary", path),
    )
    found = summary_of(result, path)
    assert (found["predictions"], found["unknown"]) == (10, 2)
    assert "2 words (20.0%) are not in the model's vocabulary" in result.err
    assert f"| {words}\n| {by_line}\n" in result.err
    model, vocabulary = load_model(trained)
    tokens = ["<eos>", "w1", "w2", "<unk>", "<eos>", "w3", "<eos>", "<eos>", "w4", "<unk>", "<eos>"]
    ids = torch.tensor([vocabulary.index(token) for token in tokens])
    scores = score(Plain(model), ids, 1).tolist()
    assert found["loss"] == pytest.approx(-sum(scores) / 10, rel=1e-6)
    rows = [line.split("\t") for line in words.read_text().splitlines()]
    assert rows[0] == ["word", "log_probability", "rank"]
    named = " ".join(row[0] for row in rows[1:])
    assert named == "w1 w2 news <eos> w3 <eos> <eos> w4 älter <eos>"
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(scores, abs=1e-5)
    predicted = model.decoder(model(ids[:-1, None], model.init_hidden(1))[0])
    better = [int((p > p[w]).sum()) for p, w in zip(predicted, ids[1:], strict=True)]
    assert [int(row[2]) - 1 for row in rows[1:]] == better
    table = [line.split("\t") for line in by_line.read_text().splitlines()[1:]]
    assert [(int(row[0]), int(row[1])) for row in table] == [(1, 4), (2, 2), (3, 1), (4, 3)]
    parts = [scores[:4], scores[4:6], scores[6:7], scores[7:]]
    means = [-sum(part) / len(part) for part in parts]
    assert [float(row[2]) for row in table] == pytest.approx(means, abs=1e-5)

    piped = io.BytesIO(first.read_bytes() + second.read_bytes())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=piped))
    again = summary_of(call(program, trained, "--text", "-", "--summary", path), path)
    assert again["loss"] == found["loss"]


def test_lines_of_a_corpus_are_those_of_its_file(call: Run, trained: Path, tmp_path: Path) -> None:
    """Also where the first one is empty, as WikiText's; its <eos> is not predicted."""
    (tmp_path / "test.txt").write_text("\nw1 w2\nw3\n")
    path = tmp_path / "lines.tsv"
    result = call(program, trained, "--data", tmp_path, "--by-line", path)
    assert result.code == 0, result.err
    table = [line.split("\t")[:2] for line in path.read_text().splitlines()[1:]]
    assert table == [["2", "3"], ["3", "2"]]


@pytest.mark.parametrize("dynamic", [None, "sgd", "rms"])
def test_search(call: Run, trained: Path, tmp_path: Path, dynamic: str | None) -> None:
    """The best on validation of the values that are given, which then are what the flags say."""
    model, vocabulary = load_model(trained)
    folder, path = trained.parent / "corpus", tmp_path / "s.json"
    flags: list[object] = [trained, "--cache", "--window", 30, "--summary", path]
    values: list[object] = ["--theta", 0.3, 3, "--lambdasm", 0, 0.2]
    if dynamic:
        flags += ["--dynamic", dynamic]
        values += ["--lr", 0, 1e-3, "--lamb", 0.01]
    if dynamic == "rms":
        flags += ["--batch-size", 4]
    found = summary_of(call(program, *flags, "--search", *values), path)
    train, valid = (read_text(folder / f"{n}.txt", vocabulary).ids for n in ("train", "valid"))
    roots = root_mean_squares(model, train, 4) if dynamic == "rms" else None
    rate = 0.0
    if dynamic:
        losses = {x: evaluate(Dynamic(model, x, 0.01, 5, roots), valid, 1) for x in (0, 1e-3)}
        rate = min(losses, key=losses.__getitem__)
        assert found["lr"] == rate
    base = Dynamic(model, rate, 0.01, 5, roots) if dynamic else Plain(model)
    grid = [(theta, share) for theta in (0.3, 3) for share in (0, 0.2)]
    mixed = {two: evaluate(Cache(base, 30, *two), valid, 1) for two in grid}
    assert (found["theta"], found["lambdasm"]) == min(mixed, key=mixed.__getitem__)
    shown = call(program, *flags, "--search", *values)
    listed = re.findall(r"^\| --theta .* valid ppl +([\d.]+)$", shown.err, re.MULTILINE)
    assert listed == [f"{math.exp(loss):.2f}" for loss in sorted(mixed.values())]
    chosen = re.search(r"best on the validation text: (.*) \| valid ppl +([\d.]+)", shown.out)
    assert chosen is not None
    assert float(chosen[2]) == pytest.approx(math.exp(min(mixed.values())), abs=0.006)
    assert summary_of(call(program, *flags, *chosen[1].split()), path)["loss"] == found["loss"]
    if dynamic:  # one pair of rates is not searched
        rates = ["--lr", rate, "--lamb", 0.01]
        shown = call(program, *flags, "--search", *values, *rates)
        assert "| --lr" not in shown.err
        assert summary_of(shown, path)["loss"] == found["loss"]


def test_errors_are_one_line(call: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    words = {"MODEL": str(trained), "EMPTY": str(tmp_path / "empty.txt")}
    for line, code, message in [
        ("nowhere.pt", 1, "nowhere.pt: no such file"),
        ("MODEL --text nowhere.txt", 1, "nowhere.txt: no such file"),
        ("MODEL --text EMPTY", 1, "empty.txt: empty"),
        ("MODEL --cache --lambdasm 1.5", 2, "--lambdasm: '1.5' is not a number in [0, 1]"),
        ("MODEL --lambdasm 0.5", 2, "--lambdasm: goes with --cache only"),
        ("MODEL --cache --epsilon 1", 2, "--epsilon: goes with --dynamic rms only"),
        ("MODEL --cache --theta 1 2", 2, "--theta: several values go with --search only"),
        ("MODEL --cache --search --search-tokens 9", 2, "goes with --dynamic and --search only"),
        ("MODEL --search", 2, "--search: goes with --cache or --dynamic only"),
        ("MODEL --split test --text EMPTY", 2, "--split: does not go with --text"),
        ("MODEL --eval-batch-size 5000", 2, "--eval-batch-size: "),
        ("MODEL --dynamic rms --batch_size 9999", 1, "training text: "),
        ("MODEL --per-word nowhere/words.tsv", 1, "nowhere/words.tsv: cannot write: it is a"),
    ]:
        result = call(program, *(words.get(word, word) for word in line.split()))
        *told, last = result.err.splitlines()
        assert (result.code, result.out) == (code, ""), line
        assert last.startswith("error: "), line
        assert message in last
        assert not any("Traceback" in text for text in told)


def test_a_vocabulary_without_unk_names_the_words(call: Run, tmp_path: Path) -> None:
    save, words = tmp_path / "m.pt", Vocabulary(["w1", "w2", "<eos>"])
    write_checkpoint(save, model_payload(RNNModel("LSTM", 3, 4, 5, 1), words))
    (tmp_path / "text.txt").write_text("w1 to be\n")
    result = call(program, save, "--text", tmp_path / "text.txt")
    assert (result.code, result.out) == (1, "")
    expected = f"error: {tmp_path}/text.txt: the vocabulary lacks 'to', 'be', and has no <unk>\n"
    assert result.err == expected
    (tmp_path / "one.txt").write_text("w1\n")
    path = tmp_path / "s.json"
    cached = call(program, save, "--text", tmp_path / "one.txt", "--cache", "--summary", path)
    assert summary_of(cached, path)["predictions"] == 2
    assert "--window 500 is longer than" in cached.err


def test_a_loss_that_is_not_a_number_is_null(call: Run, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    result = call(program, trained, "--dynamic", "sgd", "--lamb", 1e38, "--summary", path)
    assert "| test ppl      nan |" in result.out
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (found["loss"], found["ppl"], found["lamb"]) == (None, None, 1e38)


def test_a_pair_whose_loss_is_not_a_number_is_not_chosen(
    call: Run, trained: Path, tmp_path: Path
) -> None:
    """Wherever it stands among the others."""
    flags, path = [trained, "--dynamic", "sgd", "--search", "--lr", 0.1], tmp_path / "s.json"
    for lambs in ((1e38, 0.01), (0.01, 1e38)):
        found = summary_of(call(program, *flags, "--lamb", *lambs, "--summary", path), path)
        assert found["lamb"] == 0.01


def test_search_tokens_are_those_that_the_rates_are_searched_on(
    call: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def noted(predictor: Predictor, ids: torch.Tensor, columns: int) -> float:
        lengths.append(len(ids))
        return evaluate(predictor, ids, columns)

    monkeypatch.setattr("programs.evaluate.evaluate", noted)
    flags = [trained, "--dynamic", "sgd", "--search", "--lr", 0, 1e-3, "--lamb", 0.01]
    assert call(program, *flags, "--search-tokens", 17).code == 0
    assert lengths == [18, 18]  # and the first word, which is not predicted


def test_the_library_divides_a_text_as_asked(trained: Path) -> None:
    path = trained.parent / "corpus" / "valid.txt"
    model, vocabulary = load_model(trained)
    ids = read_text(path, vocabulary).ids
    lm = awd_lstm.load(trained)
    assert lm.evaluate(path).loss == evaluate(Plain(model), ids, 1)
    assert lm.evaluate(path, columns=3).loss == evaluate(Plain(model), ids, 3)
    assert lm.evaluate(path, columns=3).loss != lm.evaluate(path).loss
