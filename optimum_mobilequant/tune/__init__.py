"""Learn transforms, weight clipping, activation ranges and rounding against the float teacher."""

from .blockwise import learn_blockwise
from .finetune import Finetune
from .loop import LearnResult, learn_end_to_end
from .parameters import Learnables
from .rounding import Rounding
from .student import build_student, refuse_different

__all__ = [
    "Finetune",
    "LearnResult",
    "Learnables",
    "Rounding",
    "build_student",
    "learn_blockwise",
    "learn_end_to_end",
    "refuse_different",
]
