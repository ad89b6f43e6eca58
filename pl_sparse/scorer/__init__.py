"""How important each weight is: higher = keep. A scorer keeps what it gathers over steps in `MaskedParameter.state`."""

from pl_sparse.scorer.activations import RIA, Wanda
from pl_sparse.scorer.at_init import SNIP, GraSP, SynFlow
from pl_sparse.scorer.base import Scorer
from pl_sparse.scorer.experts import REAP
from pl_sparse.scorer.gradients import Gradient, Momentum, Taylor
from pl_sparse.scorer.learned import HardConcrete, Movement, SoftMovement, SoftThreshold
from pl_sparse.scorer.occurrence import Occurrence
from pl_sparse.scorer.second_order import Fisher
from pl_sparse.scorer.ticket import Ticket
from pl_sparse.scorer.weights import Magnitude, Random, Slimming

__all__ = [
    "REAP",
    "RIA",
    "SNIP",
    "Fisher",
    "GraSP",
    "Gradient",
    "HardConcrete",
    "Magnitude",
    "Momentum",
    "Movement",
    "Occurrence",
    "Random",
    "Scorer",
    "Slimming",
    "SoftMovement",
    "SoftThreshold",
    "SynFlow",
    "Taylor",
    "Ticket",
    "Wanda",
]
