"""Where parts meet: each test is red with a slip in the wiring that other tests let pass."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, read_events, read_summary
from row_by_row import build_trainer
from test_fused_update import Built
from test_predictors import small_model, text
from test_tables import runs_of, write_summary

from bptt import FixedWindows
from data.corpus import Vocabulary, load_corpus
from engine.ablation.results import collect
from engine.ablation.stages import SPLITS
from engine.ablation.table import Row, Table
from engine.checkpoint import load_model, model_details, model_payload
from engine.checkpoint_writer import CheckpointWriter
from engine.errors import DivergenceError
from engine.model_folder import write_model_folder
from engine.ranks import Ranks
from engine.report import short_epoch_line
from evaluation.bigram import bigram_loss
from evaluation.cache import Cache
from evaluation.dynamic import Dynamic
from evaluation.evaluate import score
from evaluation.plain import Plain
from evaluation.predictor import Mean, Predictor, Temperature
from flags.evaluation import parse_evaluation
from gradient_filter import GradientFilter
from kernels.fused_step import FusedStep
from loss_scale import LossScale
from model import RNNModel
from programs.evaluate import default_columns
from programs.evaluate import score as score_words
from training.callbacks import FilterFigures
from training.display import Display
from training.state import Position, TrainingOptions

Run = Callable[..., Result]

# Training


def test_checkpoints_and_diagnostics_are_due_by_the_run_s_updates(
    run: Run, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fourth update of the run, whatever epoch it is in; checkpoints at its end, too."""
    write, written = CheckpointWriter.write, list[int]()

    def noted(self: CheckpointWriter, path: Path, payload: dict[str, Any], *more: Any) -> None:
        if path.name == "last.pt":
            written.append(payload["position"]["update"])
        write(self, path, payload, *more)

    monkeypatch.setattr(CheckpointWriter, "write", noted)
    save = tmp_path / "run.pt"
    flags = [*TINY, "--data", corpus_folder, "--save", save, "--bptt-scheme", "fixed"]
    flags += ["--epochs", 2, "--bptt", 7, "--checkpoint-every", 4, "--diagnostics", 4]
    assert run(*flags).code == 0
    ends = [line["step"] for line in read_events(save) if line["event"] == "valid"]
    assert ends[0] % 4, "a count by the epoch's updates has to be another one"
    assert written == sorted({*range(4, ends[-1], 4), *ends})
    measured = [line["step"] for line in read_events(save) if line["event"] == "diagnostics"]
    assert measured == list(range(4, ends[-1] + 1, 4))


