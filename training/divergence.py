"""What counts as divergence: the one definition, for warnings, summary.json and ablate.py."""

import math

from evaluation.evaluate import perplexity

# The largest loss, as a multiple of log V, that of guessing among V words. A model that has hardly
# learned may be a little worse than guessing, and in the first updates at a large learning rate
# much worse, and recover.
LIMIT, EARLY_LIMIT = 1.1, 2.0


def divergence(what: str, loss: float, num_words: int, early: bool) -> str:
    """Why a mean loss says that training has diverged; empty if it does not.

    It says so if it is above LIMIT log V for a vocabulary of V words, or EARLY_LIMIT log V before
    the end of the first epoch. A run has diverged if its last validation, the training of its last
    epoch or its test says so; it goes on nevertheless. A loss or gradient that is not finite ends
    training, with a DivergenceError (training.tally).

    Args:
        what: the text that the loss is of: "training", "validation", "test".
        loss: nats per token; nan: there is none.
        num_words: words in the vocabulary, V.
        early: the loss is from the time before the end of the first epoch.
    """
    if math.isnan(loss) or loss <= (EARLY_LIMIT if early else LIMIT) * math.log(num_words):
        return ""
    return (
        f"{what} perplexity {perplexity(loss):.3g} is worse than guessing among the vocabulary's "
        f"{num_words:,} words"
    )
