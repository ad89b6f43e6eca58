"""How a mask acts on training, around the optimizer step.

Between two optimizer steps the parameters are the sparse weights and their gradients the dense gradients. Around a step
a masking may put other values into the parameters (latent ones) and shape the gradients. It handles many weights at
once, so that a step costs a few kernels, not a few for each weight.
"""

import warnings

from pl_sparse.masking.base import Groups, Masking, Params
from pl_sparse.masking.choice import auto
from pl_sparse.masking.hard import Frozen, Hard
from pl_sparse.masking.learned import Gated, SoftThresholded
from pl_sparse.masking.reparameterized import SSTE, Powerprop
from pl_sparse.masking.straight_through import SRSTE, STE, TopKAST

__all__ = [
    "SRSTE",
    "SSTE",
    "STE",
    "Frozen",
    "Gated",
    "Groups",
    "Hard",
    "Masking",
    "Params",
    "Powerprop",
    "SoftThresholded",
    "TopKAST",
    "auto",
]


def __getattr__(name: str) -> object:
    if name == "Shrunk":  # its name in 0.1.0
        warnings.warn("masking.Shrunk is called SoftThresholded now", FutureWarning, stacklevel=2)
        return SoftThresholded
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
