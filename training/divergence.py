"""What counts as divergence: the one definition, for warnings, summary.json and ablate.py."""

import math

from evaluation.evaluate import perplexity


def divergence(what: str, loss: float, num_words: int, early: bool) -> str:
    """Why a mean loss says that training has diverged; empty if it does not.

    It says so if it is above log V for a vocabulary of V words, so that the perplexity is worse
    than V, that of guessing. Before the end of the first epoch the limit is 2 log V: the first
    updates at a large learning rate may be worse than guessing for a while, and recover.

    A run has diverged if its last validation or the training of its last epoch says so, or the
    test. It goes on nevertheless. A loss or gradient that is not finite ends training, with a
    DivergenceError (training.tally).

    Args:
        what: the text that the loss is of: "training", "validation", "test".
        loss: nats per token; nan: there is none.
        num_words: words in the vocabulary, V.
        early: the loss is from the time before the end of the first epoch.
    """
    if math.isnan(loss) or loss <= math.log(num_words) * (2 if early else 1):
        return ""
    return (
        f"{what} perplexity {perplexity(loss):.3g} is worse than guessing among the vocabulary's "
        f"{num_words:,} words"
    )
