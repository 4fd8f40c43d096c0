"""The end of a run: test the best model, print the results, write the summary."""

import argparse
import math
import sys
from typing import Any

from engine.checkpoint import load_model
from engine.device import peak_memory, release_freed_memory
from engine.history import AXES, read_history
from engine.report import DOUBLE_RULE, final_line, short_number
from engine.tracking import Tracker, warn
from evaluation.bigram import bigram_loss
from evaluation.evaluate import evaluate, perplexity
from evaluation.plain import Plain
from evaluation.sampling import sample_sentences
from pictures.run_curves import draw_runs
from training.advice import beaten_by_bigrams
from training.divergence import divergence
from training.trainer import Trainer


def test_best(
    args: argparse.Namespace, trainer: Trainer, tracker: Tracker, summary: dict[str, Any]
) -> None:
    """Test the best model, write the summary, sample."""
    folder = trainer.folder
    model, vocabulary = load_model(folder.model_path, trainer.device)
    ids = trainer.corpus.test
    release_freed_memory()
    loss = evaluate(Plain(model), ids, args.test_batch_size)
    results = dict(loss=loss, ppl=perplexity(loss), bpc=loss / math.log(2))
    tracker.log("test", step=trainer.at.update, **results)
    summary["test_ppl"] = results["ppl"]
    print(DOUBLE_RULE)
    part = " | --quick: of a part of the text" * args.quick
    if args.bigram:
        corpus = trainer.corpus
        texts = (corpus.train.numpy(), corpus.valid.numpy(), ids.numpy())
        bigram = perplexity(bigram_loss(*texts, len(vocabulary)))
        summary["bigram_ppl"] = bigram
        print(f"| Interpolated bigram model of the same text | test ppl {bigram:8.2f}{part}")
        for text in beaten_by_bigrams(results["ppl"], bigram):
            warn(text)
    print(f"{final_line(loss)}{part}", flush=True)
    print_end(trainer, loss, summary)
    conclude(trainer, tracker, summary)
    sentences = list(sample_sentences(Plain(model), vocabulary, args.samples, args.seed))
    print(*(f"| It writes: {sentence}\n" for sentence in sentences), sep="", end="")
    tracker.log_samples(sentences, step=trainer.at.update)
    log_curves(trainer, tracker)


def log_curves(trainer: Trainer, tracker: Tracker) -> None:
    """Show the run's curves, as plot.py draws them, in W&B. No-op without a W&B run."""
    if tracker.wandb_url is None:
        return
    history = read_history(trainer.folder.folder)
    if history.lacks("update"):
        return
    try:
        figure = draw_runs([history.curves("update", history.folder.name)], AXES["update"])
    except ImportError as error:
        warn(f"the picture of the curves is left out: {error}")
        return
    tracker.log_picture("curves", figure, step=trainer.at.update)


def print_end(trainer: Trainer, test_loss: float, summary: dict[str, Any]) -> None:
    """Print the best model on a terminal; note in the summary whether the run has diverged."""
    at, path = trainer.at, trainer.folder.model_path
    if sys.stdout.isatty():
        of = f"of update {at.update}"
        if at.best_epoch is not None:
            of = f"of epoch {at.best_epoch}, valid ppl {short_number(perplexity(at.best_loss))}"
        print(f"| the best model is {path}, {of}: python diagnose.py {path}")
    words, early = len(trainer.corpus.vocabulary), at.epoch == 1
    cause = at.diverged or divergence("test", test_loss, words, early)
    summary["diverged"] = bool(cause)
    if cause:
        # The epoch has been warned of with its cause.
        warn(f"this run has diverged{'' if at.diverged else f': {cause}'}")
        summary["cause"] = cause


def conclude(trainer: Trainer, tracker: Tracker, summary: dict[str, Any]) -> None:
    """Write summary.json and W&B's summary."""
    at = trainer.at
    summary = dict(
        best_valid_ppl=perplexity(at.best_loss),
        test_ppl=summary.pop("test_ppl", None),
        best_epoch=at.best_epoch,
        epochs=max(0, at.epoch - 1),
        updates=at.update,
        seconds=at.seconds,
        tokens_per_second=at.tokens / max(at.training_seconds, 1e-9),
        peak_memory_bytes=peak_memory(trainer.device),
        overflows=at.overflows,
        **summary,
    )
    trainer.folder.write_json("summary.json", summary)
    tracker.summarize(**summary)
