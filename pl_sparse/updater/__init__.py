"""The new masks from the old ones."""

from pl_sparse.updater.base import Update, Updater
from pl_sparse.updater.dropgrow import DropGrow, GraNet
from pl_sparse.updater.prune import Lagrangian, Prune, Splice, Threshold
from pl_sparse.updater.reconstruct import Reconstruct

__all__ = ["DropGrow", "GraNet", "Lagrangian", "Prune", "Reconstruct", "Splice", "Threshold", "Update", "Updater"]
