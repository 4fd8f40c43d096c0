"""The programs' flags, each declared once. Nothing here imports torch."""

from flags.ablation import ablation_parser, parse_ablation
from flags.diagnosis import diagnosis_parser, parse_diagnosis
from flags.finetuning import finetuning_parser, parse_finetuning, taken_over, unknown_flags
from flags.plotting import parse_plotting, plotting_parser, tell_apart
from flags.preparation import parse_preparation, preparation_parser
from flags.resume import other_flags, resume_flags
from flags.stages import check_stage
from flags.training import given_flags, parse_training, settle_scheme, training_parser

__all__ = [
    "ablation_parser",
    "check_stage",
    "diagnosis_parser",
    "finetuning_parser",
    "given_flags",
    "other_flags",
    "parse_ablation",
    "parse_diagnosis",
    "parse_finetuning",
    "parse_plotting",
    "parse_preparation",
    "parse_training",
    "plotting_parser",
    "preparation_parser",
    "resume_flags",
    "settle_scheme",
    "taken_over",
    "tell_apart",
    "training_parser",
    "unknown_flags",
]
