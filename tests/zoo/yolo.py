"""Detectors without anchors, as the YOLO family builds them: C2f, C3, SPPF, PAN, heads with a frozen table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["C3", "SPPF", "C2f", "Decoupled", "Detector", "Elan", "Focus", "PositionAttention", "conv"]


def conv(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(inputs, outputs, 3), conv(outputs, outputs, 3)
        self.add = shortcut and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Half of the channels pass through bottlenecks, and what each gives is kept."""

    def __init__(self, inputs: int, outputs: int, count: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = conv(inputs, 2 * self.c), conv((2 + count) * self.c, outputs)
        self.m = nn.ModuleList(Bottleneck(self.c, self.c, shortcut) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C3(nn.Module):
    def __init__(self, inputs: int, outputs: int, count: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2, self.cv3 = conv(inputs, half), conv(inputs, half), conv(2 * half, outputs)
        self.m = nn.Sequential(*(Bottleneck(half, half, shortcut) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Elan(nn.Module):
    def __init__(self, inputs: int, outputs: int, count: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = conv(inputs, half), conv(inputs, half)
        self.m = nn.ModuleList(nn.Sequential(conv(half, half, 3), conv(half, half, 3)) for _ in range(count))
        self.cv3 = conv((2 + count) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x), self.cv2(x)]
        for m in self.m:
            y.append(m(y[-1]))
        return self.cv3(torch.cat(y[::-1], dim=1))


class PositionAttention(nn.Module):
    """Half of the channels attend to each other over space."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.c, self.heads = channels // 2, heads
        self.cv1, self.cv2 = conv(channels, 2 * self.c), conv(2 * self.c, channels)
        self.qkv, self.proj = nn.Conv2d(self.c, 3 * self.c, 1), nn.Conv2d(self.c, self.c, 1)
        self.pe = nn.Conv2d(self.c, self.c, 3, 1, 1, groups=self.c)
        self.ffn = nn.Sequential(conv(self.c, 2 * self.c), nn.Conv2d(2 * self.c, self.c, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), dim=1)
        n, c, h, w = b.shape
        q, k, v = self.qkv(b).view(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        y = v @ (q.transpose(-2, -1) @ k * (c // self.heads) ** -0.5).softmax(-1).transpose(-2, -1)
        b = b + self.proj(y.view(n, c, h, w) + self.pe(v.reshape(n, c, h, w)))
        return self.cv2(torch.cat((a, b + self.ffn(b)), 1))


class SPPF(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(channels, channels // 2), conv(2 * channels, channels)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Focus(nn.Module):
    """Every second row and column side by side."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = conv(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., i::2, j::2] for j in range(2) for i in range(2)]
        return self.conv(torch.cat(parts, 1))


class DFL(nn.Module):
    """The mean of a distribution over distances, by a frozen table."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(count, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(count, dtype=torch.float).view(1, count, 1, 1)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        n, _, places = x.shape
        return self.conv(x.view(n, 4, self.count, places).transpose(2, 1).softmax(1)).view(n, 4, places)


class Head(nn.Module):
    """Boxes and classes by branches of their own."""

    def __init__(self, widths: list[int], classes: int = 4, bins: int = 8) -> None:
        super().__init__()
        self.bins, self.classes = bins, classes
        inner = max(16, widths[0])
        self.cv2 = nn.ModuleList(
            nn.Sequential(conv(width, inner, 3), conv(inner, inner, 3), nn.Conv2d(inner, 4 * bins, 1))
            for width in widths
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(conv(width, width, 3, groups=width), conv(width, inner), nn.Conv2d(inner, classes, 1))
            for width in widths
        )
        self.dfl = DFL(bins)

    def forward(self, xs: list[Tensor]) -> Tensor:
        both = [torch.cat((box(x), kind(x)), 1) for box, kind, x in zip(self.cv2, self.cv3, xs, strict=True)]
        flat = torch.cat([x.view(x.shape[0], 4 * self.bins + self.classes, -1) for x in both], 2)
        box, kind = flat.split((4 * self.bins, self.classes), 1)
        return torch.cat((self.dfl(box), kind.sigmoid()), 1)


class Decoupled(nn.Module):
    """Boxes, objects and classes of one stem, as YOLOX has them."""

    def __init__(self, widths: list[int], classes: int = 4) -> None:
        super().__init__()
        inner = widths[0]
        self.stems = nn.ModuleList(conv(width, inner) for width in widths)
        self.towers = nn.ModuleList(nn.ModuleList((conv(inner, inner, 3), conv(inner, inner, 3))) for _ in widths)
        self.box = nn.ModuleList(nn.Conv2d(inner, 5, 1) for _ in widths)
        self.kind = nn.ModuleList(nn.Conv2d(inner, classes, 1) for _ in widths)

    def forward(self, xs: list[Tensor]) -> Tensor:
        out = []
        for i, x in enumerate(xs):
            x = self.stems[i](x)
            towers: Any = self.towers[i]
            out.append(torch.cat([self.box[i](towers[0](x)), self.kind[i](towers[1](x)).sigmoid()], 1).flatten(2))
        return torch.cat(out, 2)


class Detector(nn.Module):
    """Backbone, PAN neck, head.

    Args:
        block: what stands between changes of resolution.
        head: makes the head, of its widths.
        stem: the first layer.
        attention: whether positions attend to each other at the lowest resolution.
    """

    def __init__(self, block: Any = C2f, head: Any = Head, stem: Any = None, attention: bool = False) -> None:
        super().__init__()
        self.stem = stem or conv(3, 8, 3, 2)
        self.b1 = nn.Sequential(conv(8, 16, 3, 2), block(16, 16, 1, True))
        self.b2 = nn.Sequential(conv(16, 32, 3, 2), block(32, 32, 2, True))
        self.b3 = nn.Sequential(conv(32, 64, 3, 2), block(64, 64, 1, True), SPPF(64))
        self.mix = PositionAttention(64) if attention else nn.Identity()
        self.up1, self.up2 = block(96, 32), block(48, 16)
        self.down1, self.down2 = conv(16, 16, 3, 2), conv(32, 32, 3, 2)
        self.p1, self.p2 = block(48, 32), block(96, 64)
        self.head = head([16, 32, 64])

    def forward(self, x: Tensor) -> Tensor:
        a = self.b1(self.stem(x))
        b = self.b2(a)
        c = self.mix(self.b3(b))
        u = self.up1(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        v = self.up2(torch.cat([F.interpolate(u, scale_factor=2.0), a], 1))
        p = self.p1(torch.cat([self.down1(v), u], 1))
        q = self.p2(torch.cat([self.down2(p), c], 1))
        return self.head([v, p, q])
