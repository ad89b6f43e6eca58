"""How many units each tensor keeps, and the one place where the axes meet: pool -> allocation -> select -> expand.

The rounding rule, everywhere: of N weights at sparsity s the masks keep floor((1 - s) N + 1/2) weights, or the nearest
number that whole units allow. Uniform and ERK share that total among the tensors by largest remainder, so that it is
met to the unit, and leave every tensor at least one unit while s < 1. Ties go to the unit that comes first.
"""

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.budget import Budget
from pl_sparse.allocation.choose import choose, refuse_unreachable
from pl_sparse.allocation.count import apportion, kept
from pl_sparse.allocation.layerwise import ERK, OWL, Uniform
from pl_sparse.allocation.measured import Sensitivity
from pl_sparse.allocation.ranked import LAMP, Global, lamp
from pl_sparse.allocation.units import Units

__all__ = [
    "ERK",
    "LAMP",
    "OWL",
    "Allocation",
    "Budget",
    "Global",
    "Sensitivity",
    "Uniform",
    "Units",
    "apportion",
    "choose",
    "kept",
    "lamp",
    "refuse_unreachable",
]
