"""Lightning callbacks."""

from pl_sparse.callbacks.history import History
from pl_sparse.callbacks.random_state import RandomState
from pl_sparse.callbacks.regularize import Regularize
from pl_sparse.callbacks.rewind import Rewind
from pl_sparse.callbacks.sparsity import Sparsity

__all__ = ["History", "RandomState", "Regularize", "Rewind", "Sparsity"]
