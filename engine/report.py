"""A run's log lines: in the original's format, and a shorter one for a terminal."""

import math

from evaluation.evaluate import perplexity

RULE = "-" * 89
DOUBLE_RULE = "=" * 89


def interval_line(
    *, epoch: int, batch: int, batches: int, lr: float, milliseconds: float, loss: float
) -> str:
    """The line of a logging interval; milliseconds per update, mean loss in nats per token."""
    return (
        f"| epoch {epoch:3d} | {batch:5d}/{batches:5d} batches | lr {lr:05.5f} "
        f"| ms/batch {milliseconds:5.2f} | {loss_figures('', loss)}"
    )


def epoch_line(*, epoch: int, seconds: float, loss: float, whole: bool = True) -> str:
    """The line of a validation, at an epoch's end or within it; loss in nats per token."""
    place = "end of" if whole else "within"
    return f"| {place} epoch {epoch:3d} | time: {seconds:5.2f}s | {loss_figures('valid ', loss)}"


def short_epoch_line(
    *, place: str, train_loss: float, loss: float, best: bool, seconds: float, lr: float, left: str
) -> str:
    """An epoch's line on a terminal: perplexities, * if it is the best epoch, time, rate, rest.

    Args:
        place: for instance "epoch  3/10".
        train_loss: mean training loss of the epoch, nats per token; nan: unknown.
        loss: validation loss, nats per token.
        left: what is left of the run, for instance "2 min left"; may be empty.
    """
    train, valid = (short_number(perplexity(x)) for x in (train_loss, loss))
    figures = f"ppl train {train:>7} valid {valid:>7} {'*' if best else ' '}"
    line = f"| {place} | {figures} | {duration(seconds)} | lr {lr:g}"
    return f"{line} | {left}" if left else line


def final_line(loss: float) -> str:
    """The line of the final test; loss in nats per token."""
    return f"| End of training | {loss_figures('test ', loss)}"


def short_number(value: float) -> str:
    """A perplexity in at most seven characters."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """For instance "0.4 s", "40 s", "2.5 min", "12 min", "3.5 h"."""
    unit, size = ("s", 1) if seconds < 90 else ("min", 60) if seconds < 5400 else ("h", 3600)
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def loss_figures(kind: str, loss: float) -> str:
    """Loss (nats per token), perplexity and bits of a text; kind names it and ends in a space."""
    return (
        f"{kind}loss {loss:5.2f} | {kind}ppl {perplexity(loss):8.2f} "
        f"| {kind}bpc {loss / math.log(2):8.3f}"
    )
