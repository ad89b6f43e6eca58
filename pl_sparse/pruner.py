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

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any, Literal, TypeVar, Unpack

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_sparse.allocation import Allocation, Units, refuse_unreachable
from pl_sparse.allocation.zeros import mask_zeros
from pl_sparse.core.agreement import agree_on
from pl_sparse.core.cut import Cut
from pl_sparse.core.dtensor import local
from pl_sparse.core.exposed import conceal
from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Part
from pl_sparse.core.masked_model import MaskedModel
from pl_sparse.core.optimizers import begin_anew, clear_state, leaves_zeros, pace, skip_step
from pl_sparse.core.parameter import MaskedBuffer, MaskedParameter, kept_each, zero_pruned
from pl_sparse.core.places import Places
from pl_sparse.core.registry import Axis, build, name_of, suggestion
from pl_sparse.core.sharded import refuse_shared, whole
from pl_sparse.core.state import Masks, load_state, refuse_other_settings, settings_of, state_of
from pl_sparse.core.targets import TargetOptions, Targets
from pl_sparse.core.upstream import plain_name, unwrapped
from pl_sparse.masking import Masking, auto
from pl_sparse.network.collapse import Collapse, passes
from pl_sparse.network.computed import FirstCall
from pl_sparse.network.outputs import output_weights
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import Schedule
from pl_sparse.schedule.clock import Clock
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Structure
from pl_sparse.structure import structure as structure_named
from pl_sparse.updater import Prune, Update, Updater
from pl_sparse.updater.ablation import ABLATIONS, shuffle

__all__ = ["Pruner", "PrunerOptions", "auto"]

A = TypeVar("A", bound=Axis)
_VERSION = 3
_READABLE = (1, 2, _VERSION)  # version 1 calls latent values dense, version 2 has masks of bools


