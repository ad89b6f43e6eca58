"""Integers in place of floating point, learned with (quantization-aware training) or found after training.

The mask comes before the quantizer, whose grid has zero in it: what is pruned is the integer 0. The network keeps its
parameters and their names; while it simulates integers, its `forward` is that of a graph of the same parameters.
"""

from pl_sparse.quantize.base import Quantization
from pl_sparse.quantize.int4 import Int4Weight
from pl_sparse.quantize.int8 import Int8, post_training
from pl_sparse.quantize.integers import integers

__all__ = ["Int4Weight", "Int8", "Quantization", "integers", "post_training"]
