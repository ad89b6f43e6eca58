"""Real data in memory, batched without worker processes; ImageNet from disk.

Every data module has `shape`, the shape of one input, and `classes`. In memory, the order of the training batches is a
function of the seed and the epoch alone, and a checkpoint in the middle of an epoch resumes there.
"""

from pl_sparse.tasks.data.batches import Batches, InMemory, Split, hold_out, shuffled
from pl_sparse.tasks.data.hub import HuggingFace, Torchvision
from pl_sparse.tasks.data.idx import MNIST, FashionMNIST, read_idx
from pl_sparse.tasks.data.images import ImageFolder
from pl_sparse.tasks.data.small import MNIST1D, Digits
from pl_sparse.tasks.data.streamed import ImageNet

__all__ = [
    "MNIST",
    "MNIST1D",
    "Batches",
    "Digits",
    "FashionMNIST",
    "HuggingFace",
    "ImageFolder",
    "ImageNet",
    "InMemory",
    "Split",
    "Torchvision",
    "hold_out",
    "read_idx",
    "shuffled",
]
