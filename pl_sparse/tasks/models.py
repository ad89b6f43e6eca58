"""Models. Every builder takes `shape`, the shape of one input, and `classes`, as the data modules have them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["conv4", "lenet5", "lenet300", "mlp1d", "resnet20", "vit_tiny"]


def _image(shape: Sequence[int], model: str) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    if len(shape) != 3:
        raise ValueError(f"model={model} needs images of shape (channels, height, width), the data has {tuple(shape)}")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _refuse_none(**sizes: int) -> None:
    """Refuse sizes of a model that leave it without weights."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be 1 or more")


def _initialized(net: nn.Sequential, init: str | None) -> nn.Sequential:
    """Weights drawn anew: "glorot" is uniform with variance 2 / (inputs + outputs), biases 0; None leaves torch's own.

    Source: Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010,
    equation 16.
    """
    if init not in (None, "glorot"):
        raise ValueError(f"init={init!r} must be null, for torch's own initialization, or 'glorot'")
    for layer in net if init else ():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net


def lenet300(*, shape: Sequence[int], classes: int, init: str | None = None) -> nn.Sequential:
    """LeNet-300-100: two hidden layers of 300 and 100 units; 266,200 weights for 28 x 28 pixels.

    Source: LeCun et al., Gradient-based learning applied to document recognition, 1998.

    Args:
        shape: of an input.
        classes: outputs.
        init: "glorot" for Glorot's uniform weights and biases of 0; None for torch's own initialization.

    >>> sum(p.numel() for p in lenet300(shape=(1, 28, 28), classes=10).parameters() if p.dim() > 1)
    266200
    """
    net = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(shape), 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, classes),
        )
    )
    return _initialized(net, init)


def lenet5(*, shape: Sequence[int], classes: int, init: str | None = None) -> nn.Sequential:
    """LeNet-5 as in Caffe: two 5 x 5 convolutions of 20 and 50 filters, 500 units; 430,500 weights for 28 x 28 pixels.

    Images smaller than 28 pixels are padded by 2 in each convolution.

    Args:
        shape: of an input.
        classes: outputs.
        init: "glorot" for Glorot's uniform weights and biases of 0; None for torch's own initialization.

    >>> sum(p.numel() for p in lenet5(shape=(1, 28, 28), classes=10).parameters() if p.dim() > 1)
    430500
    """
    channels, height, width = _image(shape, "lenet5")
    padding = 0 if min(height, width) >= 28 else 2
    rows, columns = (((size - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2 for size in (height, width))
    if min(rows, columns) < 1:
        raise ValueError(f"model=lenet5 needs images of at least 4 x 4 pixels, the data has {height} x {width}")
    net = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 20, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5, padding=padding),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * rows * columns, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
    )
    return _initialized(net, init)


def conv4(*, shape: Sequence[int], classes: int) -> nn.Sequential:
    """Conv-4: 3 x 3 convolutions of 64, 64, 128, 128 filters, then 256, 256 units.

    Source: Frankle and Carbin, The lottery ticket hypothesis, 2018, arXiv:1803.03635, figure 2.

    Args:
        shape: of an input.
        classes: outputs.
    """
    channels, height, width = _image(shape, "conv4")
    if min(height, width) < 4:
        raise ValueError(f"model=conv4 needs images of at least 4 x 4 pixels, the data has {height} x {width}")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 64, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(64, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(64, 128, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(128, 128, 3, padding=1),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(128 * (height // 4) * (width // 4), 256),
            relu5=nn.ReLU(),
            fc2=nn.Linear(256, 256),
            relu6=nn.ReLU(),
            fc3=nn.Linear(256, classes),
        )
    )


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a 1 x 1 convolution where the shape changes (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


def resnet20(*, shape: Sequence[int], classes: int, width: int = 16) -> nn.Sequential:
    """ResNet-20 for small images: three stages of three blocks with `width`, 2 `width` and 4 `width` channels.

    Source: He et al., Deep residual learning for image recognition, 2015, arXiv:1512.03385, section 4.2 (with
    projection shortcuts).

    Args:
        shape: of an input.
        classes: outputs.
        width: the channels of the first stage.
    """
    channels, _, _ = _image(shape, "resnet20")
    _refuse_none(width=width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, width, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(width), relu=nn.ReLU()
    )
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width), 1):
        blocks = []
        for index in range(3):
            blocks.append(_Block(inputs, outputs, 2 if stage > 1 and index == 0 else 1))
            inputs = outputs
        layers[f"stage{stage}"] = nn.Sequential(*blocks)
    layers |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(inputs, classes))
    return nn.Sequential(layers)


class _ViT(nn.Module):
    """Patches, a class token, learned positions, pre-norm encoder layers, a linear head."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        dim: int,
        depth: int,
        heads: int,
        patch: int,
        mlp_ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 1 + (height // patch) * (width // patch), dim) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, int(dim * mlp_ratio), dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (samples, patches, dim)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def vit_tiny(
    *,
    shape: Sequence[int],
    classes: int,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    patch: int | None = None,
    mlp_ratio: float = 2.0,
    dropout: float = 0.0,
) -> nn.Module:
    """A small vision transformer.

    Source: Dosovitskiy et al., An image is worth 16x16 words, 2020, arXiv:2010.11929.

    Args:
        shape: of an input.
        classes: outputs.
        dim: the width of a token.
        depth: the number of blocks.
        heads: the heads of each attention layer.
        patch: pixels along the side of a patch; None for a quarter of the image.
        mlp_ratio: the width of the feed-forward layers, as a multiple of `dim`.
        dropout: the probability of dropout in each block, in [0, 1).

    Raises:
        ValueError: the image is not made of whole patches, or `dim` not of whole heads, or there are none of them.
    """
    image = _image(shape, "vit_tiny")
    patch = max(image[1] // 4, 1) if patch is None else patch
    _refuse_none(dim=dim, heads=heads, patch=patch)
    if image[1] % patch or image[2] % patch:
        raise ValueError(f"patch={patch} does not divide images of {image[1]} x {image[2]} pixels")
    if dim % heads:
        raise ValueError(f"dim={dim} is not divisible by heads={heads}")
    return _ViT(image, classes, dim, depth, heads, patch, mlp_ratio, dropout)


class _MLP1D(nn.Module):
    """Two hidden layers, the second with a shortcut if `residual`."""

    def __init__(self, inputs: int, classes: int, hidden: int, residual: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x.flatten(1)))
        out = F.relu(self.fc2(h))
        return self.fc3(h + out if self.residual else out)


def mlp1d(*, shape: Sequence[int], classes: int, hidden: int = 500, residual: bool = True) -> nn.Module:
    """The perceptron of MNIST-1D's lottery tickets: two hidden layers, the second with a shortcut.

    Source: Greydanus and Kobak, Scaling down deep learning with MNIST-1D, 2020, arXiv:2011.14439.

    Args:
        shape: of an input.
        classes: outputs.
        hidden: the units of each hidden layer.
        residual: whether the second layer has the shortcut.
    """
    _refuse_none(hidden=hidden)
    return _MLP1D(math.prod(shape), classes, hidden, residual)
