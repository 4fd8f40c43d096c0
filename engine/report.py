"""A run's log lines, in the original's format."""

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


def final_line(loss: float) -> str:
    """The line of the final test; loss in nats per token."""
    return f"| End of training | {loss_figures('test ', loss)}"


def loss_figures(kind: str, loss: float) -> str:
    """Loss (nats per token), perplexity and bits of a text; kind names it and ends in a space."""
    return (
        f"{kind}loss {loss:5.2f} | {kind}ppl {perplexity(loss):8.2f} "
        f"| {kind}bpc {loss / math.log(2):8.3f}"
    )
