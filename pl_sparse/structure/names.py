"""What the names of structures stand for."""

from __future__ import annotations

import re

from pl_sparse.core.registry import build
from pl_sparse.structure.base import Structure
from pl_sparse.structure.block import Block
from pl_sparse.structure.pattern import NM, Transposable
from pl_sparse.structure.transformer import Hybrid

__all__ = ["structure"]


def structure(name: str) -> Structure:
    """The structure a string stands for: a class name, "nm24" or "2:4", "nm24t" (transposable), "block4x4", ...

    Args:
        name: without regard to case and underscores, where it is a class name.

    Raises:
        ValueError: there is no such structure; the message has the near misses.

    >>> structure("nm14"), structure("2:4"), structure("block2x8")
    (NM(n=1, m=4), NM(n=2, m=4), Block(h=2, w=8))
    """
    if match := re.fullmatch(r"nm(\d)(\d{1,2})|(\d+):(\d+)", name):
        return NM(int(match[1] or match[3]), int(match[2] or match[4]))
    if match := re.fullmatch(r"nm(\d)(\d)t", name):
        return Transposable(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(block|hybrid)(\d+)x(\d+)", name):
        return (Block if match[1] == "block" else Hybrid)(int(match[2]), int(match[3]))
    return build(Structure, name)
