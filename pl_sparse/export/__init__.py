"""Trained models in files that are smaller, or faster, on a named target."""

from pl_sparse.export.shrink import Shrunk, load_shrunk, save_shrunk, shrink

__all__ = ["Shrunk", "load_shrunk", "save_shrunk", "shrink"]
