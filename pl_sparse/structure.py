"""What is pruned together: single weights, N:M groups, blocks, kernels, channels, attention heads.

A structure sees a tensor of scores as (out, in, *kernel), pools it to one score a unit, and turns chosen units back
into a mask. The score of a unit is the mean over its weights, so that units of different size compare.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.attention import LOOKED_FOR, Attention, Unknown, attentions, feed_forwards
from pl_sparse.coupling import couplings
from pl_sparse.masked import Group, Layout, MaskedParameter
from pl_sparse.naming import build
from pl_sparse.topk import top_k


@dataclass(frozen=True)
class Structure(ABC):
    """What is pruned together."""

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """The score of each unit; `scores` is (out, in, *kernel)."""

    def select(self, units: Tensor, keep: int) -> Tensor:
        """The bool mask of the `keep` best units, of the units' shape; ties to the lower index."""
        return top_k(units, keep)

    @abstractmethod
    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        """The mask of shape (out, in, *kernel) that keeps the chosen units; it may be a broadcast view."""

    # The hooks below have a meaning for some structures only.

    def misfit(self, shape: torch.Size) -> str | None:
        """Why a tensor of shape (out, in, *kernel) cannot be pruned so, or None."""
        return None

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        """The weights whose units are chosen together; each alone unless the structure couples them.

        Args:
            example: inputs that the model can be called with, where `needs_example`.
        """
        return [Group(param.name, ((param, param.layout),)) for param in params]

    @property
    def needs_example(self) -> bool:
        """Whether `groups` calls the model."""
        return False

    @property
    def fixed(self) -> float | None:
        """The sparsity that the pattern itself prescribes (N:M), or None."""
        return None

    @property
    def least(self) -> int:
        """How many units of each tensor are kept whatever they score, as long as the sparsity is below 1."""
        return 0

    @property
    def removes_outputs(self) -> bool:
        """Whether it removes whole outputs of a layer, which a classifier cannot spare."""
        return False

    @property
    def label(self) -> str:
        """Its name in tables."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Unstructured(Structure):
    """Every weight is a unit of its own."""

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen


@dataclass(frozen=True)
class NM(Structure):
    """At most `n` non-zeros in every group of `m` neighbours along the input dimension.

    A convolution is seen with its channels last, so that a group lies in the input channels at one kernel position, as
    sparse tensor cores want it. The pattern prescribes the final sparsity 1 - n / m, whatever the schedule's final one;
    on the way there a level s keeps max(n, ceil((1 - s) m)) of each group, so that with a gradual schedule the pattern
    tightens from dense over (m - 1):m to n:m: gradual N:M is `structure=nm24 schedule=cubic`.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378, section 3.

    Raises:
        ValueError: not 0 < n <= m.

    >>> NM(2, 4).select(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), keep=2).tolist()
    [[True, False, True, False]]
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"n={self.n}, m={self.m}: an n:m pattern keeps n of every m weights, so 0 < n <= m")

    @property
    def fixed(self) -> float | None:
        return 1 - self.n / self.m

    @property
    def label(self) -> str:
        return f"{self.n}:{self.m}"

    def misfit(self, shape: torch.Size) -> str | None:
        if shape[1] % self.m:
            return f"its input dimension {shape[1]} is not divisible by m={self.m}"
        return None

    def pool(self, scores: Tensor) -> Tensor:
        return scores.movedim(1, -1).unflatten(-1, (-1, self.m))

    def select(self, units: Tensor, keep: int) -> Tensor:
        groups = units.numel() // self.m
        n = min(self.m, max(self.n, -(-keep // groups)))
        if self.m > 8:
            order = units.sort(dim=-1, descending=True, stable=True).indices
            return torch.zeros_like(units, dtype=torch.bool).scatter_(-1, order[..., :n], True)
        # The rank of a weight is how many of its group beat it; an equal one beats it if it comes first.
        lanes = units.unbind(-1)
        ranks = []
        for i, mine in enumerate(lanes):
            beaten = [(other >= mine) if j < i else (other > mine) for j, other in enumerate(lanes) if j != i]
            ranks.append(sum(b.to(torch.int8) for b in beaten) if beaten else torch.zeros_like(mine, dtype=torch.int8))
        return torch.stack([torch.as_tensor(rank) < n for rank in ranks], dim=-1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.flatten(-2).movedim(-1, 1)


@dataclass(frozen=True)
class Transposable(Structure):
    """N:M along the inputs and along the outputs, so that the weight and its transpose both have the pattern.

    Sparse tensor cores then speed up the backward pass too. In each m x m block every row and every column keeps n
    weights: of all such masks the one with the largest sum of scores, found among all of them, so that m is at most 4.

    Source: Hubara et al., Accelerated sparse neural training: a provable and efficient method to find N:M transposable
    masks, 2021, arXiv:2102.08124, section 3.

    >>> Transposable(1, 2).select(torch.tensor([[4.0, 3.0, 2.0, 2.0]]), keep=2).tolist()
    [[True, False, False, True]]
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m <= 4:
            raise ValueError(f"n={self.n}, m={self.m}: a transposable pattern needs 0 < n <= m <= 4")

    @property
    def fixed(self) -> float | None:
        return 1 - self.n / self.m

    @property
    def label(self) -> str:
        return f"{self.n}:{self.m} transposable"

    def misfit(self, shape: torch.Size) -> str | None:
        for what, size in (("input", shape[1]), ("output", shape[0])):
            if size % self.m:
                return f"its {what} dimension {size} is not divisible by m={self.m}"
        return None

    def pool(self, scores: Tensor) -> Tensor:
        last = scores.flatten(2).movedim(2, 0) if scores.dim() > 2 else scores.unsqueeze(0)
        return last.unflatten(2, (-1, self.m)).unflatten(1, (-1, self.m)).transpose(2, 3).flatten(3)

    def select(self, units: Tensor, keep: int) -> Tensor:
        n = min(self.m, max(self.n, -(-keep * self.m // units.numel())))
        patterns = _permutation_sums(n, self.m).to(units.device)
        best = units.double().clamp(-1e150, 1e150) @ patterns.double().t()
        return patterns[best.argmax(-1)]

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        blocks = chosen.unflatten(-1, (self.m, self.m)).transpose(2, 3)
        return blocks.flatten(3).flatten(1, 2).movedim(0, 2).reshape(shape)


def _permutation_sums(n: int, m: int) -> Tensor:
    """All m x m masks with n kept in every row and column, flat, (masks, m * m)."""
    rows = [list(row) for row in combinations(range(m), n)]
    found = [
        [[j in row for j in range(m)] for row in chosen]
        for chosen in product(rows, repeat=m)
        if all(sum(j in row for row in chosen) == n for j in range(m))
    ]
    return torch.tensor(found).flatten(1)


@dataclass(frozen=True)
class Row(Structure):
    """Single weights, as many in each output of a tensor (its rows).

    Source: Sun et al., A simple and effective pruning approach for large language models, 2023, arXiv:2306.11695,
    section 3, which compares weights per output.

    >>> Row().select(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), keep=2).tolist()
    [[True, False], [True, False]]
    """

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def select(self, units: Tensor, keep: int) -> Tensor:
        rows = units.flatten(1)
        each, more = divmod(keep, len(rows))
        order = rows.sort(dim=1, descending=True, stable=True).indices
        chosen = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :each], True)
        if more:  # one more where that one is best
            rest = rows.gather(1, order[:, each : each + 1]).squeeze(1)
            lucky = top_k(rest, more)
            chosen[lucky, order[lucky, each]] = True
        return chosen.reshape(units.shape)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen


@dataclass(frozen=True)
class Block(Structure):
    """Blocks of `h` outputs by `w` inputs; a convolution has such blocks at each kernel position.

    Source: Gray, Radford, Kingma, GPU kernels for block-sparse weights, 2017.
    """

    h: int = 4
    w: int = 4

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise ValueError(f"h={self.h}, w={self.w}: a block has at least one row and one column")

    @property
    def label(self) -> str:
        return f"block {self.h}x{self.w}"

    def misfit(self, shape: torch.Size) -> str | None:
        if shape[0] % self.h:
            return f"its output dimension {shape[0]} is not divisible by h={self.h}"
        if shape[1] % self.w:
            return f"its input dimension {shape[1]} is not divisible by w={self.w}"
        return None

    def pool(self, scores: Tensor) -> Tensor:
        return scores.unflatten(1, (-1, self.w)).unflatten(0, (-1, self.h)).mean(dim=(1, 3))

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.repeat_interleave(self.h, 0).repeat_interleave(self.w, 1)


@dataclass(frozen=True)
class Channel(Structure):
    """Whole output channels: the filters of a convolution, the neurons of a linear layer (its rows).

    The last layer stays dense unless `last=True` is given: its outputs are the model's.

    With `coupled` a unit is a channel through all layers that it goes through: residual joins, concatenations and
    depthwise convolutions are pruned together, and biases, scales and shifts of norms with them. A pruned channel is
    then zero wherever it is read, and can be removed without a trace (`export.shrink`). The score of a unit is the mean
    over its weights in all layers. Layers whose outputs cannot be removed stay dense: the model's own outputs, what a
    LayerNorm reads, and what is joined with a layer that is excluded.

    Sources: Li et al., Pruning filters for efficient ConvNets, 2016, arXiv:1608.08710. Fang et al., DepGraph: towards
    any structural pruning, 2023, arXiv:2301.12900, for the coupling; there inputs count in a unit's score too.

    Args:
        coupled: whether channels that are joined are one unit; it needs Torch-Pruning.

    Raises:
        ImportError: Torch-Pruning is not installed.
    """

    coupled: bool = False

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        if not self.coupled:
            return super().groups(params, model)
        example = getattr(model, "example_input_array", None) if example is None else example
        if example is None:
            raise ValueError(
                "coupled channels are found by calling the model: give attach(model, example) a batch of inputs, or "
                "the model an example_input_array"
            )
        by_weight = {id(param.weight): param for param in params}
        order = {param.name: index for index, param in enumerate(params)}
        others: dict[str, MaskedParameter] = {}
        modules = dict(model.named_modules())

        def reader(path: str, module: Any) -> MaskedParameter:
            """A layer that is not pruned, but reads what is."""
            layout = Layout("transposed") if getattr(module, "transposed", False) else Layout()
            mask = torch.ones_like(module.weight, dtype=torch.bool, requires_grad=False)
            return MaskedParameter(f"{path}.weight", module, module.weight, mask, layout=layout)

        groups = []
        for coupling in couplings(model, example):
            members: list[tuple[MaskedParameter, Layout]] = []
            followers: list[tuple[MaskedParameter, Layout]] = []
            feeds: list[tuple[MaskedParameter, Tensor]] = []
            reason = coupling.reason
            for port in coupling.ports:
                module: Any = modules.get(port.path)
                if module is None or not port.path:  # a parameter, or the outputs of the model: there is a reason
                    continue
                if port.side == "in":
                    if coupling.reason is None:
                        into = by_weight.get(id(module.weight)) or reader(port.path, module)
                        feeds.append((into, _readers(into, port.places)))
                    continue
                for short, tensor in module.named_parameters(recurse=False):
                    param = by_weight.get(id(tensor))
                    if param is not None:
                        whole = coupling.reason is not None
                        members.append((param, param.layout if whole else _rows(param, port.places)))
                    elif reason is not None:
                        continue
                    elif short == "weight" and tensor.dim() > 1:
                        reason = reason or f"its channels are joined with those of {port.path}, which is not pruned"
                    elif not isinstance(module, nn.PReLU):
                        name = f"{port.path}.{short}"
                        mask = torch.ones_like(tensor, dtype=torch.bool, requires_grad=False)
                        other = others.setdefault(name, MaskedParameter(name, module, tensor, mask))
                        followers.append((other, _rows(other, port.places)))
            if members:
                members.sort(key=lambda member: order[member[0].name])
                groups.append(Group(members[0][0].name, tuple(members), tuple(followers), tuple(feeds), reason))
        found = {param.name for group in groups for param, _ in group.members}
        why = "no channel that can be removed was found in it"
        groups += [Group(p.name, ((p, p.layout),), reason=why) for p in params if p.name not in found]
        return sorted(groups, key=lambda group: order[group.name])

    @property
    def needs_example(self) -> bool:
        return self.coupled

    @property
    def removes_outputs(self) -> bool:
        return True

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).mean(1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)


def _rows(param: MaskedParameter, places: tuple[tuple[int, ...], ...]) -> Layout:
    """How the units with these outputs are seen in a weight."""
    outputs = param.layout.view(torch.empty(param.shape, device="meta")).shape[0]
    if places == tuple((index,) for index in range(outputs)):
        return param.layout
    return Layout("rows", rows=places, below=param.layout)


def _readers(param: MaskedParameter, places: tuple[tuple[int, ...], ...]) -> Tensor:
    """The unit that each input of a weight takes in, -1 for none of these; inputs that groups share count once."""
    inputs = param.layout.view(torch.empty(param.shape, device="meta")).shape[1]
    units = torch.full((inputs,), -1)
    for unit, at in enumerate(places):
        for place in at:
            units[place % inputs] = unit
    return units


@dataclass(frozen=True)
class Feature(Structure):
    """Whole features: the filters of a convolution (its output channels), the input units of a linear layer (columns).

    Without its column an input unit is of no use, bias or not, so that the unit can be removed from the layer before.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    section 4.1. There a filter's gate is on its bias too, which here stays.
    """

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).mean(1) if scores.dim() > 2 else scores.mean(0)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(-1, *(1,) * (len(shape) - 1) if len(shape) > 2 else ()).expand(shape)


@dataclass(frozen=True)
class Kernel(Structure):
    """Single kernels of a convolution: the weights from one input to one output channel. A linear layer's are 1 x 1."""

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(2).mean(2) if scores.dim() > 2 else scores

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(*chosen.shape, *(1,) * (len(shape) - 2)).expand(shape)


@dataclass(frozen=True)
class Head(Structure):
    """Whole attention heads: a head's rows of the query, key and value projections and its columns of the output one.

    Attention layers are recognised by what they consist of (see `attention.attentions`): nn.MultiheadAttention, fused
    projections, those of Hugging Face's models. Query heads that share a key/value head are pruned with it. All other
    weights stay dense.

    Biases keep their values: with its columns of the output projection zero, a head adds nothing to the output, its
    value bias included, and its biases have no gradient. The score of a head is the mean over its weights. With
    scorer=taylor that is the mean of |w g|, where Michel et al. take |sum w g| over the head's output columns, which is
    |dL/dgate| for a gate on the head.

    Source: Michel, Levy, Neubig, Are sixteen heads really better than one?, 2019, arXiv:1905.10650.

    Args:
        empty: whether ranking over all layers may take the last head of one. Else each keeps its best head, and where
            there are more layers than heads to keep, the model is denser than asked for. A sparsity of 1 takes all.
    """

    empty: bool = False

    @property
    def least(self) -> int:
        return 0 if self.empty else 1

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        by_weight = {id(param.weight): param for param in params}
        groups = []
        for found in attentions(model):
            weights = [getattr(module, name) for module, name, *_ in found.weights]
            known = [by_weight.get(id(weight)) for weight in weights]
            if not any(known):  # left dense by include and exclude
                continue
            if isinstance(found, Unknown):
                raise ValueError(
                    f"structure=head cannot tell the heads of {found.name}: {found.reason}. Leave it dense by "
                    f"exclude=[{found.name!r}]"
                )
            missing = [name for param, (_, name, _) in zip(known, found.weights, strict=True) if param is None]
            if missing:
                raise ValueError(
                    f"structure=head removes heads whole, but include and exclude leave {len(missing)} of the "
                    f"{len(weights)} weights of {found.name} dense: name all of them or none, {found.name!r}"
                )
            members = ((param, layout) for param, (*_, layout) in zip(known, found.weights, strict=True) if param)
            groups.append(Group(found.name, tuple(members)))
        if not groups:
            raise ValueError(
                f"structure=head found no attention layer to prune in {type(model).__name__}. It looks for "
                f"{LOOKED_FOR}. structure=channel prunes the outputs of any layer"
            )
        return groups

    def pool(self, scores: Tensor) -> Tensor:
        return scores.mean(1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.unsqueeze(1).expand(shape)


@dataclass(frozen=True)
class Hybrid(Structure):
    """Blocks of `h` outputs by `w` inputs in the attention layers of a transformer, neurons in the feed-forward ones.

    A neuron is a row of a feed-forward network's first layer, of its gate's too, and a column of its last, with one
    score. In the output projection of attention a block has `w` outputs and `h` inputs, so that a head whose blocks are
    all gone in query, key and value can be gone there. All other weights stay dense. With scorer=movement it is block
    movement pruning; there the sparsity comes from a threshold and a penalty, here it is asked for.

    Source: Lagunas et al., Block pruning for faster transformers, 2021, arXiv:2109.04838, section 3 (Hybrid).

    Args:
        h: outputs of a block.
        w: inputs of a block.
    """

    h: int = 32
    w: int = 32

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise ValueError(f"h={self.h}, w={self.w}: a block has at least one row and one column")

    @property
    def label(self) -> str:
        return f"hybrid {self.h}x{self.w}"

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        by_weight = {id(param.weight): param for param in params}
        groups = []
        for found in attentions(model):
            for module, name, *layout in found.weights:
                param = by_weight.pop(id(getattr(module, name)), None)
                if param is None:
                    continue
                turned = param.layout.kind == "transposed"  # GPT-2 keeps (in, out)
                last = isinstance(found, Attention) and (module, name, *layout) == found.weights[-1]
                block = (self.w, self.h) if turned != last else (self.h, self.w)
                if param.shape[0] % block[0] or param.shape[1] % block[1]:
                    raise ValueError(
                        f"{param.name} of shape {param.shape[0]}x{param.shape[1]} is not made of blocks of "
                        f"{block[0]}x{block[1]}: choose other h and w, or leave it dense by exclude=[{param.name!r}]"
                    )
                groups.append(Group(param.name, ((param, Layout("blocks", block=block)),)))
        for network in feed_forwards(model):
            members = [(by_weight.pop(id(getattr(m, name)), None), layout) for m, name, layout in network.weights]
            known = tuple((param, layout) for param, layout in members if param is not None)
            if known:
                groups.append(Group(network.name, known))
        if not groups:
            raise ValueError(
                f"structure=hybrid found neither attention nor feed-forward layers to prune in {type(model).__name__}. "
                f"It looks for {LOOKED_FOR}; and for pairs of linear layers named like "
                "intermediate.dense/output.dense, fc1/fc2, up_proj/down_proj"
            )
        order = {param.name: index for index, param in enumerate(params)}
        return sorted(groups, key=lambda group: order[group.members[0][0].name])

    def pool(self, scores: Tensor) -> Tensor:
        return scores.mean(1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.unsqueeze(1).expand(shape)


def structure(name: str) -> Structure:
    """The structure a string stands for: a class name, "nm24" or "2:4", "nm24t" (transposable), "block4x4", ...

    >>> structure("nm14"), structure("2:4"), structure("block2x8")
    (NM(n=1, m=4), NM(n=2, m=4), Block(h=2, w=8))
    """
    if match := re.fullmatch(r"nm(\d)(\d{1,2})|(\d+):(\d+)", name):
        return NM(int(match[1] or match[3]), int(match[2] or match[4]))
    if match := re.fullmatch(r"nm(\d)(\d)t", name):
        return Transposable(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(block|hybrid)(\d+)x(\d+)", name):
        return (Block if match[1] == "block" else Hybrid)(int(match[2]), int(match[3]))
    return build(Structure, name)
