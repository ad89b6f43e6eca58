"""What is pruned together: single weights, N:M groups, blocks, kernels, channels, attention heads.

A structure sees a tensor of scores as (out, in, *kernel), pools it to one score per unit, and turns chosen units back
into a mask. The score of a unit is the mean over its weights, so that units of different size can be compared.
"""

from pl_sparse.structure.base import Structure
from pl_sparse.structure.block import Block, Kernel
from pl_sparse.structure.channel import Channel, Feature
from pl_sparse.structure.expert import Expert
from pl_sparse.structure.layer import Layer
from pl_sparse.structure.living import living
from pl_sparse.structure.names import structure
from pl_sparse.structure.pattern import NM, Transposable
from pl_sparse.structure.single import Row, Unstructured
from pl_sparse.structure.transformer import Head, Hybrid
from pl_sparse.structure.vocabulary import Vocabulary

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Expert",
    "Feature",
    "Head",
    "Hybrid",
    "Kernel",
    "Layer",
    "Row",
    "Structure",
    "Transposable",
    "Unstructured",
    "Vocabulary",
    "living",
    "structure",
]
