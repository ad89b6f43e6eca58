"""4-bit weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import is_read_by_attention, without_fused_layer
from pl_sparse.quantize.base import Quantization, quiet_torchao, same_random_numbers

__all__ = ["Int4Weight"]

_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


class Int4Weight(Quantization):
    """4-bit weights of linear layers, symmetric in [-8, 7] with a scale for each group of inputs.

    Activations, other layers, and layers whose inputs are not multiples of `group` stay in floating point.

    Args:
        group: neighbouring inputs that share a scale.
    """

    dtype = "int4"

    def __init__(self, group: int = 32) -> None:
        if group < 2:
            raise ValueError(f"group={group!r} must be 2 or more")
        self.group = group
        self._net: nn.Module | None = None

    def _fits(self, module: nn.Module, name: str = "") -> bool:
        """Whether a layer gets 4-bit weights: a linear one of whole groups that is called itself."""
        if not isinstance(module, nn.Linear) or is_read_by_attention(module):
            return False
        return module.in_features % self.group == 0

    def prepare(self, net: nn.Module, example: Tensor) -> None:
        with quiet_torchao(), same_random_numbers(net):
            from torchao.quantization import quantize_
            from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

            layers = {name: m.in_features for name, m in net.named_modules() if type(m) is nn.Linear}
            if not any(self._fits(module) for module in net.modules()):
                raise ValueError(
                    f"no linear layer has a multiple of group={self.group} inputs; there are "
                    + (", ".join(f"{name} with {size}" for name, size in list(layers.items())[:8]) or "none")
                )
            weights = IntxFakeQuantizeConfig(_INT4, group_size=self.group, is_symmetric=True)
            quantize_(net, QATConfig(weight_config=weights, step="prepare"), self._fits)
        for module in net.modules():
            without_fused_layer(module)
        self._net = net

    def release(self) -> None:
        if self._net is not None:
            _stop_simulating(self._net)
        self._net = None

    def convert(self) -> nn.Module:
        if self._net is None:
            raise ValueError("nothing was prepared: call prepare(net, example) first")
        net = copy.deepcopy(self._net).eval().cpu()
        _stop_simulating(net)
        with quiet_torchao(), same_random_numbers(net):
            from torchao.quantization import IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerGroup

            quantize_(net, IntxWeightOnlyConfig(_INT4, PerGroup(self.group)), self._fits)
        return net


def _stop_simulating(net: nn.Module) -> None:
    """Linear layers in place of those that simulate integers."""
    with quiet_torchao(), same_random_numbers(net):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(net, QATConfig(step="convert"))
