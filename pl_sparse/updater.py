"""The new masks from the old ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.allocation import Allocation, Global, Units, choose, kept
from pl_sparse.masked import Group, MaskedParameter
from pl_sparse.probe import Probe
from pl_sparse.scorer import Momentum, Random, Scorer
from pl_sparse.structure import NM, Row, Structure, Unstructured
from pl_sparse.topk import top_k


@dataclass(frozen=True)
class Update:
    """What is due.

    Attributes:
        level: the sparsity to reach, in [0, 1].
        overrides: for each group its own sparsity, or None.
        monotone: whether pruned weights stay pruned.
        progress: the part of the schedule behind, in [0, 1].
        number: how many updates there were before this one.
        invert: keep what scores worst, a sanity check of a scorer.
        probe: the whole model on calibration batches, for updaters that set `calibrates`.
    """

    level: float
    overrides: tuple[float | None, ...]
    monotone: bool
    progress: float
    number: int = 0
    invert: bool = False
    probe: Probe | None = None

    def units(self, groups: Sequence[Group], scorer: Scorer, structure: Structure) -> Units:
        """The scores of the groups' units."""
        score = (lambda param: -scorer.score(param)) if self.invert else scorer.score
        return Units(groups, structure, score, self.monotone)


@dataclass(frozen=True)
class Updater(ABC):
    """The new masks from the old ones.

    Attributes:
        needs_zeros: whether it rests on masking that forgets pruned weights.
        needs_training: whether it rests on masking that trains pruned weights on.
        fixed_count: whether the number of kept weights never changes, so that a schedule other than a constant one
            makes no sense.
        targets_sparsity: whether the schedule's level is a sparsity that it meets.
        calibrates: whether it looks at the whole model through `Update.probe`.
    """

    needs_zeros: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    fixed_count: ClassVar[bool] = False
    targets_sparsity: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False

    def target(self, scheduled: float) -> float | None:
        """The final sparsity it is asked for, given the schedule's; None where it comes out of training."""
        return scheduled

    @property
    def replaces_step(self) -> bool:
        """Whether an update takes the place of the optimizer step that it falls on."""
        return False

    def refusal(self, structure: Structure) -> str | None:
        """Why it cannot work with a structure, or None."""
        return None

    def observe(self, param: MaskedParameter) -> None:
        """Look at one weight before an optimizer step, as `Scorer.observe` does; by default nothing is done."""
        return

    @abstractmethod
    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        """Set the masks of all groups."""


@dataclass(frozen=True)
class Prune(Updater):
    """Keep what scores best. Weights come back only where masking remembers their values."""

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        choose(due.units(groups, scorer, structure), allocation, due.level, due.overrides)


@dataclass(frozen=True)
class Threshold(Updater):
    """Keep what scores above a threshold: how much that is comes out of training.

    The schedule's level is no sparsity here but the part of the threshold, and of the penalty of a learned score,
    that is in force: with `final=1` it ends at all of it. The masks are those of the scores when it ends.

    Sources: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017,
    arXiv:1712.01312 (gates above 0). Sanh, Wolf, Rush, Movement pruning, 2020, arXiv:2005.07683, section 4
    (sigmoid(S) above tau). Kusupati et al., Soft threshold weight reparameterization, 2020, arXiv:2002.03231.

    Args:
        tau: the threshold.
        minimum: the fraction of the units of each tensor that is kept in any case, the best of them.
        at_least: a sparsity that the last update makes sure of, by removing the lowest scores of all tensors; None to
            take what comes. It cannot bring weights back: a model that is sparser already stays so.
    """

    tau: float = 0.0
    minimum: float = 0.0
    at_least: float | None = None
    targets_sparsity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for what in ("minimum", "at_least"):
            value = getattr(self, what)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{what}={value!r} must be in [0, 1]")

    def target(self, scheduled: float) -> float | None:
        return self.at_least

    def refusal(self, structure: Structure) -> str | None:
        if structure.fixed is not None or isinstance(structure, Row):
            return (
                f"updater=threshold keeps what scores high, which knows nothing of the pattern of "
                f"structure={structure.label}: use updater=prune"
            )
        return None

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        units = due.units(groups, scorer, structure)
        left = 0
        for index, group in enumerate(groups):
            for param, _ in group.members:
                if param.gate is not None:
                    param.gate.level = due.level
            scores = units[index]
            if bool(scores.isnan().any()):
                raise ValueError(f"the scores of {group.name} hold NaN: its weights, gradients or gates diverged")
            chosen = scores > self.tau * due.level
            least = math.ceil(self.minimum * scores.numel())
            if int(chosen.sum()) < least:
                chosen |= top_k(scores, least)
            units.assign(index, chosen)
            left += int(chosen.sum()) * units.weights[index]
        most = math.inf if self.at_least is None else kept(self.at_least, sum(group.numel for group in groups))
        if due.progress >= 1 and left > most:
            choose(units, Global(), float(self.at_least or 0))


