"""Penalties that drive weights to zero: their gradients, and their proximal steps.

A penalty either adds its gradient to that of the loss, or is left to a proximal step after the optimizer's: the exact
minimizer of |w - v|^2 / (2 eta) + penalty(w), which makes weights exactly zero. eta is the learning rate, and with
Adam the learning rate of each coordinate, lr / (sqrt(v_hat) + eps), as its step is one in that metric. Weight decay has
been applied by then. Momentum is that of the loss alone.

A proximal step acts on the values that the optimizer wrote: on the latent ones where masking trains those (ste, srste,
topkast), else on the sparse weights. A gradient is added at the sparse weights, so that pruned ones get none.
"""

from pl_sparse.regularizer.admm import ADMM
from pl_sparse.regularizer.base import Regularizer, step_sizes
from pl_sparse.regularizer.group_lasso import GroupLasso
from pl_sparse.regularizer.growing_l2 import GrowingL2
from pl_sparse.regularizer.l1 import L1
from pl_sparse.regularizer.latency import Latency
from pl_sparse.regularizer.slimming import Slimming

__all__ = ["ADMM", "L1", "GroupLasso", "GrowingL2", "Latency", "Regularizer", "Slimming", "step_sizes"]
