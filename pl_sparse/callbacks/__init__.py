"""Lightning callbacks."""

from pl_sparse.callbacks.accuracy_budget import AccuracyBudget
from pl_sparse.callbacks.compact import Compact
from pl_sparse.callbacks.cost_target import CostTarget
from pl_sparse.callbacks.distill import Distill
from pl_sparse.callbacks.front import Front
from pl_sparse.callbacks.quantize import Quantize
from pl_sparse.callbacks.random_state import RandomState
from pl_sparse.callbacks.regularize import Regularize
from pl_sparse.callbacks.rewind import Rewind
from pl_sparse.callbacks.run.history import History
from pl_sparse.callbacks.run.mask_history import MaskHistory
from pl_sparse.callbacks.run.mask_log import Track
from pl_sparse.callbacks.run.status import Status
from pl_sparse.callbacks.shrink import Shrink
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.compact import expand_weights

__all__ = [
    "AccuracyBudget",
    "Compact",
    "CostTarget",
    "Distill",
    "Front",
    "History",
    "MaskHistory",
    "Quantize",
    "RandomState",
    "Regularize",
    "Rewind",
    "Shrink",
    "Sparsity",
    "Status",
    "Track",
    "expand_weights",
]