def test_a_run_that_recovers_has_not_diverged(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    """Only its last epoch counts: a first one that is lost in training leaves no mark."""
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--epochs", 5]
    flags += ["--alpha", 0, "--beta", 0, "--wdecay", 0, "--lr", 200, "--when", 1]
    result = run(*flags)
    assert result.code == 0, result.err
    assert "warning: epoch 1 has diverged: " in result.err
    assert "this run has diverged" not in result.err
    assert read_summary(tmp_path / "run.pt")["diverged"] is False


def test_a_stop_at_an_epoch_s_end_validates_once(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run.pt"
    flags = [*TINY, "--data", corpus_folder, "--bptt-scheme", "fixed", "--save", save]
    assert run(*flags, "--epochs", 1).code == 0
    whole = read_events(save)
    end = whole[-1]["step"]
    assert run(*flags, "--epochs", 2, "--max-updates", end).code == 0
    assert read_events(save) == whole
    assert read_summary(save)["epochs"] == 1


def test_each_rank_resumes_from_its_own_columns() -> None:
    """The states of the whole batch are dealt out as its text is."""
    states = [tuple(torch.rand(1, 6, units) for _ in range(2)) for units in (4, 5)]
    columns = torch.arange(6)
    for rank in range(3):
        ranks = Ranks(rank, 3)
        own = columns[ranks.share(6)].tolist()
        assert own == [2 * rank, 2 * rank + 1]
        for found, whole in zip(ranks.share_hidden(states), states, strict=True):
            for part, of in zip(found, whole, strict=True):
                assert torch.equal(part, of[:, own])


def test_freed_memory_is_released_during_training(
    run: Run, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    monkeypatch.setattr("training.callbacks.release_freed_memory", lambda: released.append(True))
    monkeypatch.setattr("training.callbacks.MemoryRelease.EVERY", 4)
    save = tmp_path / "run.pt"
    assert run(*TINY, "--data", corpus_folder, "--save", save, "--max-updates", 11).code == 0
    assert len(released) == 2


@pytest.fixture
def epochs_told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the line of each epoch is made of."""
    found: list[dict[str, Any]] = []

    def noted(**told: Any) -> str:
        found.append(told)
        return short_epoch_line(**told)

    monkeypatch.setattr("training.display.short_epoch_line", noted)
    return found


def test_how_long_is_left_follows_from_this_session_s_speed(
    epochs_told: list[dict[str, Any]],
) -> None:
    """Two slow epochs before the resumption do not count."""
    at, options = Position(epoch=3, seconds=5000.0), TrainingOptions(epochs=6, batch_size=4)
    display = Display(at, options, 10, FixedWindows(5))
    display.begin()
    at.row, at.seconds = 10, 5010.0
    display.validated(1.0, 1.0, best=False)
    assert [told["left"] for told in epochs_told] == ["30 s left"]


@pytest.mark.parametrize(
    ("epoch", "whole", "ratio", "diverged"),
    [(1, True, 1.5, False), (1, True, 2.1, True), (1, False, 1.5, False), (2, True, 1.5, True),
     (2, False, 1.5, True), (2, True, 1.05, False)],
)  # fmt: skip
def test_the_first_epoch_s_training_may_be_worse_than_guessing(
    tmp_path: Path, epoch: int, whole: bool, ratio: float, diverged: bool
) -> None:
    """Its mean has the first updates in it. ratio: to the loss of guessing."""
    trainer = build_trainer(tmp_path, FixedWindows(10), 10)
    at, guessing = trainer.at, math.log(len(trainer.corpus.vocabulary))
    at.epoch, at.row = epoch, trainer.num_steps if whole else 1
    at.epoch_tokens, at.epoch_loss = 50, 50 * ratio * guessing
    with trainer.writer:
        trainer.validate()
    assert bool(at.diverged) == diverged
    assert at.diverged.startswith("training perplexity") == diverged


def test_of_two_validations_alike_the_first_is_the_best(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, FixedWindows(10), 10)
    with trainer.writer:
        for epoch in (1, 2):
            trainer.at.epoch = epoch
            trainer.validate()
    assert trainer.at.best_epoch == model_details(tmp_path / "run.pt")["epoch"] == 1


def test_a_validation_that_is_not_a_number_ends_training(tmp_path: Path) -> None:
    """Where the weights' average is lost, say, and no gradient shows it."""
    trainer = build_trainer(tmp_path, FixedWindows(10), 10)
    with trainer.writer:
        trainer.validate()
        before, best = (tmp_path / "run.pt").read_bytes(), trainer.at.best_loss
        trainer.model.encoder.weight.data[3] = math.nan
        with pytest.raises(DivergenceError, match=r"validation loss is nan at update 0 \(epoch 1"):
            trainer.validate()
    assert ((tmp_path / "run.pt").read_bytes(), trainer.at.best_loss) == (before, best)


def test_a_copy_of_when_that_is_written_again_takes_no_other_file_s_place(tmp_path: Path) -> None:
    """A run that was killed right then does so as it goes on."""
    trainer = build_trainer(tmp_path, FixedWindows(10), 10)
    with trainer.writer:
        for loss, suffix in ((1.0, ""), (0.9, ""), (0.9, ".e1"), (0.9, ".e1")):
            trainer.evaluated.save(loss, suffix)
    assert model_details(tmp_path / "run" / "best.previous.pt")["valid_loss"] == 1.0
    assert {path.name for path in tmp_path.glob("run.*")} == {"run.pt", "run.pt.e1"}


def test_only_the_leader_writes(tmp_path: Path) -> None:
    class Follower(Ranks):
        def gather(self, columns: torch.Tensor, dim: int) -> torch.Tensor:
            return columns

    trainer = build_trainer(tmp_path, FixedWindows(10), 10)
    trainer.ranks = trainer.requests.ranks = Follower(1, 2)
    with trainer.writer:
        trainer.checkpoint()
        trainer.evaluated.save(1.0)
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {"corpus"}


def test_the_bigram_model_is_fitted_on_the_validation_text(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates", 1]
    assert run(*flags, "--bigram").code == 0
    corpus = load_corpus(corpus_folder)
    train, valid, test = (x.numpy() for x in (corpus.train, corpus.valid, corpus.test))
    words = len(corpus.vocabulary)
    expected = math.exp(bigram_loss(train, valid, test, words))
    assert read_summary(tmp_path / "run.pt")["bigram_ppl"] == pytest.approx(expected)
    assert expected > 1.0001 * math.exp(bigram_loss(train, test, test, words))


# Skipped updates


@pytest.mark.parametrize(("precision", "least"), [("fp32", 2.0**126), ("bf16", 2.0**60)])
def test_a_skipped_update_has_no_diagnostics(
    run: Run, corpus_folder: Path, tmp_path: Path, precision: str, least: float
) -> None:
    save = tmp_path / "run.pt"
    flags = [*TINY, "--data", corpus_folder, "--save", save, "--epochs", 1, "--bptt", 3]
    flags += ["--bptt-scheme", "fixed", "--loss-scale", "dynamic", "--loss-scale-window", 1]
    flags += ["--loss-scale-bounds", least, 2.0**130, "--precision", precision]
    result = run(*flags, "--diagnostics", 1)
    assert result.code == 0, result.err
    events = read_events(save)
    skipped = {e["step"] for e in events if e["event"] == "loss_scale" and e["overflow"]}
    measured = [e["step"] for e in events if e["event"] == "diagnostics"]
    assert skipped
    assert measured == [n for n in range(1, events[-1]["step"] + 1) if n not in skipped]


def test_an_interval_s_line_says_how_many_updates_were_skipped(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run.pt"
    flags = [*TINY, "--data", corpus_folder, "--save", save, "--epochs", 1]
    flags += ["--loss-scale", "dynamic", "--loss-scale-window", 1]
    result = run(*flags, "--loss-scale-bounds", 2.0**126, 2.0**130)
    assert result.code == 0, result.err
    lines = [e for e in read_events(save) if e["event"] == "train"]
    assert any(line["overflows"] for line in lines)
    told = re.findall(r"\| loss scale (\S+), (\d+) skipped", result.err)
    assert told == [(f"{line['loss_scale']:g}", str(line["overflows"])) for line in lines]


def test_an_epoch_s_training_perplexity_is_the_mean_over_its_own_updates(
    run: Run, corpus_folder: Path, tmp_path: Path, epochs_told: list[dict[str, Any]]
) -> None:
    """Those that were skipped do not count, nor do those of the epoch before."""
    save, rows = tmp_path / "run.pt", len(load_corpus(corpus_folder).train) // 4 - 1
    flags = [*TINY, "--data", corpus_folder, "--save", save, "--epochs", 2, "--bptt", 3]
    flags += ["--bptt-scheme", "fixed", "--loss-scale", "dynamic", "--loss-scale-window", 1]
    assert run(*flags, "--loss-scale-bounds", 2.0**126, 2.0**130).code == 0
    events, updates = read_events(save), -(-rows // 3)
    skipped = {e["step"] for e in events if e["event"] == "loss_scale" and e["overflow"]}
    last, expected = 0, []
    for epoch in (1, 2):
        summed = counted = 0.0
        for line in (e for e in events if e["event"] == "train" and e["epoch"] == epoch):
            own = set(range(last + 1, line["step"] + 1)) - skipped
            last = line["step"]
            tokens = sum(min(3, rows - (n - 1) % updates * 3) for n in own)
            summed, counted = summed + tokens * (line["loss"] or 0.0), counted + tokens
        expected.append(summed / counted)
        assert skipped & set(range((epoch - 1) * updates + 1, epoch * updates + 1))
    assert [told["train_loss"] for told in epochs_told] == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("with_cudnn")
def test_a_skipped_update_is_no_iterate_of_the_average() -> None:
    """The optimizer's count, which checkpoints store, is the device's."""
    for kind in ("plain", "fast"):
        rules = LossScale(2.0**26, high=2.0**40, window=2)
        built = Built(kind, loss_scale=rules, dtype=torch.float32)
        bias = built.model.decoder.bias
        assert isinstance(bias, torch.Tensor)
        bias.register_hook(lambda g: g.where(g.abs() < 65504, torch.inf))
        built.train(30)  # the average is of the last 15
        skipped = sum(built.overflows[15:])
        assert skipped > 0
        assert built.optimizer.num_averaged == 15 - skipped
        if isinstance(built.step, FusedStep):
            assert int(built.step.num_averaged) == built.optimizer.num_averaged


def test_a_filter_s_figures_are_those_of_one_interval() -> None:
    gradient_filter = GradientFilter(threshold=2.0)
    figures = FilterFigures([gradient_filter]).figures
    for exploding, singled_out in ((True, 1 / 4), (False, 0.0), (True, 1 / 4)):
        x = torch.ones(3, 4, 5, requires_grad=True)
        sizes = torch.ones(4)
        sizes[2] = 100.0 if exploding else 1.0
        (gradient_filter(x)[0] * sizes[:, None]).sum().backward()
        assert figures()["grad_filter_singled_out_l0"] == singled_out
    assert figures()["grad_filter_smallest_l0"] == 1


# After training


def test_what_is_put_around_dynamic_evaluation_learns_after_the_same_segments() -> None:
    """Settings that change nothing leave its predictions."""
    model, ids = small_model(), text()

    def dynamic() -> Predictor:
        return Dynamic(model, 0.1, 0.2, segment=4)

    expected = score(dynamic(), ids, 1)
    assert not torch.allclose(expected, score(Plain(model), ids, 1))
    for predictor in (Temperature(dynamic(), 1), Mean([dynamic()]), Cache(dynamic(), 6, 0.9, 0)):
        torch.testing.assert_close(score(predictor, ids, 1), expected, rtol=1e-9, atol=0)


def test_words_of_several_columns_are_told_in_the_text_s_order() -> None:
    """Log-probability and rank of each, as of a column by itself; 40 words: 14, 13 and 13."""
    model, ids = small_model(), text()
    found = score_words(Plain(model), ids, 3, True)
    columns = [
        score_words(Plain(model), ids[start : stop + 1], 1, True)
        for start, stop in ((0, 14), (14, 27), (27, 40))
    ]
    for whole, *parts in zip(found, *columns, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))


@pytest.mark.parametrize(("method", "rate"), [("sgd", 0.1), ("rms", 5e-5)])
def test_the_rate_of_dynamic_evaluation_is_what_help_says(method: str, rate: float) -> None:
    args = parse_evaluation(["PTB.pt", "--dynamic", method])
    assert (args.lr, args.lamb) == ([rate], [0.002])


def test_an_exported_model_has_every_setting(tmp_path: Path) -> None:
    """Also those that do not act in evaluation: a run may start from it."""
    settings: dict[str, Any] = dict(
        dropout=0.11, dropouth=0.12, dropouti=0.13, dropoute=0.14, wdrop=0.15, tie_weights=True,
        grad_filter=3.0, grad_filter_normalize=True,
    )  # fmt: skip
    model = RNNModel("GRU", 3, 4, 5, 2, **settings)
    payload = model_payload(model, Vocabulary(["<eos>", "a", "b"]), epoch=1)
    write_model_folder(tmp_path / "exported", payload)
    found = load_model(tmp_path / "exported")[0].config()
    assert found == model.config()
    assert settings.items() <= found.items()


@pytest.mark.parametrize(
    ("flags", "columns"),
    [
        ("", 10), ("--cache", 1), ("--dynamic sgd", 1), ("--dynamic rms", 1), ("--by-line x", 1),
        ("--per-word x", 1), ("--mc 2", 10), ("--temperature 2", 10),
    ],
)  # fmt: skip
def test_the_validation_text_has_ten_columns_unless_what_is_asked_needs_one(
    flags: str, columns: int
) -> None:
    args = parse_evaluation(["PTB.pt", "--split", "valid", *flags.split()])
    assert default_columns(args) == columns
    assert default_columns(parse_evaluation(["PTB.pt", *flags.split()])) == 1


# Tables


def test_holm_s_p_is_that_of_its_split(tmp_path: Path) -> None:
    """Of two rows the smaller p counts twice, and the larger one no less than that."""
    rows = [Row("base"), Row("one"), Row("two")]
    runs = runs_of(tmp_path, rows, (1, 2, 3))
    test = [60, 61, 62, 63.0, 65, 64.5, 61, 63, 62.5]
    valid = [70, 71, 72, 70.5, 71, 73, 75, 75, 78.0]
    for run, t, v in zip(runs, test, valid, strict=True):
        write_summary(run, test_ppl=t, best_valid_ppl=v)
    figures = collect(Table(tmp_path / "t.toml", "A", [], rows, [1, 2, 3]), runs, tmp_path)
    for split in SPLITS:
        differences = [row["difference"][split] for row in figures["rows"][1:]]
        low, high = sorted(differences, key=lambda difference: difference["p"])
        assert low["p_holm"] == pytest.approx(min(1, 2 * low["p"]))
        assert high["p_holm"] == pytest.approx(min(1, max(2 * low["p"], high["p"])))


def test_an_epoch_that_was_cut_short_has_no_time(tmp_path: Path) -> None:
    row = Row("base")
    table = Table(tmp_path / "t.toml", "A", [], [row], [1])
    [one] = runs_of(tmp_path, [row], (1,), epochs=9, max_updates=20)
    write_summary(one, updates=20, test_ppl=80.0, seconds=30.0)
    for ends, expected in ((8, 20), 15.0), ((8, 16, 20), None):
        lines = [dict(event="valid", step=s, epoch=e, ppl=9.0) for e, s in enumerate(ends, 1)]
        (one.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        [found] = collect(table, [one], tmp_path)["rows"]
        assert found["seconds_per_epoch"] == expected
