"""What counts as divergence: the one definition, for warnings, summary.json and ablate.py."""

import math

from evaluation.evaluate import perplexity

# A model that has hardly trained is a little worse than uniform, by its random weights.
MARGIN = 1.1


def divergence(what: str, loss: float, num_words: int) -> str:
    """Why a mean loss says that training has diverged; empty if it does not.

    It says so if it is infinite, or its perplexity is more than MARGIN times the vocabulary's size,
    which is the perplexity of the uniform distribution. An epoch has diverged if its validation
    loss or, from the second epoch on, its mean training loss says so. Training then continues, and
    the last epoch decides about the run. A loss or gradient that is not finite ends training with
    a DivergenceError, see training.tally.

    Args:
        what: what the loss is of: "training", "validation", "test".
        loss: nats per token; nan: there is none.
        num_words: words in the vocabulary.
    """
    if math.isnan(loss) or loss <= math.log(MARGIN * num_words):
        return ""
    return (
        f"{what} perplexity {perplexity(loss):.3g} is worse than that of guessing among the "
        f"{num_words:,} words of the vocabulary"
    )
