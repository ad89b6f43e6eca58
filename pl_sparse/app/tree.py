"""The composed configuration as a tree."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

__all__ = ["print_tree"]


@rank_zero_only
def print_tree(cfg: DictConfig) -> None:
    """Print all settings, resolved, a branch per group.

    Args:
        cfg: without Hydra's own settings.
    """
    tree = Tree("settings")
    _grow(tree, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False))
    Console(soft_wrap=True).print(tree)


def _grow(tree: Tree, node: Any) -> None:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            _grow(tree.add(Text(str(key))), value)
        else:
            tree.add(Text(f"{key}: {'null' if value is None else value}"))
