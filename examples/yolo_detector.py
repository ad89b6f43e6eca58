"""
A detector as the YOLO family builds them: C2f, SPPF, PAN, a head without anchors
=================================================================================

Splits, concatenations, pooling pyramids and a frozen table are difficult for tools that prune channels. Here channels
are followed through them, and a removal is tried before it is made. Half of the channels are pruned while a small
detector learns to find discs and squares.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Sparsity
from pl_sparse.export import shrink
from pl_sparse.network.macs import counted

SIZE, BINS, KINDS = 64, 8, 2

# %%
# The network.


def conv(inputs, outputs, size=1, stride=1):
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cv1, self.cv2 = conv(width, width, 3), conv(width, width, 3)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Half of the channels pass through bottlenecks, and what each gives is kept."""

    def __init__(self, inputs, outputs, count=1):
        super().__init__()
        self.cv1, self.cv2 = conv(inputs, outputs), conv((2 + count) * (outputs // 2), outputs)
        self.m = nn.ModuleList(Bottleneck(outputs // 2) for _ in range(count))

    def forward(self, x):
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cv1, self.cv2 = conv(width, width // 2), conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Head(nn.Module):
    """Logits of kinds, and distances to the four sides as means of distributions over bins, by a frozen table."""

    def __init__(self, widths, inner=16):
        super().__init__()
        self.box = nn.ModuleList(
            nn.Sequential(conv(w, inner, 3), conv(inner, inner, 3), nn.Conv2d(inner, 4 * BINS, 1)) for w in widths
        )
        self.kind = nn.ModuleList(nn.Sequential(conv(w, inner, 3), nn.Conv2d(inner, KINDS, 1)) for w in widths)
        self.table = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)
        self.table.weight.data[:] = torch.arange(BINS, dtype=torch.float).view(1, BINS, 1, 1)

    def forward(self, maps):
        both = [torch.cat((box(x), kind(x)), 1) for box, kind, x in zip(self.box, self.kind, maps, strict=True)]
        flat = torch.cat([x.flatten(2) for x in both], 2)  # (batch, 4 bins + kinds, places)
        box, kind = flat.split((4 * BINS, KINDS), 1)
        chances = box.view(len(box), 4, BINS, -1).transpose(2, 1).softmax(1)
        return torch.cat((self.table(chances).flatten(1, 2), kind), 1)  # (batch, 4 + kinds, places)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16, 3, 2)
        self.b1 = nn.Sequential(conv(16, 16, 3, 2), C2f(16, 16))
        self.b2 = nn.Sequential(conv(16, 32, 3, 2), C2f(32, 32))
        self.b3 = nn.Sequential(conv(32, 64, 3, 2), C2f(64, 64), SPPF(64))
        self.up, self.down, self.out = C2f(96, 32), conv(32, 32, 3, 2), C2f(96, 64)
        self.head = Head([32, 64])

    def forward(self, x):
        b = self.b2(self.b1(self.stem(x)))
        c = self.b3(b)
        u = self.up(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        return self.head([u, self.out(torch.cat([self.down(u), c], 1))])


STRIDES = torch.tensor([8.0] * 64 + [16.0] * 16)
PLACES = torch.cat(
    [
        (torch.stack(torch.meshgrid(*[torch.arange(SIZE // s)] * 2, indexing="xy"), -1).reshape(-1, 2) + 0.5) * s
        for s in (8, 16)
    ]
)  # (places, 2): x, y

# %%
# Pictures with a disc or a square each, and its box.


def pictures(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(KINDS, (count,), generator=generator)
    half = torch.randint(6, 14, (count,), generator=generator).float()
    middle = 14 + torch.rand(count, 2, generator=generator) * (SIZE - 28)
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIZE)] * 2, indexing="xy"), -1) + 0.5  # (y, x, 2)
    away = (grid - middle[:, None, None]).abs()
    inside = torch.where(kinds.view(-1, 1, 1) == 0, away.norm(dim=-1), away.amax(-1)) < half.view(-1, 1, 1)
    color = 0.5 + torch.rand(count, 3, 1, 1, generator=generator)
    x = 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator) + inside[:, None] * color
    return TensorDataset(x, torch.cat([middle - half[:, None], middle + half[:, None]], 1), kinds)


def boxes(out: Tensor) -> Tensor:
    """Corners (batch, places, 4) of distances in strides."""
    sides = out[:, :4].transpose(1, 2) * STRIDES[:, None]
    return torch.cat([PLACES - sides[..., :2], PLACES + sides[..., 2:]], -1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both).clamp(min=1e-6)


class Detection(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Detector()
        self.example_input_array = torch.randn(2, 3, SIZE, SIZE)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, box, kind = batch
        out = self.net(x)
        near = ((PLACES - (box[:, None, :2] + box[:, None, 2:]) / 2).norm(dim=-1) < STRIDES).float()
        wanted = near[:, None] * F.one_hot(kind, KINDS).float()[:, :, None]
        found = overlap(boxes(out), box[:, None].expand(-1, len(PLACES), -1))
        boxes_loss = (near * (1 - found)).sum() / near.sum()
        return boxes_loss + F.binary_cross_entropy_with_logits(out[:, 4:], wanted, reduction="sum") / near.sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


@torch.no_grad()
def found(net: nn.Module, data: TensorDataset) -> float:
    """The share of pictures whose surest box overlaps by half, and has the right kind."""
    x, box, kind = data.tensors
    out = net.eval()(x)
    score, said = out[:, 4:].max(1)  # (batch, places)
    best = score.argmax(1)
    rows = torch.arange(len(x))
    return float(((overlap(boxes(out)[rows, best], box) > 0.5) & (said[rows, best] == kind)).float().mean())


# %%
# Train it; half of the channels' weights go between a fifth and 60 % of training.

seed_everything(0, verbose=False)
module, test = Detection(), pictures(200, seed=1)
sparsity = Sparsity(structure="coupled", allocation="uniform", sparsity=0.5, report=False)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(max_epochs=8, accelerator="cpu", callbacks=[sparsity], **quiet)
trainer.fit(module, DataLoader(pictures(640, seed=0), 16, shuffle=True))

# %%
# Take them out. What is left is a plain detector with smaller layers, and the same boxes.

net, example = module.net, test.tensors[0][:2]
before, macs_before = found(net, test), counted(net, example).dense
result = shrink(net, example)
after, macs = found(net, test), counted(net, example).dense
print(f"found {before:.3f} with masks, {after:.3f} without the channels")
print(f"parameters {result.before:,} -> {result.after:,}, MACs {macs_before:,} -> {macs:,}")
for layer, reason in result.left.items():
    print(f"{layer} stays: {reason}")
