"""Learn transforms, weight clipping, activation ranges and rounding against the float teacher."""

from .bias import bias_corrections, correct, correctable, withdraw
from .blockwise import learn_blockwise
from .finetune import Finetune
from .loop import LearnResult, learn_end_to_end
from .matrices import attach_matrices
from .output_ranges import least_output_error
from .parameters import Learnables
from .rounding import Rounding
from .student import build_student, refuse_different

__all__ = [
    "Finetune",
    "LearnResult",
    "Learnables",
    "Rounding",
    "attach_matrices",
    "bias_corrections",
    "build_student",
    "correct",
    "correctable",
    "learn_blockwise",
    "learn_end_to_end",
    "least_output_error",
    "refuse_different",
    "withdraw",
]
