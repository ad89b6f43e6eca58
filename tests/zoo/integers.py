"""What the zoo of integers trains, and what is read back of the file that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo.entry import Case, loss_of, tensor_of

__all__ = ["Lit", "of_noise", "of_one_tensor", "stored"]


class Lit(LightningModule):
    """Trains a network that is called with one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss_of(self.net(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], 1e-4)


class First(nn.Module):
    """A module called with the first tensor of its batch alone; its output is the first tensor."""

    def __init__(self, case: Case, batch: Any) -> None:
        super().__init__()
        self.net = case.module
        self.__dict__["case"], self.key = case, next(iter(batch)) if isinstance(batch, Mapping) else None

    def forward(self, x: Tensor) -> Tensor:
        return tensor_of(self.case.call(self.net, x if self.key is None else {self.key: x}))


def of_one_tensor(case: Case) -> tuple[nn.Module, Callable[[], Any]]:
    """A network of one tensor and what draws a batch of it; the module as it is, where it cannot be called so."""
    batch = case.draw()
    if isinstance(batch, Tensor) and isinstance(case.module.eval()(batch), Tensor):
        return case.module, case.draw

    def draw() -> Any:
        drawn = case.draw()
        return (
            drawn if isinstance(drawn, Tensor) else next(iter(drawn.values() if isinstance(drawn, Mapping) else drawn))
        )

    net = First(case, batch).eval()
    try:
        net(draw())
    except Exception:  # of code that is not ours
        return case.module, case.draw
    return net, draw


@torch.no_grad()
def of_noise(net: nn.Module, x: Tensor) -> float:
    """How much outputs change, relative to the largest, by noise of 1e-6 to 1e-4 in the inputs: values between two
    integers are rounded to the other one, and so on from layer to layer."""
    if not x.is_floating_point():
        return 0.0
    wanted = net(x)
    others = [net(x * (1 + noise * torch.randn_like(x))) for noise in (1e-6, 1e-5, 1e-4)]
    return max(float((other - wanted).abs().max() / wanted.abs().max()) for other in others)


def stored(file: Path) -> tuple[list[Tensor], int]:
    """The matrices of 8-bit integers in an ONNX file, and the bytes of all that it holds."""
    import onnx
    from onnx import numpy_helper

    tensors = onnx.load(str(file)).graph.initializer
    arrays = [numpy_helper.to_array(tensor) for tensor in tensors]
    eight = [array for array in arrays if array.dtype in ("int8", "uint8") and array.ndim > 1]
    matrices = [torch.from_numpy(array.astype("int16") - 128 * (array.dtype == "uint8")) for array in eight]
    return matrices, sum(array.nbytes for array in arrays)
