"""Test a model with a continuous cache: python pointer.py --data data/penn --save PTB.pt"""

from collections.abc import Sequence

from flags.evaluation import parse_pointer
from programs.evaluate import measure


def run(argv: Sequence[str]) -> None:
    """Run the program; see programs.evaluate."""
    measure(parse_pointer(argv), title="| End of training ")
