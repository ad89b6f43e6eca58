"""The Pruner owns masks and counters and calls the axes in their order. It knows no Lightning.

A plain training loop needs no more than this:

    pruner = Pruner(scorer="magnitude", schedule="cubic", sparsity=0.9)
    pruner.attach(model)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        pruner.before_step(step, total, optimizer)
        optimizer.step()
        pruner.after_step()
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse import structure as structures
from pl_sparse.allocation import LAMP, Allocation, Units
from pl_sparse.core.cut import Cut
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import build, suggestion
from pl_sparse.core.targets import Patterns, find, select
from pl_sparse.masking import STE, Frozen, Gated, Hard, Masking, Shrunk
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import Constant, OneShot, Schedule
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Channel, Structure
from pl_sparse.updater import Prune, Update, Updater

_VERSION = 1


def auto(scorer: Scorer, updater: Updater) -> Masking:
    """The masking that scorer and updater need: hard, if pruned weights need neither be trained nor remembered."""
    for masking in (Gated, Shrunk):
        if masking.rests_on is not None and isinstance(scorer, masking.rests_on):
            return masking()
    if getattr(updater, "needs_training", False):
        return STE()
    return Frozen() if getattr(scorer, "needs_dense", False) else Hard()


class Pruner:
    """Trains a model to be sparse.

    Args:
        scorer: what importance is, e.g. "magnitude" or `Movement(lr=0.1)`.
        schedule: when to prune and how much, e.g. "cubic" or `OneShot(final=0.8, begin=0.2)`.
        structure: what is pruned together, e.g. "unstructured", "nm24", "block4x4", `Channel()`.
        allocation: how the kept weights are shared among tensors: "global", "uniform", "erk", "lamp".
        updater: the new masks from the old: "prune", "threshold", "splice", "dropgrow".
        masking: how a mask acts on training: "hard", "ste", "frozen", "srste", "topkast", "gated", "shrunk", or "auto"
            for what scorer and updater need.
        sparsity: the final sparsity in [0, 1], for a schedule given by name.
        include: patterns of the weights to prune; None for all that are pruned by default (see `masked.find`).
        exclude: patterns of weights that stay dense.
        first: whether the first convolution is pruned.
        last: whether the last layer is pruned; None for yes, unless the structure removes whole outputs.
        overrides: sparsities of single weights by pattern. They are outside of the budget that the others share; the
            first pattern that matches counts. Before the schedule ends they are scaled as its level is.
        misfit: "error", or "dense" to leave weights dense whose shape the structure does not divide.
        ablation: a sanity check of a method: "shuffle" the masks within each tensor, "reinit" the weights under them,
            or "invert" the scores. Source: Frankle et al., Pruning neural networks at initialization: why are we
            missing the mark?, 2021, arXiv:2009.08576.

    Attributes:
        params: the weights, once attached.
        followers: what is masked along with them without being counted: biases and norms of coupled channels.
        groups: what is pruned together, once attached.
        cuts: what was taken out of parameters and buffers, by name (`shrink`).
        dense: why a weight that was asked for stays dense, by name.
        step: optimizer steps taken.
        num_updates: how often masks were set.
        level: the sparsity last asked for.

    Raises:
        ValueError: an unknown name, or arguments that contradict each other.
    """

    def __init__(
        self,
        scorer: str | Scorer = "magnitude",
        schedule: str | Schedule = "cubic",
        structure: str | Structure = "unstructured",
        allocation: str | Allocation = "global",
        updater: str | Updater = "prune",
        masking: str | Masking = "auto",
        *,
        sparsity: float | None = None,
        include: Patterns | None = None,
        exclude: Patterns = (),
        first: bool = True,
        last: bool | None = None,
        overrides: Mapping[str, float] | None = None,
        misfit: str = "error",
        ablation: str | None = None,
    ) -> None:
        self.scorer = build(Scorer, scorer) if isinstance(scorer, str) else scorer
        self.schedule = _schedule(schedule, sparsity)
        self.structure = structures.structure(structure) if isinstance(structure, str) else structure
        self.allocation = build(Allocation, allocation) if isinstance(allocation, str) else allocation
        self.updater = build(Updater, updater) if isinstance(updater, str) else updater
        if masking == "auto":
            masking = auto(self.scorer, self.updater)
        self.masking: Masking = build(Masking, masking) if isinstance(masking, str) else masking
        for axis, value, kind in (
            ("scorer", self.scorer, Scorer),
            ("schedule", self.schedule, Schedule),
            ("structure", self.structure, Structure),
            ("allocation", self.allocation, Allocation),
            ("updater", self.updater, Updater),
            ("masking", self.masking, Masking),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{axis} must be a name or a {kind.__name__}, got {value!r}")
        if self.scorer.needs_dense and not self.masking.remembers:
            raise ValueError(
                f"scorer={_name(self.scorer)} scores pruned weights by the values they had, which "
                f"masking={_name(self.masking)} forgets: use masking=frozen, ste or auto"
            )
        needed = self.masking.rests_on
        if needed is not None and not isinstance(self.scorer, needed):
            raise ValueError(
                f"masking={_name(self.masking)} applies what scorer={needed.__name__.lower()} learns, not "
                f"scorer={_name(self.scorer)}: use masking=auto"
            )
        if overrides and not self.updater.targets_sparsity:
            raise ValueError(f"overrides are sparsities, which updater={_name(self.updater)} does not aim at")
        if self.updater.needs_zeros and self.masking.remembers:
            raise ValueError(
                f"updater={_name(self.updater)} works on sparse weights alone, but masking={_name(self.masking)} keeps "
                "what was behind the mask: use masking=hard or auto"
            )
        if self.updater.needs_training and not self.masking.trains_pruned:
            raise ValueError(
                f"updater={_name(self.updater)} brings back pruned weights that have grown, but "
                f"masking={_name(self.masking)} does not train them: use masking=ste or auto"
            )
        if self.updater.fixed_count and self.schedule.final and not isinstance(self.schedule, (Constant, OneShot)):
            raise ValueError(
                f"updater={_name(self.updater)} keeps the number of weights, which schedule={_name(self.schedule)} "
                "changes: use schedule=constant"
            )
        if (refusal := self.updater.refusal(self.structure)) is not None:
            raise ValueError(refusal)
        if self.masking.transforms and isinstance(self.structure, Channel) and self.structure.coupled:
            raise ValueError(
                f"masking={_name(self.masking)} learns for each layer on its own which channels it keeps, so that "
                "joined ones cannot be pruned together: use structure=channel with coupled=false"
            )
        if ablation not in (None, "shuffle", "reinit", "invert"):
            raise ValueError(f"ablation={ablation!r} is none of shuffle, reinit, invert")
        if ablation in ("shuffle", "reinit") and not isinstance(self.schedule, OneShot):
            raise ValueError(f"ablation={ablation} is done once, when the masks are made: use schedule=oneshot")
        if misfit not in ("error", "dense"):
            raise ValueError(f"misfit={misfit!r} is neither 'error' nor 'dense'")
        if self.scorer.signed and isinstance(self.allocation, LAMP):
            raise ValueError(
                f"allocation=lamp squares the scores, and those of scorer={_name(self.scorer)} have a sign: use "
                "allocation=global or uniform"
            )
        for pattern, own in (overrides or {}).items():
            if not 0 <= own <= 1:
                raise ValueError(f"overrides: {pattern}={own!r} must be a sparsity in [0, 1]")
        self.include = include
        self.exclude = exclude
        self.first = first
        self.last = not self.structure.removes_outputs if last is None else last
        self.overrides = dict(overrides or {})
        self.misfit = misfit
        self.ablation = ablation

        self.params: list[MaskedParameter] = []
        self.followers: list[MaskedParameter] = []
        self.groups: list[Group] = []
        self.cuts: dict[str, Cut] = {}
        self.dense: dict[str, str] = {}
        self.step = 0
        self.num_updates = 0
        self.level = 0.0
        self._floor = 0.0  # a training that starts anew on a sparse model goes on from its sparsity
        self._updated = -1  # the step of the last update
        self._probe: Probe | None = None
        self._model: nn.Module | None = None
        self._total: int | None = None
        self._timed = self.schedule  # the schedule with epochs turned into steps
        self._span = (0, 0)
        self._overrides: tuple[float | None, ...] = ()
        self._pending: Mapping[str, Any] | None = None
        self._sampled = False  # whether the parameters are a sample
        self._open: dict[int, list[MaskedParameter]] = {}  # what each optimizer's step has opened
        self._clock: int | None = None  # the optimizer whose open step is counted
        self._owned: dict[int, tuple[Optimizer, list[MaskedParameter]]] = {}
        self._stale: set[str] = set()  # weights whose optimizer state is to be cleared

    # Attaching

    @property
    def attached(self) -> bool:
        """Whether the weights of a model are bound."""
        return bool(self.params)

    def attach(self, model: nn.Module, example: Any = None) -> None:
        """Bind to the weights of `model`, and give them the masks of a state loaded before.

        Args:
            example: inputs that the model can be called with, for a structure that looks at how layers are joined.

        Raises:
            ValueError: a pattern matches nothing, a weight does not fit the structure, or a loaded state is another
                model's.
        """
        model = getattr(model, "_orig_mod", model)  # torch.compile
        if self.attached:
            bound = {name.replace("_orig_mod.", ""): weight for name, weight in model.named_parameters()}
            if all(bound.get(param.name) is param.weight for param in self.params):
                return
            self._rebind(model, example)
            return
        params = find(model, self.include, self.exclude, self.first, self.last)
        fitting: list[MaskedParameter] = []
        self.dense = {}
        for param in params:
            shape = param.layout.view(torch.empty(param.shape, device="meta")).shape
            reason = self.structure.misfit(shape)
            if reason is None:
                fitting.append(param)
            else:
                self.dense[param.name] = reason
        if self.dense and (self.misfit == "error" or not fitting):
            name, reason = next(iter(self.dense.items()))
            shapes = {param.name: param.shape for param in params}
            more = f" (and {len(self.dense) - 1} more)" if len(self.dense) > 1 else ""
            raise ValueError(
                f"{name} of shape {'x'.join(map(str, shapes[name]))} cannot be pruned by "
                f"structure={self.structure.label}: {reason}{more}. Leave such weights dense by misfit='dense', or "
                f"this one by exclude=[{name!r}]"
            )
        groups = self.structure.groups(fitting, model, example)
        for group in groups:
            if group.reason is not None:
                self.dense |= dict.fromkeys((param.name for param, _ in group.members), group.reason)
        groups = [group for group in groups if group.reason is None]
        if not groups:
            raise ValueError("nothing to prune: " + "; ".join(f"{name}: {why}" for name, why in self.dense.items()))
        self.allocation.start(groups, model, example)
        self._model = model
        self._overrides = self._match_overrides(groups, model)
        self.groups = groups
        self.params = list(dict.fromkeys(param for group in groups for param, _ in group.members))
        self.followers = list(dict.fromkeys(param for group in groups for param, _ in group.followers))
        for param in self.params:  # of a layer that several groups share, one may be open and another not
            self.dense.pop(param.name, None)
        self.scorer.start(groups, self.structure)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                self._restore(pending)
            except ValueError:
                self.params, self.followers, self.groups = [], [], []
                raise

    def _rebind(self, model: nn.Module, example: Any = None) -> None:
        """Carry masks over to a model with the same weights, e.g. a copy."""
        state = self.state_dict()
        self.params, self.followers, self.groups, self._owned = [], [], [], {}
        self._pending = state
        self.attach(model, example)
        self.apply()

    @property
    def masked(self) -> list[MaskedParameter]:
        """All that has a mask: the weights, and what follows them."""
        return [*self.params, *self.followers]

    def _match_overrides(self, groups: Sequence[Group], model: nn.Module) -> tuple[float | None, ...]:
        own: dict[str, float] = {}
        for pattern, value in self.overrides.items():
            for name in select(model, [pattern], "overrides"):
                own.setdefault(name, value)
        used = {param.name for group in groups for param, _ in group.members}
        if own and not used & set(own):
            raise ValueError(f"overrides {list(self.overrides)} match no weight that is pruned: {', '.join(used)}")
        return tuple(next((own[p.name] for p, _ in group.members if p.name in own), None) for group in groups)

    @property
    def calibrates(self) -> bool:
        """Whether scorer or updater look at the whole model on calibration batches."""
        return self.scorer.calibrates or self.updater.calibrates

    # Time

    def prepare(self, total: float, steps_per_epoch: int | None = None, probe: Probe | None = None) -> None:
        """Fit the schedule to a training of `total` optimizer steps (infinity: not known).

        A level due at step 0 is met at once if the scorer needs no gradient for it, so that a network that is sparse
        from the start never computes dense.

        Args:
            total: optimizer steps of the whole training.
            steps_per_epoch: optimizer steps of an epoch, for times in epochs.
            probe: what scorers are calibrated with that look at the whole model (SNIP, Wanda, SparseGPT).

        Raises:
            ValueError: the schedule does not fit, or has fractions of a length that is not known; or a probe is
                missing.
        """
        self._probe = probe or self._probe
        if self.calibrates and self._probe is None:
            who = f"scorer={_name(self.scorer)}" if self.scorer.calibrates else f"updater={_name(self.updater)}"
            raise ValueError(
                f"{who} is calibrated on batches: give prepare(total, probe=Probe(model, batches, loss)); the Sparsity "
                "callback does so by itself"
            )
        if total == float("inf"):
            if self.schedule.fractional:
                raise ValueError(
                    f"begin={self.schedule.begin!r} and end={self.schedule.end!r} are fractions of training, whose "
                    "length is not known: set max_epochs or max_steps, or give the times in steps or epochs"
                )
            total = sys.maxsize
        self._timed = self.schedule.resolved(steps_per_epoch)
        self._total = int(total)
        self._span = self._timed.span(self._total)
        if self.attached and self.step == 0 and not self.scorer.observes:
            with torch.no_grad():
                self._update(0)

    def restart(self) -> None:
        """Count steps from 0 again, for a further training of the same model; it starts from the sparsity reached."""
        self._floor = max(self._floor, self.level)
        self.step = 0
        self._updated = -1

    @property
    def at_target(self) -> bool:
        """Whether the schedule has reached its final sparsity; where sparsity is learned, whether it is over."""
        if self._total is None:
            return False
        if 0 <= self._span[1] <= self._updated or self.step > self._span[1]:
            return True
        return self.updater.targets_sparsity and self._timed.reached(self.step, self._total)

    @property
    def due(self) -> bool:
        """Whether the schedule sets masks at this step, and has not done so yet."""
        if self._total is None or self.step == self._updated or not self._span[0] <= self.step <= self._span[1]:
            return False
        return bool(self._timed.levels(self.step, self._total))

    # Steps

    @torch.no_grad()
    def advance(self) -> bool:
        """Set the masks that are due at this step before its forward pass, instead of after its backward pass.

        Returns:
            Whether any was due, at the first call within a step.
        """
        self._require_attached()
        return not self._open and self._update(self.step)

    @torch.no_grad()
    def before_forward(self) -> None:
        """Call before each forward pass of training if masks or gates are learned (`updater=threshold`,
        `masking=gated`): sets the masks that are due, and draws the sample that the model computes with.

        `after_step()` turns the parameters into the sparse weights again. With other methods it does nothing.

        Raises:
            ValueError: the length of training is not known.
        """
        if self.updater.targets_sparsity and not self.masking.samples:
            return
        self._require_attached()
        if self._total is None:
            raise ValueError("the length of training is not known: call prepare(total) first")
        if not self.updater.targets_sparsity:
            self.advance()
        if self.masking.samples and self.step <= self._span[1]:
            self._sampled = True
            if pruned := [param for param in self.params if param.pruned]:
                self.masking.before_forward(pruned, self.step)

    @torch.no_grad()
    def before_step(
        self,
        step: int | None,
        total: int | None = None,
        optimizer: Optimizer | None = None,
        *,
        observe: bool = True,
    ) -> None:
        """Call between `backward` and `optimizer.step`, before gradients are clipped.

        Args:
            step: optimizer steps taken so far. None leaves the masks alone: for the further optimizers of a model that
                has several, of which one tells the time.
            total: optimizer steps of the whole training; may be left out after `prepare`.
            optimizer: the one that steps; only its weights are touched. None: there is just one.
            observe: whether the scorer sees the gradients; False where they are not finite.
        """
        self._require_attached()
        if total is not None and total != self._total:
            self.prepare(total)
        if self._total is None:
            raise ValueError("the length of training is not known: give `total`, or call prepare(total) first")
        live = self.weights_of(optimizer)
        key = id(optimizer)
        if key in self._open:  # a closure that is evaluated again within one step
            self.masking.shape_gradients(self._open[key])
            return
        if observe and (self.step if step is None else step) <= self._span[1]:
            if self.masking.samples and not self._sampled and any(param.pruned for param in live):
                raise ValueError(
                    f"masking={_name(self.masking)} samples its gates: call before_forward() before each forward pass"
                )
            for param in live:
                self.scorer.observe(param)
                self.updater.observe(param)
        if step is not None:
            self.step = step
            started = self.num_updates > 0
            if self._update(step) and started and self.updater.replaces_step:
                self._skip(live if optimizer is None else [w for g in optimizer.param_groups for w in g["params"]])
            self._clock = key
        pruned = [param for param in (*live, *self._followers_of(optimizer)) if param.pruned]
        self._open[key] = pruned
        if not pruned:
            return
        if optimizer is not None and self._stale:
            self._clear_state(optimizer, pruned)
        self.masking.shape_gradients(pruned)
        self.masking.before_step(pruned)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer | None = None) -> None:
        """Call after `optimizer.step`. Without a `before_step` since the last call it does nothing.

        Args:
            optimizer: the one that stepped; None closes every open one, and ends a sample that no step followed.
        """
        keys = list(self._open) if optimizer is None else [id(optimizer)] * (id(optimizer) in self._open)
        for key in keys:
            if pruned := self._open.pop(key):
                self.masking.after_step(pruned)
            if key == self._clock:
                self._clock = None
                self.step += 1
                if self.step == self._total:  # a level due at the very end
                    self._update(self.step)
        if optimizer is None and self._sampled:
            self._sampled = False
            if pruned := [param for param in self.params if param.pruned]:
                self.masking.after_forward(pruned)

    def _skip(self, weights: Sequence[MaskedParameter | Tensor]) -> None:
        """Let the optimizer leave this step out: it passes over what has no gradient."""
        for weight in weights:
            (weight.weight if isinstance(weight, MaskedParameter) else weight).grad = None

    def _update(self, step: int) -> bool:
        """Set the masks that are due; whether any was."""
        assert self._total is not None
        if step > self._span[1] or step < self._span[0] or step == self._updated:
            return False
        levels = self._timed.levels(step, self._total)
        if not levels:
            return False
        self._updated = step
        before = [param.weight.detach().clone() for param in self.params] if self.ablation == "shuffle" else []
        for level in levels:
            level = max(level, self._floor)
            monotone = not self.masking.remembers and level >= self.level
            self.level = level
            self.num_updates += 1
            if level == 0 and not any(param.pruned for param in self.params):
                continue
            scale = level / self.schedule.final if self.schedule.final else 1.0
            due = Update(
                level=level if self.structure.fixed is None else scale * self.structure.fixed,
                overrides=tuple(None if own is None else self.schedule.share(own, level) for own in self._overrides),
                monotone=monotone,
                progress=(step - self._span[0]) / max(self._span[1] - self._span[0], 1),
                number=self.num_updates - 1,
                invert=self.ablation == "invert",
                probe=self._probe,
            )
            if self.scorer.calibrates:
                assert self._probe is not None
                self.scorer.calibrate(self.params, self._probe)
            self.updater.update(self.groups, self.scorer, self.structure, self.allocation, due)
            if level == levels[-1] and self.ablation == "shuffle":
                self._shuffle()
                for param, value in zip(self.params, before, strict=True):  # earlier rounds have zeroed weights
                    param.weight.copy_(value)
            pruned = [param for param in self.masked if param.pruned]
            self.masking.changed(pruned)
            if self.masking.clears_state:
                self._stale |= {param.name for param in pruned}
        for param in self.params:
            param.state.pop("calibrated", None)
        if self._probe is not None:
            self._probe.release()
        if self.ablation == "reinit":
            self.reinitialize()
        return True

    def _shuffle(self) -> None:
        """Permute each mask within its tensor, whole units (of N:M, whole groups), as the seed of torch has it."""
        units = Units(self.groups, self.structure, lambda param: param.mask.float())
        for index in range(len(units)):
            alive = units.alive(index) if self.structure.fixed is None else units[index].bool()
            rows = alive.reshape(-1, 1) if self.structure.fixed is None else alive.flatten(0, -2)
            order = torch.randperm(len(rows)).to(rows.device)
            units.assign(index, rows[order].reshape(alive.shape))

    @torch.no_grad()
    def reinitialize(self) -> None:
        """Draw all weights anew, by each layer's `reset_parameters`, under the masks there are."""
        assert self._model is not None
        for module in self._model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        self.written()

    @torch.no_grad()
    def written(self) -> None:
        """After all weights were written from outside: they are the latent values too, and the masks hold."""
        for param in self.masked:
            if param.dense is not None:
                param.dense.copy_(param.weight)
        self.masking.changed([param for param in self.masked if param.pruned])

    def _clear_state(self, optimizer: Optimizer, params: Sequence[MaskedParameter]) -> None:
        """Zero the optimizer's memory of pruned weights, which would move them once they return."""
        for param in params:
            if param.name in self._stale:
                self._stale.discard(param.name)
                for value in optimizer.state.get(param.weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
                        value.mul_(param.factor)

    def weights_of(self, optimizer: Optimizer | None) -> list[MaskedParameter]:
        """The prunable weights that an optimizer trains; None: all of them."""
        if optimizer is None:
            return self.params
        known = self._owned.get(id(optimizer))
        if known is None or known[0] is not optimizer:
            own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
            known = optimizer, [param for param in self.params if id(param.weight) in own]
            self._owned[id(optimizer)] = known
        return known[1]

    def _followers_of(self, optimizer: Optimizer | None) -> list[MaskedParameter]:
        if optimizer is None or not self.followers:
            return self.followers
        own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        return [param for param in self.followers if id(param.weight) in own]

    @torch.no_grad()
    def shrink(self, cuts: Mapping[str, Cut]) -> None:
        """Follow weights that pruned channels were taken out of (`export.shrink`): masks and all that goes with them.

        Sparsity stays that of the weights there were, and further masks are what they would be without the removal.

        Args:
            cuts: what was taken out, by the name of the weight.

        Raises:
            ValueError: pruned weights could return, so that nothing of them may go.
        """
        if (reason := self.unshrinkable) is not None:
            raise ValueError(reason)
        for param in self.masked:
            if param.name in cuts:
                param.shrink(cuts[param.name])
        self.cuts = {**self.cuts, **{n: self.cuts[n].then(cut) if n in self.cuts else cut for n, cut in cuts.items()}}

    @torch.no_grad()
    def unshrink(self) -> None:
        """Take `shrink` back, for weights that have their former shape again."""
        for param in self.masked:
            param.unshrink()
        self.cuts = {}

    @property
    def unshrinkable(self) -> str | None:
        """Why pruned weights may not be removed during training, or None."""
        if self.masking.remembers:
            return (
                f"masking={_name(self.masking)} remembers pruned weights, which removing would lose: use masking=hard"
            )
        if self.updater.fixed_count or not isinstance(self.updater, Prune):
            return f"updater={_name(self.updater)} brings pruned weights back: use updater=prune to remove them"
        return None

    # State

    @torch.no_grad()
    def apply(self) -> None:
        """Bind the masks to weights that were loaded or moved: kept latent values follow the weights."""
        self._require_attached()
        self._owned = {}
        self._open = {}
        self._clock = None
        for param in self.masked:
            param.to_weight()
            if param.pruned:
                if param.dense is not None and not self.masking.transforms:
                    param.dense.copy_(torch.where(param.mask, param.weight, param.dense))
                param.weight.mul_(param.factor)

    @property
    def kept(self) -> int:
        """How many weights the masks keep."""
        return sum(param.kept for param in self.params)

    @property
    def numel(self) -> int:
        """How many weights can be pruned."""
        return sum(param.numel for param in self.params)

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that the masks remove."""
        return 1 - self.kept / self.numel if self.params else 0.0

    @property
    def targets(self) -> list[tuple[Group, float | None]]:
        """Each group and its own sparsity, None where it shares the common one."""
        return list(zip(self.groups, self._overrides, strict=True))

    @property
    def target(self) -> float | None:
        """The sparsity asked for at the end: of the pattern (N:M), else of the schedule, overrides included.

        None where none is asked for, as it comes out of training.
        """
        if not self.updater.targets_sparsity:
            return self.updater.target(self.schedule.final)
        shared = self.schedule.final if self.structure.fixed is None else self.structure.fixed
        if not self.groups or not self.schedule.final:
            return self.schedule.final
        removed = sum(group.numel * (shared if own is None else own) for group, own in self.targets)
        return removed / self.numel

    def state_dict(self) -> dict[str, Any]:
        """Masks, latent values, what the scorer gathered, and counters."""
        if self._pending is not None:
            return dict(self._pending)
        return {
            "version": _VERSION,
            "step": self.step,
            "updated": self._updated,
            "level": self.level,
            "floor": self._floor,
            "num_updates": self.num_updates,
            "stale": sorted(self._stale),
            "params": {
                param.name: {"pruned": param.pruned, **{key: value.cpu() for key, value in param.tensors().items()}}
                for param in self.masked
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; before `attach`, it is kept until then.

        Raises:
            ValueError: it is of another version or another model; nothing has changed then.
        """
        if state.get("version") != _VERSION:
            raise ValueError(f"the pruning state has version {state.get('version')!r}, this is version {_VERSION}")
        if self.attached:
            self._restore(state)
        else:
            self._pending = state

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Any]) -> None:
        saved: Mapping[str, Mapping[str, Any]] = state["params"]
        names = [param.name for param in self.masked]
        missing, extra = [n for n in names if n not in saved], [n for n in saved if n not in set(names)]
        if missing or extra:
            parts = [f"it lacks {', '.join(missing[:5])}"] * bool(missing)
            if extra:
                parts.append(f"it has {', '.join(extra[:5])}. {suggestion(extra[0], missing or names)}")
            raise ValueError(f"the pruning state is of another model or other include/exclude: {'; '.join(parts)}")
        for param in self.masked:
            for key in ("mask", "dense"):
                value = saved[param.name].get(key)
                if value is not None and value.shape != param.shape:
                    raise ValueError(
                        f"the pruning state is of another model: {key} of {param.name} has shape "
                        f"{tuple(value.shape)}, the weight {tuple(param.shape)}"
                    )
        for param in self.masked:
            tensors = dict(saved[param.name])
            param.set_mask(tensors.pop("mask"))
            param.pruned = tensors.pop("pruned")
            param.dense = tensors.pop("dense", None)
            gate = {key.removeprefix("gate."): tensors.pop(key) for key in list(tensors) if key.startswith("gate.")}
            if param.gate is not None and gate:
                param.gate.load(gate)
            param.state = {key.removeprefix("state."): value.clone() for key, value in tensors.items()}
            if param.dense is not None:
                param.dense = param.dense.to(param.weight.dtype, copy=True)
            param.to_weight()
        self.step = state["step"]
        self._updated = state["updated"]
        self.level = state["level"]
        self._floor = state["floor"]
        self.num_updates = state["num_updates"]
        self._stale = set(state["stale"])

    def _require_attached(self) -> None:
        if not self.attached:
            raise ValueError("the pruner has no model yet: call attach(model) first")


def _schedule(schedule: str | Schedule, sparsity: float | None) -> Schedule:
    if isinstance(schedule, str):
        if sparsity is None:
            raise ValueError(f"schedule={schedule!r} needs the final sparsity: give sparsity=0.9 or the like")
        return build(Schedule, schedule, final=sparsity)
    if sparsity is not None and isinstance(schedule, Schedule) and schedule.final != sparsity:
        raise ValueError(
            f"sparsity={sparsity} contradicts the schedule's final={schedule.final}: give one of them, or the same"
        )
    return schedule


def _name(axis: object) -> str:
    return type(axis).__name__.lower()
