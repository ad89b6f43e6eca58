"""Activations rounded to integers of 8 bits in training, in ranges of any size."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["SMALLEST", "moving_range"]

SMALLEST = 2.0**-60
"""The smallest scale of activations; the product of two is a normal number still."""


@cache
def moving_range() -> Any:
    """What rounds activations in a moving average of their range: torchao's, with the scales of the converted network.

    scale = max((high - low) / 255, 2^-60), zero_point = clamp(-round(low / scale), 0, 255), where low <= 0 <= high.
    torch's fused operation raises scales to 6.1e-5 on a CPU, so that activations below 1e-2 lose their bits; here it
    updates the range alone. Nothing waits for the device.
    """
    from torchao.quantization.pt2e.fake_quantize import FusedMovingAvgObsFakeQuantize

    class MovingRange(FusedMovingAvgObsFakeQuantize):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            observer = self.activation_post_process
            least, largest = observer.quant_min, observer.quant_max
            with torch.no_grad():
                torch.fused_moving_avg_obs_fake_quant(
                    x.detach(),
                    self.observer_enabled,
                    torch.zeros_like(self.fake_quant_enabled),
                    observer.min_val,
                    observer.max_val,
                    self.scale,
                    self.zero_point,
                    observer.averaging_constant,
                    least,
                    largest,
                    self.ch_axis,
                )
                low, high = observer.min_val.clamp(max=0), observer.max_val.clamp(min=0)
                scale = torch.maximum((high - low) / float(largest - least), observer.eps)
                zero = (least - torch.round(low / scale)).clamp(least, largest)
                self.scale.copy_(scale)
                self.zero_point.copy_(zero)
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, least, largest)

    return MovingRange