class Pruner(MaskedModel):
    """Trains a model to be sparse.

    Args:
        scorer: what importance is, e.g. "magnitude" or `Movement(rule="sum")`.
        schedule: when to prune and how much, e.g. "cubic" or `OneShot(final=0.8, begin=0.2)`.
        structure: what is pruned together, e.g. "unstructured", "nm24", "block4x4", `Channel()`.
        allocation: how the kept weights are shared among tensors: "global", "uniform", "erk", "lamp".
        updater: how new masks follow from the old ones: "prune", "threshold", "splice", "dropgrow".
        masking: how a mask acts on training: "hard", "ste", "frozen", "srste", "topkast", "gated", "softthresholded",
            or "auto" for the one that scorer and updater need.
        sparsity: the final sparsity in [0, 1], for a schedule that is given by name; None for that of the pattern
            (N:M).
        targets: which weights are pruned; or the arguments of `Targets` by keyword (`exclude=["fc3"]`).
        ablation: a sanity check of a method: "shuffle" the masks within each tensor, "reinit" the weights under them,
            or "invert" the scores. Source: Frankle et al., Pruning neural networks at initialization: why are we
            missing the mark?, 2021, arXiv:2009.08576.

    Attributes:
        step: optimizer steps taken.
        num_updates: the number of times masks were set.
        level: the last level of the schedule that was set.

    Raises:
        ValueError: an unknown name, or arguments that contradict each other.
        TypeError: an axis is neither a name nor a member of that axis, or there is no such argument.
    """

    def __init__(
        self,
        scorer: str | Scorer = "magnitude",
        schedule: str | Schedule = "cubic",
        structure: str | Structure = "unstructured",
        allocation: str | Allocation = "erk",
        updater: str | Updater = "prune",
        masking: str | Masking = "auto",
        *,
        sparsity: float | None = None,
        targets: Targets | None = None,
        ablation: str | None = None,
        **where: Unpack[TargetOptions],
    ) -> None:
        super().__init__()
        self.scorer = _member(Scorer, scorer)
        self.structure = structure_named(structure) if isinstance(structure, str) else _member(Structure, structure)
        self._clock = Clock(_schedule(schedule, sparsity, self.structure.fixed))
        self.allocation = _member(Allocation, allocation)
        self.updater = _member(Updater, updater)
        self.masking = auto(self.scorer, self.updater) if masking == "auto" else _member(Masking, masking)
        if targets is not None and where:
            raise ValueError(f"{', '.join(where)} belong in targets=Targets(...), which is given too")
        options = [field.name for field in fields(Targets)]
        for name in where:
            if name not in options:
                taken = {*signature(Pruner).parameters, *options} - {"where"}
                raise TypeError(f"{type(self).__name__} has no argument {name!r}. {suggestion(name, taken)}")
        self.targets = Targets(**where) if targets is None else targets
        if ablation is not None and ablation not in ABLATIONS:
            raise ValueError(f"ablation={ablation!r} must be one of {', '.join(ABLATIONS)}")
        self.ablation = ablation
        for axis in (self.scorer, self.masking, self.updater, self.structure, self.schedule, self.allocation):
            if (reason := axis.refusal(self)) is not None:
                raise ValueError(reason)

        self.step = 0
        self.num_updates = 0
        self.level = 0.0
        self._floor = 0.0  # a training that starts anew on a sparse model goes on from its sparsity
        self._updated = -1  # the step of the last update
        self._overdue: tuple[
            float, ...
        ] = ()  # levels that were due before: by a newer estimate, or their update failed
        self._estimates: Mapping[str, Any] | None = None  # of a training that goes on
        self._probe: Probe | None = None
        self._model: nn.Module | None = None
        self._shown = False  # whether the structure has seen the model called
        self._overrides: tuple[float | None, ...] = ()
        self._pending: Mapping[str, Any] | None = None
        self._sampled = False  # whether the parameters are a sample
        self._open: dict[int, list[MaskedParameter]] = {}  # what each optimizer's step has opened
        self._counted: int | None = None  # the optimizer whose open step is counted
        self._stale: set[str] = set()  # weights whose optimizer state is to be cleared
        self.trusts_steps = False  # whether nothing changes gradients or weights between `before_step` and `after_step`
        self._rested: dict[int, tuple[Optimizer, int, list[Group]]] = {}  # who, since which update, of what
        self._resting: set[int] = set()  # the optimizers whose open step leaves pruned weights at zero
        self.collapse = Collapse()
        self.watches = True  # whether it looks by itself at calls of the model: the first, and that after new masks
        self._watch: RemovableHandle | None = None
        self._first: FirstCall | None = None

    @property
    def schedule(self) -> Schedule:
        """When to prune and how much."""
        return self._clock.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._clock = Clock(schedule)

    # Attaching

    def attach(self, model: nn.Module, example: Any = None) -> None:
        """Bind to the weights of `model`, and give them the masks of a state loaded before.

        Args:
            example: inputs that the model can be called with, for a structure that looks at how layers are joined.

        Raises:
            ValueError: a pattern matches nothing, a weight does not fit the structure, or a loaded state is another
                model's.
            TypeError: `model` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"attach takes a torch.nn.Module, not a {type(model).__name__}")
        model = unwrapped(model)
        if self.attached and model is self._model:
            self.refuse_unfollowed()
            if example is not None and not self._shown and self.structure.sees_example:
                with torch.no_grad():
                    self._bind_again(example)
            self.find_again(example)
            return
        if self.attached:
            bound = {plain_name(name): weight for name, weight in model.named_parameters()}
            if not all(bound.get(param.name) is param.weight for param in self.params):
                self._rebind(model, example)
            return
        masks = () if self._pending is None else self._pending["params"]
        self._model = model
        self._bind_weights(example, trained=masks)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                self._restore(pending)
            except ValueError:
                self.bind([], {})
                raise
        else:
            self._start_from_zeros()

    def _bind_weights(self, example: Any, trained: Collection[str]) -> None:
        """Choose the weights of the model, group and bind them.

        Args:
            trained: names of weights that are not taken for frozen.
        """
        assert self._model is not None
        self._shown = example is not None
        guess = self.structure.removes_outputs and not self.structure.needs_example  # which the outputs are
        shown = guess and self.targets.last is None and example is not None
        outputs: Collection[str] = output_weights(self._model, example) if shown else ()
        choice = self.targets.choose(self._model, guess, trained=trained, outputs=outputs)
        refuse_shared(choice.params, self, self._model)
        groups, misfits = self.structure.bind(choice.params, self._model, example, self.targets.misfit)
        normed = [param.name for group in groups for param, _ in group.members if param.norm_dim is not None]
        if normed and self.masking.transforms:
            raise ValueError(
                f"masking={name_of(self.masking)} may scale all of a weight to zero, and {normed[0]} is divided by a "
                f"norm: 0 / 0 is not a number. Leave it dense by exclude=[{normed[0]!r}], or use scorer=magnitude"
            )
        self.allocation.start(groups, self._model, example)
        self._overrides = self.targets.overrides_of(self._model, groups)
        if self.updater.targets_sparsity and self.schedule.final:
            units = Units(groups, self.structure, self.scorer.score)
            refuse_unreachable(units, self.schedule.final, self._overrides)
        self.bind(groups, {**choice.spared, **misfits}, choice)
        self.scorer.start(groups, self.structure)
        self._places = Places(self._model)

    @property
    def thaws(self) -> bool:
        """Whether a weight that was frozen when the model was attached is trained by now."""
        return any(weight.requires_grad for weight in self.choice.frozen.values())

    @torch.no_grad()
    def thaw(self, example: Any = None) -> list[str]:
        """Add weights that are no longer frozen. Call it between two steps.

        Masks and their state are kept. At the next step the present level is set anew among all weights, so that it is
        again the sparsity of the model.

        Args:
            example: inputs that the model can be called with, for a structure that looks at how layers are joined.

        Returns:
            The names of the weights that joined.
        """
        before = {param.name for param in self.masked}
        self._bind_again(example)
        return [param.name for param in self.masked if param.name not in before]

    @torch.no_grad()
    def find_again(self, example: Any = None) -> list[str]:
        """Adopt parameters that the model has replaced or added. Call it between two steps; `before_step` does so.

        Masks move to the new weight of the same name and shape. A weight that has not been pruned yet may disappear or
        change its shape. If the set of pruned weights changed, the present level is set anew at the next step.

        Args:
            example: inputs that the model can be called with, for a structure that looks at how layers are joined.

        Returns:
            The names of the weights that are new.

        Raises:
            RuntimeError: a pruned weight is no longer in the model, or has another shape.
        """
        if not self.moved:
            return []
        assert self._model is not None
        earlier, self._places = self._places, Places(self._model)
        assert earlier is not None
        added = any(weight.dim() > 1 and weight not in earlier for weight in self._model.parameters())
        if not added and all(p.weight in self._places for p in self.masked if not isinstance(p, MaskedBuffer)):
            return []  # a submodule went somewhere else, or was compiled
        before = {param.name: param.weight for param in self.masked}
        self._bind_again(example)
        return [param.name for param in self.masked if before.get(param.name) is not param.weight]

    def _bind_again(self, example: Any) -> None:
        """Choose and bind the weights of the model anew; masks and all that goes with them stay."""
        before, state = {param.name: param for param in self.masked}, state_of(self.masked, self.groups)
        chosen = {param.name for param in self.params}
        self._bind_weights(example, trained=state)
        now = {param.name: param for param in self.masked}
        same = [name for name, param in before.items() if name in now and now[name].shape == param.shape]
        lost = [name for name, param in before.items() if param.pruned and name not in same]
        _refuse_lost(lost)
        for name in same:
            now[name].cut = before[name].cut
        new = [param for name, param in now.items() if name not in same]
        load_state(self.masked, self.groups, {**state_of(new, []), **{name: state[name] for name in same}})
        self._hold([now[name] for name in same if now[name].weight is not before[name].weight], written=True)
        if self.level and {param.name for param in self.params} != chosen:
            self._overdue, self._updated = self._overdue or (self.level,), -1

    @torch.no_grad()
    def _start_from_zeros(self) -> None:
        """Take up the zeros of a model that is sparse already, where masks only lose weights."""
        updater = self.updater
        if updater.grows or updater.needs_training or not updater.targets_sparsity or not self.schedule.final:
            return
        with whole(self.masked):
            masked = mask_zeros(self.groups, self.structure)
        if masked:
            self.masking.changed([param for param in self.masked if param.pruned], self.groups)
            self._floor = self.level = self.sparsity

    @torch.no_grad()
    def carries_on(self, model: nn.Module) -> bool:
        """Whether a model has the masks: it is the one that they were made for, or a copy, and zero where they are."""
        model = unwrapped(model)
        same = model is self._model
        if same:
            self.refuse_unfollowed()
        bound = {plain_name(name): weight for name, weight in model.named_parameters()}

        def agrees(param: MaskedParameter) -> bool:
            weight = bound.get(param.name)
            if weight is None or weight.shape != param.shape or not param.pruned:
                return same or weight is param.weight
            return not bool((local(weight.detach()) != 0).logical_and(~param.mask.to(weight.device)).any())

        return all(agrees(param) for param in self.params)

    def reset(self) -> None:
        """Forget model, masks and counters, to be attached to another model."""
        self.bind([], {})
        self.cuts = {}
        self._clock = Clock(self.schedule)
        self._model = self._probe = self._pending = self._counted = self._places = None
        self.restart()
        self.num_updates = 0
        self.level = self._floor = 0.0
        self._overrides, self._open, self._stale, self._sampled = (), {}, set(), False
        self._rested, self._resting = {}, set()
        self._unwatch()
        self.collapse = Collapse()

    def _rebind(self, model: nn.Module, example: Any = None) -> None:
        """Carry masks over to a model with the same weights, e.g. a copy."""
        state = self.state_dict()
        self.bind([], {})
        self._pending = state
        self.attach(model, example)
        self.apply()

    @property
    def calibrates(self) -> bool:
        """Whether scorer or updater look at the whole model on calibration batches."""
        return self.scorer.calibrates or self.updater.calibrates

    # Time

    def prepare(self, total: float, steps_per_epoch: int | None = None, probe: Probe | None = None) -> None:
        """Fit the schedule to a training of `total` optimizer steps (infinity: not known).

        A level due at step 0 is set at once if the scorer needs no gradient, so that a network that is sparse from the
        start is never dense in training.

        Args:
            total: optimizer steps of the whole training.
            steps_per_epoch: optimizer steps of an epoch, for times in epochs.
            probe: calibrates scorers and updaters that look at the whole model (SNIP, Wanda, SparseGPT).

        Raises:
            ValueError: the schedule does not fit, or has fractions of a length that is not known; or a probe is
                missing.
        """
        self._probe = probe or self._probe
        if self.calibrates and self._probe is None:
            who = f"scorer={name_of(self.scorer)}" if self.scorer.calibrates else f"updater={name_of(self.updater)}"
            raise ValueError(
                f"{who} is calibrated on batches: give prepare(total, probe=Probe(model, batches, loss)); the Sparsity "
                "callback does so by itself"
            )
        self._clock.fit(total, steps_per_epoch)
        if self._first is not None:
            self._first.release()
        self._first = FirstCall(self._model, self.params) if self.watches and self._model is not None else None
        self._overdue = ()
        estimates, self._estimates = self._estimates, None
        if estimates is not None and self.step > 0 and self._clock.restore(estimates):
            self._overdue = self._clock.missed(self._updated, self.step, self.level)
        if self.attached and self.step == 0 and self.masking.from_start:
            with torch.no_grad():
                for param in self.params:
                    param.set_mask(param.mask)
                self.masking.changed(self.params, self.groups)
        if self.attached and self.step == 0 and not self.scorer.observes:
            with torch.no_grad():
                self._update(0)
                if not self.level:
                    self._try_scorer()
        if self.attached and self.level:
            self._look()

    def _try_scorer(self) -> None:
        """Calibrate the scorer for nothing, so that what it cannot score is refused before training."""
        if self.scorer.calibrates and self._probe is not None:
            try:
                with whole(self.params):
                    self.scorer.calibrate(self.params, self._probe)
            finally:
                self._forget_calibration()

    def _forget_calibration(self) -> None:
        for param in self.params:
            param.state.pop("calibrated", None)
        if self._probe is not None:
            self._probe.release()

    def follow(self, progress: float | None, epochs: float | None = None) -> None:
        """Adapt times that are fractions or epochs to a training that turns out longer or shorter than estimated.

        Call it between two steps. A level that was due by the new estimate is set at the next step.

        Args:
            progress: the part of training that is behind, in [0, 1]; None: not known.
            epochs: epochs that are behind, with the part of the one that is going on; None: not known.
        """
        if self._clock.follow(self.step, progress, epochs):
            self._moved()

    def _moved(self) -> None:
        """After the times of the schedule moved."""
        self._overdue = self._clock.missed(self._updated, self.step, self.level)
        if not self.schedule.falls:
            self._floor = max(self._floor, self.level)

    @torch.no_grad()
    def catch_up(self) -> bool:
        """Set the masks of the schedule's last level at once, for a training that ends before that level was due.

        Returns:
            Whether it was still due. Levels that are decided during training, and learned sparsity, never are.
        """
        self._require_attached()
        if self._clock.total is None or self.at_target or not self.updater.targets_sparsity or not self._clock.last:
            return False
        self._updated = -1
        self._update(self.step, levels=self._clock.last)
        self._updated = max(self.step, self._clock.span[1])
        return True

    @property
    def ends_last(self) -> bool:
        """Whether the schedule's last level comes after the last step (`begin=1.0`)."""
        return self._clock.total is not None and self._clock.span[1] >= self._clock.total

    def restart(self) -> None:
        """Count steps from 0 again, for a further training of the same model, which starts from the present
        sparsity."""
        self._floor = max(self._floor, self.level)
        self.step = 0
        self._updated = -1
        self._estimates = None
        self._overdue = ()

    @property
    def at_target(self) -> bool:
        """Whether the schedule has reached its final sparsity; where sparsity is learned, whether it is over."""
        if self._clock.total is None or self._overdue:
            return False
        return self.settled or (self.updater.targets_sparsity and self._clock.reached(self.step))

    @property
    def settled(self) -> bool:
        """Whether the last masks of the schedule are set, and none follow."""
        end = self._clock.span[1]
        return self._clock.total is not None and not self._overdue and (0 <= end <= self._updated or self.step > end)

    @property
    def over(self) -> bool:
        """Whether the schedule is behind, so that neither `follow` nor `catch_up` has anything to do."""
        return self._clock.total is not None and not self._overdue and self.step > self._clock.span[1]

    @property
    def revives(self) -> bool:
        """Whether pruned weights may return."""
        return self.masking.remembers or self.schedule.falls or self.updater.fixed_count

    @property
    def due(self) -> bool:
        """Whether the schedule sets masks at this step, and has not done so yet."""
        return self.step != self._updated and bool(self._clock.levels(self.step) or self._overdue)

    # Steps

    @torch.no_grad()
    def advance(self) -> bool:
        """Set the masks that are due at this step before its forward pass, instead of after its backward pass.

        Returns:
            Whether any was due, at the first call within a step.
        """
        self._require_attached()
        return not self._open and self._update(self.step)

    def before_forward(self) -> None:
        """Call before each forward pass of training if masks or gates are learned or follow the values
        (`updater=threshold`, `masking=gated`, `sste`): sets the masks that are due, and draws the sample that the model
        computes with.

        `after_step()` turns the parameters into the sparse weights again. With other methods it does nothing.

        Raises:
            ValueError: the length of training is not known.
        """
        leads = self.masking.leads or not self.updater.targets_sparsity
        if not leads and not self.masking.samples:
            return
        self._require_attached()
        if self._clock.total is None:
            raise ValueError("the length of training is not known: call prepare(total) first")
        if leads:
            self.advance()
        if self.masking.samples and self.step <= self._clock.span[1]:
            self._sampled = True
            if pruned := [param for param in self.params if param.pruned]:
                with torch.no_grad():
                    self.masking.before_forward(pruned, self.groups, self.step)

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
            step: optimizer steps taken so far. None leaves the masks unchanged: for all but one of the optimizers of a
                model that has several.
            total: optimizer steps of the whole training; may be left out after `prepare`.
            optimizer: the one that steps; only its weights are touched. None: there is just one.
            observe: whether the scorer sees the gradients; False where they are not finite.
        """
        moved = self._require_attached()
        if total is not None and total != self._clock.total:
            going_on = self._clock.total is not None and self.step > 0
            self.prepare(total)
            if going_on:
                self._moved()
        if self._clock.total is None:
            raise ValueError("the length of training is not known: give `total`, or call prepare(total) first")
        if moved and not self._open:
            self.find_again()
        live = self.weights_of(optimizer)
        key = id(optimizer)
        if key in self._open:  # a closure that is evaluated again within one step
            if self.masking.trains_pruned:
                raise RuntimeError(
                    f"{type(optimizer).__name__} evaluates the loss again within its step, where "
                    f"masking={name_of(self.masking)} has the values behind the masks in the weights: use masking=hard "
                    "or frozen, or another optimizer"
                )
            self.masking.shape_gradients(self._open[key], self.groups)
            return
        if self._open and live and any(live[0] in self._owned[o][2] for o in self._open if o in self._owned):
            return  # another optimizer steps this one within its own step
        if observe and (bool(self._overdue) or (self.step if step is None else step) <= self._clock.span[1]):
            if self.masking.samples and not self._sampled and any(param.pruned for param in live):
                raise ValueError(
                    f"masking={name_of(self.masking)} samples its gates: call before_forward() before each forward pass"
                )
            self._observe(live, optimizer, guided=step is not None)
        if step is not None:
            self.step = step
            started = self.num_updates > 0
            if self._update(step, observe) and started and self.updater.replaces_step:
                live_weights = [param.weight for param in live]
                skip_step(
                    live_weights if optimizer is None else [w for g in optimizer.param_groups for w in g["params"]]
                )
            self._counted = key
        pruned = [param for param in (*live, *self.companions_of(optimizer)) if param.pruned]
        self._open[key] = pruned
        if not pruned:
            return
        if optimizer is not None and self._stale:
            begin_anew(optimizer)
            for param in pruned:
                if param.name in self._stale:
                    self._stale.discard(param.name)
                    if not self.masking.remembers:
                        clear_state(optimizer, param, scales=self.updater.grows)
        if self.masking.rests and self.trusts_steps and optimizer is not None:
            self._rest(optimizer, pruned)
        self.masking.pace(pruned, optimizer, self._clock.total)
        self.masking.shape_gradients(pruned, self.groups)
        self.masking.before_step(pruned)

    def _observe(self, live: Sequence[MaskedParameter], optimizer: Optimizer | None, guided: bool) -> None:
        """Let scorer and updater see the gradients of these weights, and gates learn from them."""
        observing: list[Scorer | Updater] = []
        if type(self.scorer).observe is not Scorer.observe:
            observing.append(self.scorer)
        if type(self.updater).observe is not Updater.observe:
            observing.append(self.updater)
        if observing:
            for param in live:
                for axis in observing:
                    axis.observe(param)
        learning = [group for group in self.groups if group.gate is not None]
        if not learning and type(self.updater).guide is Updater.guide:
            return
        trained = {id(param) for param in live}
        learning = [group for group in learning if id(group.members[-1][0]) in trained]
        with whole(live):
            pace([group.gate for group in learning if group.gate is not None], live, optimizer)
            if guided:
                first, last = self._clock.span
                self.updater.guide(self.groups, self.scorer, max(last - first, 1))
            for group in learning:
                self.scorer.learn(group)

    def _rest(self, optimizer: Optimizer, pruned: Sequence[MaskedParameter]) -> None:
        """Find out whether pruned weights stay at zero in this step: in each after the first with these masks."""
        rested = optimizer, self.num_updates, self.groups
        if self._rested.get(id(optimizer)) == rested:
            self._resting.add(id(optimizer))
        elif leaves_zeros(optimizer):
            self._rested[id(optimizer)] = rested
            for param in pruned:  # as after an update, should the optimizer have come from elsewhere
                clear_state(optimizer, param)

    def after_step(self, optimizer: Optimizer | None = None) -> None:
        """Call after `optimizer.step`. Without a `before_step` since the last call it does nothing.

        Args:
            optimizer: the one that stepped; None ends the step of every optimizer, and a sample that no step followed.
        """
        keys = list(self._open) if optimizer is None else [id(optimizer)] * (id(optimizer) in self._open)
        if keys or (optimizer is None and self._sampled):
            self._close(keys, ended=optimizer is None)

    def _close(self, keys: Sequence[int], ended: bool) -> None:
        for key in keys:
            pruned, rest = self._open.pop(key), key in self._resting
            self._resting.discard(key)
            if pruned and not rest:
                with torch.no_grad():
                    self.masking.after_step(pruned, self.groups)
            if key == self._counted:
                self._counted = None
                self.step += 1
                if self.step == self._clock.total:  # a level due at the very end
                    with torch.no_grad():
                        self._update(self.step)
        if ended and self._sampled:
            self._sampled = False
            if pruned := [param for param in self.params if param.pruned]:
                with torch.no_grad():
                    self.masking.after_forward(pruned, self.groups)

    def _update(self, step: int, gradients: bool = True, levels: tuple[float, ...] = ()) -> bool:
        """Set the masks that are due; whether any was.

        Args:
            gradients: whether the gradients there are can be used.
            levels: what is due, whatever the schedule has at this step.
        """
        levels = levels or self._clock.levels(step) or self._overdue
        if not levels or step == self._updated:
            return False
        writes = self.updater.writes_weights or (len(levels) > 1 and not self.masking.remembers)
        earlier = Masks(self.masked, self.groups, weights=writes)
        counters = self.level, self.num_updates
        try:
            self._set_masks(levels, step, gradients)
        except BaseException:
            self._overdue = levels
            self.level, self.num_updates = counters
            earlier.restore()
            self.masking.changed([param for param in self.masked if param.pruned], self.groups)
            raise
        finally:
            self._forget_calibration()
        self._updated, self._overdue = step, ()
        self._look()
        if self.ablation == "reinit":
            self.reinitialize()
        return True

    def _set_masks(self, levels: tuple[float, ...], step: int, gradients: bool) -> None:
        """Set the masks of several levels, one after the other."""
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
                overrides=tuple(None if s is None else self.schedule.share(s, level) for s in self._overrides),
                monotone=monotone,
                progress=self._clock.progress(step),
                number=self.num_updates - 1,
                invert=self.ablation == "invert",
                probe=self._probe,
                gradients=gradients,
            )
            if self.scorer.calibrates:
                assert self._probe is not None
                with whole(self.params):
                    self.scorer.calibrate(self.params, self._probe)
            with whole(self.masked):
                self.updater.update(self.groups, self.scorer, self.structure, self.allocation, due)
            if level == levels[-1] and self.ablation == "shuffle":
                shuffle(self.groups, self.structure)
                for param, value in zip(self.params, before, strict=True):  # earlier rounds have zeroed weights
                    param.weight.copy_(value)
            pruned = [param for param in self.masked if param.pruned]
            self.masking.changed(pruned, self.groups)
            self._stale |= {param.name for param in pruned}

    def _look(self) -> None:
        """After masks changed: note layers that died, and see at the model's next call whether anything passes."""
        # a weight that is one unit may go as a whole
        may_go = {p for group in self.groups for p, layout in group.members if isinstance(layout, Part)}
        left = kept_each(self.params) if self.level < 1 else [1] * len(self.params)
        dead = [p.name for p, kept in zip(self.params, left, strict=True) if kept == 0 and p not in may_go]
        self.collapse.look(dead)
        self._unwatch()
        if dead and self.watches and self._model is not None:
            self._watch = self._model.register_forward_hook(self._called, with_kwargs=True)

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not self._open:  # within a step the weights may be others
            self._unwatch()
            self.judge(lambda: passes(model, args, kwargs), lambda text: warnings.warn(text, stacklevel=2))

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def judge(self, depends: Callable[[], bool], warn: Callable[[str], Any]) -> None:
        """Judge layers of which the newest masks keep nothing. Call it between two optimizer steps.

        Args:
            depends: whether the loss, or what the network returns, depends on its inputs.
            warn: called with a warning of layers that lost all weights beside others that did not.

        Raises:
            RuntimeError: nothing passes through the network.
        """
        if self.collapse.judged:
            return
        returning = self.revives and not self.settled
        self.collapse.judge(self.step, self.sparsity, self.ablation is not None, returning, depends, warn)

    @torch.no_grad()
    def reinitialize(self) -> None:
        """Draw all weights anew, by each layer's `reset_parameters`, under the present masks."""
        assert self._model is not None
        for module in self._model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        agree_on((*self._model.parameters(), *self._model.buffers()))
        self.written()

    @torch.no_grad()
    def written(self) -> None:
        """Call it after all weights were written from outside: they become the latent values too, and are masked."""
        self.refuse_unfollowed()
        for param in self.masked:
            if param.latent is not None:
                param.latent.copy_(self.masking.behind(param.data))
        self.masking.changed([param for param in self.masked if param.pruned], self.groups)

    @torch.no_grad()
    def shrink(self, cuts: Mapping[str, Cut]) -> None:
        """Follow weights from which pruned channels were removed (`export.shrink`): masks and their state.

        The sparsity remains that of the original weights, and further masks are those without the removal.

        Args:
            cuts: the removed parts, by the name of the weight.

        Raises:
            ValueError: pruned weights could return, so that they may not be removed.
        """
        if (reason := self.unshrinkable) is not None:
            raise ValueError(reason)
        self.remove(cuts)

    @property
    def unshrinkable(self) -> str | None:
        """Why pruned weights may not be removed during training, or None."""
        if self.masking.remembers:
            return (
                f"masking={name_of(self.masking)} remembers pruned weights, which removing would lose: use masking=hard"
            )
        if not isinstance(self.updater, Prune):
            return f"updater={name_of(self.updater)} brings pruned weights back: use updater=prune to remove them"
        return None

    # State

    @torch.no_grad()
    def apply(self) -> None:
        """Bind the masks to weights that were loaded or moved: kept latent values follow the weights."""
        self._require_attached()
        self._owned = {}
        self._open = {}
        conceal(exposed := [param for param in self.masked if param.aside is not None])
        for param in exposed:
            param.write(param.values)
        self._counted = None
        self._hold(self.masked)

    def _hold(self, params: Sequence[MaskedParameter], written: bool = False) -> None:
        """Mask weights that were loaded, moved or replaced; kept latent values follow them.

        Args:
            written: whether the weights are new values, and not what was made of latent ones.
        """
        self.to_weights()
        for param in params:
            if param.pruned:
                if param.latent is not None and (written or not self.masking.transforms):
                    param.latent.copy_(torch.where(param.mask, self.masking.behind(param.data), param.latent))
                zero_pruned([param.data], [param])

    @torch.no_grad()
    def to_weights(self) -> None:
        """Move masks, and all that goes with them, to the devices that the weights are on by now."""
        for param in self.masked:
            param.to_weight()
        for group in self.groups:
            if group.gate is not None:
                group.gate.to(group.members[0][0].weight.device)

    @property
    def group_overrides(self) -> list[tuple[Group, float | None]]:
        """Each group and its own final sparsity, None where it shares the common one."""
        return list(zip(self.groups, self._overrides, strict=True))

    @property
    def facts(self) -> dict[str, float]:
        """Figures of what scorer and updater learned or did, by name."""
        return {**self.scorer.facts(self.groups), **self.updater.facts(self.groups)}

    @property
    def target(self) -> float | None:
        """The requested final sparsity: of the pattern (N:M), else of the schedule, overrides included.

        None where it is not set but follows from training.
        """
        if not self.updater.targets_sparsity:
            return self.updater.target(self.schedule.final)
        shared = self.schedule.final if self.structure.fixed is None else self.structure.fixed
        if not self.groups or not self.schedule.final:
            return self.schedule.final
        removed = sum(group.numel * (shared if s is None else s) for group, s in self.group_overrides)
        return removed / self.numel

    def state_dict(self) -> dict[str, Any]:
        """Masks, latent values, what the scorer gathered, and counters."""
        if self._pending is not None:
            return dict(self._pending)
        self.refuse_unfollowed()
        return {
            "version": _VERSION,
            "step": self.step,
            "updated": self._updated,
            "level": self.level,
            "floor": self._floor,
            "num_updates": self.num_updates,
            "overdue": list(self._overdue),
            "stale": sorted(self._stale),
            "estimates": self._clock.estimates() or self._estimates,
            "settings": settings_of(self),
            "params": state_of(self.masked, self.groups),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; before `attach` it is kept until then.

        A state that was saved before `attach` has no weights: a tuner of the Trainer, or a checkpoint after a
        validation, writes such a one. It changes nothing.

        Raises:
            ValueError: it is of another version, another model, or was made with other settings; nothing has changed
                then.
        """
        if state.get("version") not in _READABLE:
            raise ValueError(
                f"the pruning state has version {state.get('version')!r}, and this release reads version {_VERSION}"
            )
        if not state["params"]:
            return
        refuse_other_settings(state, self)
        if self.attached:
            self._restore(state)
        else:
            self._pending = state

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Any]) -> None:
        load_state(self.masked, self.groups, state["params"])
        self.step = state["step"]
        self._updated = state["updated"]
        self.level = state["level"]
        self._floor = state["floor"]
        self.num_updates = state["num_updates"]
        self._overdue = tuple(state.get("overdue", ()))
        self._stale = set(state["stale"])
        self._estimates = state.get("estimates")

    def refuse_unfollowed(self) -> bool:
        moved = super().refuse_unfollowed()
        if moved and self._model is not None:
            held = (*self._model.named_parameters(), *self._model.named_buffers())
            there = {plain_name(name): tensor.shape for name, tensor in held}
            _refuse_lost([p.name for p in self.masked if p.pruned and there.get(p.name) != p.shape])
        return moved

    def _require_attached(self) -> bool:
        if not self.attached:
            raise ValueError("the pruner has no model yet: call attach(model) first")
        return self.refuse_unfollowed()


def _refuse_lost(names: Sequence[str]) -> None:
    if names:
        raise RuntimeError(
            f"{', '.join(names)}: pruned weights that are gone from the model or have another shape, as something "
            "replaced or removed the layer during training. Replace layers before training (in configure_model), or "
            "keep their names and shapes; read figures before a removal, and prune what is left with a new Pruner"
        )


def _member(kind: type[A], value: str | A) -> A:
    """The member of an axis that a name stands for, or that was given."""
    if isinstance(value, str):
        return build(kind, value)
    if not isinstance(value, kind):
        raise TypeError(f"{kind.axis} must be a name or a {kind.__name__}, got {value!r}")
    return value


def _schedule(schedule: str | Schedule, sparsity: float | None, fixed: float | None) -> Schedule:
    """The schedule; one that is given by name ends at `sparsity`, or at the sparsity of the pattern."""
    if isinstance(schedule, str):
        sparsity = fixed if sparsity is None else sparsity
        if sparsity is None:
            raise ValueError(f"schedule={schedule!r} needs the final sparsity: give one, such as sparsity=0.9")
        if fixed is not None and sparsity not in (0.0, fixed):
            raise ValueError(
                f"sparsity={sparsity:g} contradicts the structure, whose pattern has {fixed:g}: leave it out"
            )
        return build(Schedule, schedule, final=sparsity)
    schedule = _member(Schedule, schedule)
    if sparsity is not None and schedule.final != sparsity:
        raise ValueError(
            f"sparsity={sparsity} contradicts the schedule's final={schedule.final}: give one of them, or the same"
        )
    return schedule


class PrunerOptions(TargetOptions, total=False):
    """The arguments of `Pruner`, where a function takes them by keyword."""

    scorer: str | Scorer
    schedule: str | Schedule
    structure: str | Structure
    allocation: str | Allocation
    updater: str | Updater
    masking: str | Masking
    sparsity: float | None
    targets: Targets | None
    ablation: Literal["shuffle", "reinit", "invert"] | None