@dataclass(frozen=True)
class Splice(Updater):
    """Dynamic network surgery: cut what scores low, splice what scores high, and leave alone what is between.

    A kept weight is cut where its score is below `low` t, a cut one spliced where it is `high` t or more. The paper
    sets t = mean + c std of |w| once, and c by hand; here t is such that the count is that of the schedule, to the
    unit. Masking must train cut weights on (`masking=ste`), or none would ever be spliced.

    Source: Guo, Yao, Chen, Dynamic network surgery for efficient DNNs, 2016, arXiv:1608.04493, equation 3.

    Args:
        low: hysteresis downwards, at most 1.
        high: hysteresis upwards, at least 1.
    """

    low: float = 0.9
    high: float = 1.1
    needs_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1 <= self.high:
            raise ValueError(f"low={self.low!r}, high={self.high!r}: 0 < low <= 1 <= high")

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        def score(param: MaskedParameter) -> Tensor:
            return scorer.score(param) / torch.where(param.mask, self.low, self.high)

        choose(Units(groups, structure, score), allocation, due.level, due.overrides)


@dataclass(frozen=True)
class Reconstruct(Updater):
    """SparseGPT: remove weights and move those that are left, so that each layer's outputs change least.

    A layer with weight W and inputs X minimizes |W X - W' X|^2 over W' that are sparse. With H = 2 X X^T, damped by
    `damping` times the mean of its diagonal, and U the upper Cholesky factor of H^-1, columns are passed from left to
    right: column i of a removed weight adds -w_i / U_ii U_i,: to its row, which is the optimal brain surgeon's step for
    the columns from i on. What is removed is chosen for `block` columns at once (for an n:m pattern for m), by the
    smallest w^2 / U_ii^2, as these columns are by then. Inputs that are always zero have H_ii = 1 and w = 0.

    Layers are done in the order in which the model calls them, each on the outputs of those already pruned: one pass
    over the calibration batches for each. A convolution is a linear layer of its unfolded inputs, channels last.
    Weights whose inputs are not seen (see `Probe.activations`) have H = 1, which is magnitude. The scorer is asked by
    allocations that rank weights alone: use `allocation=uniform`. Masking must be hard.

    Source: Frantar, Alistarh, SparseGPT: massive language models can be accurately pruned in one-shot, 2023,
    arXiv:2301.00774, Algorithm 1; convolutions as in Frantar, Singh, Alistarh, Optimal brain compression, 2022,
    arXiv:2208.11580. A block keeps a share of the tensor's count, so that it is met to the unit.

    Args:
        block: columns whose weights are chosen at once.
        damping: what is added to the diagonal of H, as a part of its mean.
    """

    block: int = 128
    damping: float = 0.01
    needs_zeros: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block!r} must be 1 or more columns")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping!r} must be positive, or H may have no inverse")

    def refusal(self, structure: Structure) -> str | None:
        if isinstance(structure, (Unstructured, NM)):
            return None
        return (
            f"updater=reconstruct chooses weights column by column, which structure={structure.label} does not allow: "
            "use structure=unstructured or nm24"
        )

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        assert due.probe is not None
        units = due.units(groups, scorer, structure)
        levels = [due.level if own is None else own for own in due.overrides]
        counts = [kept(level, size) for level, size in zip(levels, units.sizes, strict=True)]
        free = [i for i, own in enumerate(due.overrides) if own is None]
        if free and structure.fixed is None:
            shares = allocation.keep([groups[i] for i in free], units.among(free), due.level)
            counts = [dict(zip(free, shares, strict=True)).get(i, count) for i, count in enumerate(counts)]
        params = [group.members[0][0] for group in groups]
        called: dict[str, int] = {}

        def see(param: MaskedParameter, x: Tensor) -> None:
            called.setdefault(param.name, len(called))

        due.probe.activations(params, see)
        for i in sorted(range(len(params)), key=lambda i: called.get(params[i].name, len(called))):
            self._reconstruct(params[i], counts[i], structure, due)

    def _reconstruct(self, param: MaskedParameter, count: int, structure: Structure, due: Update) -> None:
        """Give one weight its mask and its new values."""
        assert due.probe is not None
        last = param.layout.view(param.weight.detach()).movedim(1, -1)
        alive = param.layout.view(param.mask).movedim(1, -1).flatten(1)
        weight = last.flatten(1).to(torch.float64, copy=True)
        hessian = _hessian(param, weight.shape[1], due.probe)
        width = structure.m if isinstance(structure, NM) else self.block
        rows = len(weight) // len(hessian)
        chosen = torch.ones_like(alive)
        done = 0  # weights looked at so far, of all groups of a convolution
        for i, inputs in enumerate(hessian):
            own = slice(i * rows, (i + 1) * rows)
            factor = _inverse_factor(inputs, weight[own], self.damping)
            for start in range(0, weight.shape[1], width):
                block = slice(start, start + width)
                score = weight[own, block].square() / factor.diagonal()[block].square()
                score = -score if due.invert else score
                if due.monotone and param.pruned:
                    score = score.masked_fill(~alive[own, block], torch.finfo(score.dtype).min)
                share = _share(count, done + score.numel(), alive.numel()) - _share(count, done, alive.numel())
                done += score.numel()
                chosen[own, block] = structure.expand(structure.select(structure.pool(score), share), score.shape)
                _eliminate(weight[own], chosen[own, block], factor, start)

        def restored(columns: Tensor) -> Tensor:
            return param.layout.restore(columns.reshape(last.shape).movedim(-1, 1), param.shape)

        param.set_mask(restored(chosen))
        param.weight.copy_(restored(weight))


