"""The new masks from the old ones."""

from pl_sparse.updater.base import Update, Updater
from pl_sparse.updater.dropgrow import ITOP, DropGrow, GraNet, SRigL
from pl_sparse.updater.exchange import DSnoT
from pl_sparse.updater.prune import Lagrangian, Prune, Splice, Threshold
from pl_sparse.updater.reconstruct import Reconstruct
from pl_sparse.updater.surgeon import Surgeon

__all__ = [
    "ITOP",
    "DSnoT",
    "DropGrow",
    "GraNet",
    "Lagrangian",
    "Prune",
    "Reconstruct",
    "SRigL",
    "Splice",
    "Surgeon",
    "Threshold",
    "Update",
    "Updater",
]
