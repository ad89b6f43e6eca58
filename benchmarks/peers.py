"""How others mask weights, for the benchmarks: each way sets a net 90 % sparse and says what trains it.

What is not installed is left out, with the reason (`missing`). `make bench` installs those of `requirements.txt`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim import Optimizer

__all__ = ["LIBRARIES", "MASKED", "SPARSITY", "Way", "layers", "missing"]

SPARSITY = 0.9
Way: TypeAlias = "Callable[[nn.Module], tuple[list[Callback], Callable[[Any], Optimizer]]]"

LIBRARIES = {
    "torch.ao.pruning": "torch.ao.pruning",
    "torchao PAT": "torchao.prototype.pat.optim",
    "sparsimony": "sparsimony",
    "Torch-Pruning": "torch_pruning",
    "fasterai": "fasterai.sparse.all",
    "jaxpruner": "jaxpruner",
}
"""What is imported of each; torch.nn.utils.prune and Lightning's ModelPruning are always there."""

NO_MASKS = {"Torch-Pruning": "removes channels, and has no masks that training continues with"}


def missing(name: str) -> str | None:
    """Why a library cannot be measured; None if it can."""
    if name in NO_MASKS:
        return NO_MASKS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(LIBRARIES.get(name, "torch"))
    except Exception as error:  # of any kind: some fail with the versions of others
        return f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def layers(net: nn.Module) -> list[nn.Module]:
    """Those with a matrix or kernels, which are pruned."""
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def sgd(groups: Any) -> Optimizer:
    return torch.optim.SGD(groups, 0.1, momentum=0.9)


def model_pruning(net: nn.Module) -> tuple[list[Callback], Callable[[Any], Optimizer]]:
    from lightning.pytorch.callbacks import ModelPruning

    class FromTheStart(ModelPruning):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.apply_pruning(SPARSITY)

    return [
        FromTheStart(
            "l1_unstructured",
            parameters_to_prune=[(layer, "weight") for layer in layers(net)],
            amount=SPARSITY,
            use_global_unstructured=False,
            apply_pruning=False,
            make_pruning_permanent=False,
        )
    ], sgd


def nn_utils_prune(net: nn.Module) -> tuple[list[Callback], Callable[[Any], Optimizer]]:
    for layer in layers(net):
        prune.l1_unstructured(layer, "weight", SPARSITY)
    return [], sgd


def torch_ao(net: nn.Module) -> tuple[list[Callback], Callable[[Any], Optimizer]]:
    from torch.ao.pruning import WeightNormSparsifier

    names = {module: name for name, module in net.named_modules()}
    sparsifier = WeightNormSparsifier(SPARSITY, (1, 1), 1)
    sparsifier.prepare(net, [{"tensor_fqn": f"{names[layer]}.weight"} for layer in layers(net)])
    sparsifier.step()
    return [], sgd


class _Pass(Callback):
    """Nothing but what masks at rest need: one pass over the gradients."""

    def __init__(self, net: nn.Module) -> None:
        self.weights = [layer.weight for layer in layers(net)]
        self.bits = [(torch.rand_like(w) >= SPARSITY).to(torch.int32) for w in self.weights]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        torch._foreach_mul_([w.grad.view(torch.int32) for w in self.weights], self.bits)


def one_pass(net: nn.Module) -> tuple[list[Callback], Callable[[Any], Optimizer]]:
    return [_Pass(net)], sgd


def pat(net: nn.Module) -> tuple[list[Callback], Callable[[Any], Optimizer]]:
    """Its penalty shrinks weights in each step, so that the sparsity comes out of training."""
    from torchao.prototype.pat.optim import PruneOptimizer

    weights = [layer.weight for layer in layers(net)]
    others = [weight for weight in net.parameters() if not any(weight is w for w in weights)]

    def optimizer(groups: Any) -> Optimizer:
        regularized = {"params": weights, "group_type": "ElemGrouper", "prox_type": "ProxLasso", "reg_lambda": 1e-4}
        return PruneOptimizer(sgd([regularized, {"params": others}]))

    return [], optimizer


def sparsimony(net: nn.Module) -> tuple[list[Callback], Callable[[Any], Optimizer]]:
    from sparsimony.parametrization.fake_sparsity import FakeSparsity
    from sparsimony.pruners.unstructured import UnstructuredMagnitudePruner

    for layer in layers(net):
        weight = layer.weight.detach()
        mask = UnstructuredMagnitudePruner.calculate_mask(SPARSITY, torch.ones_like(weight), weight)
        parametrize.register_parametrization(layer, "weight", FakeSparsity(mask))
    return [], sgd


MASKED: dict[str, Way] = {
    "one pass, and nothing else": one_pass,
    "torch.nn.utils.prune": nn_utils_prune,
    "Lightning ModelPruning": model_pruning,
    "torch.ao.pruning": torch_ao,
    "torchao PAT": pat,
    "sparsimony": sparsimony,
}