def _hessian(param: MaskedParameter, columns: int, probe: Probe) -> Tensor:
    """2 X X^T of each group of a layer's inputs, (groups, columns, columns), summed batch by batch; ones if unseen."""
    total: list[Tensor] = []

    def see(_: MaskedParameter, x: Tensor) -> None:
        flat = x.movedim(2, -1).flatten(2)
        product = 2 * (flat.mT @ flat)
        total[:] = [total[0] + product if total else product]

    probe.activations([param], see)
    if not total:
        return torch.eye(columns, dtype=torch.float64, device=param.weight.device).unsqueeze(0)
    return probe.reduced(total)[0].double()


def _inverse_factor(hessian: Tensor, weight: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of H, damped; weights of dead inputs become zero."""
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _eliminate(weight: Tensor, chosen: Tensor, factor: Tensor, start: int) -> None:
    """Set the weights of a block of columns to zero that are not chosen, and move all that are right of each."""
    end = start + chosen.shape[1]
    errors = torch.zeros_like(weight[:, start:end])
    for i in range(start, end):
        errors[:, i - start] = weight[:, i] * ~chosen[:, i - start] / factor[i, i]
        weight[:, i:end] -= errors[:, i - start, None] * factor[i, i:end]
    weight[:, end:] -= errors @ factor[start:end, end:]
    weight[:, start:end] *= chosen  # to the bit


def _share(count: int, done: int, total: int) -> int:
    """How many of `count` weights are kept among the first `done` of `total`."""
    return (2 * count * done + total) // (2 * total)


@dataclass(frozen=True)
class DropGrow(Updater):
    """Dynamic sparse training: in each tensor drop what scores lowest, and grow as many where nothing is.

    The first masks are random, as dense as the allocation says. Each update then drops floor(f n) of the n kept units
    of a tensor and grows as many of those not kept, the ones just dropped among them. Grown weights start at zero,
    with the optimizer's memory of them at zero; what is dropped and grown at once keeps both. f decays from `fraction`
    over the schedule:

        cosine: f = fraction / 2 (1 + cos(pi x)),   linear: f = fraction (1 - x),   constant: f = fraction

    Sources: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science, 2018, arXiv:1707.04780 (SET: random growth). Evci et al., Rigging the lottery: making all
    tickets winners, 2020, arXiv:1911.11134, Algorithm 1 (RigL: growth by the gradient; an update replaces the step).
    Dettmers, Zettlemoyer, Sparse networks from scratch, 2019, arXiv:1907.04840, Algorithm 1 (sparse momentum: growth
    by momentum, `redistribute`).

    Args:
        fraction: of the kept units that the first update drops, in [0, 1].
        decay: how the fraction falls.
        grow: what is grown: the largest gradients or momenta, or any.
        skip_step: whether the optimizer leaves out the step of an update, as in RigL.
        redistribute: whether what is dropped anywhere is grown in proportion to the mean momentum of a tensor's kept
            weights, instead of where it was dropped.
        momentum: the decay of the moving average, for `grow=momentum`.
        seed: of the random masks.
    """

    fraction: float = 0.3
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    grow: Literal["gradient", "random", "momentum"] = "gradient"
    skip_step: bool = True
    redistribute: bool = False
    momentum: float = 0.9
    seed: int = 0
    needs_zeros: ClassVar[bool] = True
    fixed_count: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction!r} must be in [0, 1]")
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"decay={self.decay!r} is none of cosine, linear, constant")
        if self.grow not in ("gradient", "random", "momentum"):
            raise ValueError(f"grow={self.grow!r} is none of gradient, random, momentum")
        if self.redistribute and self.grow != "momentum":
            raise ValueError(f"redistribute=true goes by momentum: it needs grow=momentum, not {self.grow}")

    @property
    def replaces_step(self) -> bool:
        return self.skip_step

    def refusal(self, structure: Structure) -> str | None:
        if structure.fixed is not None:
            return (
                "updater=dropgrow moves weights freely within a tensor, which the pattern of "
                f"structure={structure.label} does not allow: use updater=prune with masking=srste, whose pruned "
                "weights can return"
            )
        return None

    def observe(self, param: MaskedParameter) -> None:
        if self.grow == "momentum":
            Momentum(self.momentum).observe(param)

    def rate(self, progress: float) -> float:
        """The fraction that is dropped at a part of the schedule.

        >>> [round(DropGrow().rate(x), 6) for x in (0, 0.25, 0.5, 0.75, 1)]
        [0.3, 0.256066, 0.15, 0.043934, 0.0]
        """
        if self.decay == "constant":
            return self.fraction
        return self.fraction * ((1 + math.cos(math.pi * progress)) / 2 if self.decay == "cosine" else 1 - progress)

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        if not all(param.pruned for group in groups for param, _ in group.members):
            start = Random(self.seed)
            choose(Units(groups, structure, start.score, due.monotone), allocation, due.level, due.overrides)
            return
        units = Units(groups, structure, scorer.score)
        alive = [units.alive(index) for index in range(len(units))]
        counts = [int(mask.sum()) for mask in alive]
        dropped = [int(self.rate(due.progress) * count) for count in counts]
        grown = self._shares(groups, units, counts, dropped) if self.redistribute else dropped
        growth = Units(groups, structure, lambda param: self._growth(param, due.number))
        for index in range(len(units)):
            lowest = torch.finfo(torch.float32).min
            stay = top_k(units[index].float().masked_fill(~alive[index], lowest), counts[index] - dropped[index])
            new = top_k(growth[index].float().masked_fill(stay, lowest), grown[index])
            units.assign(index, stay | new)

    def _growth(self, param: MaskedParameter, number: int) -> Tensor:
        """How much each weight wants to grow; indifferent where nothing is known."""
        if self.grow == "momentum":
            return Momentum(self.momentum).score(param)
        if self.grow == "gradient" and param.grad is not None:
            return param.grad.detach().abs()
        mixed = (self.seed * 0x9E3779B1 + crc32(param.name.encode()) * 0x85EBCA6B + number * 0xC2B2AE35) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(param.shape, generator=generator).to(param.weight.device)

    def _shares(self, groups: Sequence[Group], units: Units, counts: list[int], dropped: list[int]) -> list[int]:
        """How many units each group grows: all the dropped weights, by the mean momentum of kept weights."""
        means = []
        for group in groups:
            total = sum(float((Momentum().score(p) * p.factor).sum()) for p, _ in group.members)
            means.append(total / max(sum(p.kept for p, _ in group.members), 1))
        space = [size - count + drop for size, count, drop in zip(units.sizes, counts, dropped, strict=True)]
        left = sum(drop * weight for drop, weight in zip(dropped, units.weights, strict=True))
        shares = [0] * len(groups)
        open_ = [i for i in range(len(groups)) if space[i]]
        while left and open_:  # what does not fit into a tensor goes to the others
            scale = sum(means[i] for i in open_)
            wanted = {i: left * (means[i] / scale if scale else 1 / len(open_)) / units.weights[i] for i in open_}
            more = {i: min(int(wanted[i]), space[i] - shares[i]) for i in open_}
            if not any(more.values()):
                able = [i for i in open_ if units.weights[i] <= left]
                if not able:
                    break
                more = {max(able, key=lambda i: (wanted[i], -i)): 1}
            for i, count in more.items():
                shares[i] += count
                left -= count * units.weights[i]
            open_ = [i for i in open_ if shares[i] < space[i]]
        return shares
