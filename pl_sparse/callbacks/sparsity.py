"""The callback that trains any LightningModule to be sparse."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Unpack, overload

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_sparse.callbacks.after_module import AfterModule
from pl_sparse.callbacks.audit import Audit
from pl_sparse.callbacks.best_at_target import BestAtTarget
from pl_sparse.callbacks.calibration import Calibration, example_at_hand, example_of
from pl_sparse.callbacks.clock import estimates, progress
from pl_sparse.callbacks.collapse import judge, judge_at_end
from pl_sparse.callbacks.coverage import report_coverage
from pl_sparse.callbacks.mac_count import MacCount
from pl_sparse.callbacks.several import log_names, overlap
from pl_sparse.callbacks.steps import StepHooks, refuse_optimizers
from pl_sparse.callbacks.strategies import refuse_difference, refuse_strategy, together
from pl_sparse.core.compact import expand, expand_before_loading
from pl_sparse.core.dtensor import local, reshard
from pl_sparse.core.optional import nice_to_have
from pl_sparse.core.registry import Axis, names
from pl_sparse.core.targets import Patterns
from pl_sparse.core.upstream import averaged_models, found_infinite_gradients, unscale_gradients
from pl_sparse.pruner import Pruner, PrunerOptions
from pl_sparse.results.summary import Summary, summarize, summary_table
from pl_sparse.schedule import Schedule
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Structure

__all__ = ["Sparsity"]


class Sparsity(Callback):
    """Trains the model to be sparse: `Trainer(callbacks=[Sparsity(sparsity=0.9)])`.

    Between two optimizer steps the parameters are the sparse weights under their own names, so that validation,
    checkpoints and `load_from_checkpoint` need nothing of this callback. Masks, latent values, the state of the scorer
    and counters are in the callback's part of a checkpoint: a resumed training ends like an uninterrupted one.

    If nothing passes through the network any more, training ends with a RuntimeError at that update.

    Checkpoints and early stopping that monitor a metric judge only once the sparsity is reached. Averaged weights (EMA,
    SWA) are masked like the model's. The sparsity is logged as "sparsity", at each update and each epoch. A table at
    the end lists the kept weights of each layer.

    Args:
        pruner: a `Pruner`; None: it is made from the other arguments.
        calibration_batches: the number of training batches for scorers and updaters that look at the whole model (SNIP,
            GraSP, Wanda, SparseGPT). Their loss is that of the module's own `training_step`, whose logging is ignored.
        report: whether to print the table at the end of training.

    All other arguments are those of `Pruner`, by keyword: `Sparsity(scorer="movement", structure="nm24")`.

    Raises:
        ValueError: as `Pruner` does, before training starts: unknown names, patterns that match nothing, weights that
            the structure does not fit, a schedule that does not fit the training, a checkpoint of another model.
        TypeError: the argument by position is not a `Pruner`.
    """

    def __init__(
        self,
        pruner: Pruner | None = None,
        *,
        calibration_batches: int = 1,
        report: bool = True,
        **options: Unpack[PrunerOptions],
    ) -> None:
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches={calibration_batches!r} must be 1 or more")
        if pruner is not None and not isinstance(pruner, Pruner):
            raise TypeError(_meant(pruner))
        if pruner is not None and options:
            raise TypeError(f"{', '.join(options)} belong to the Pruner: Sparsity(Pruner({', '.join(options)}=...))")
        self.pruner = Pruner(**options) if pruner is None else pruner
        self.calibration_batches = calibration_batches
        self.report = report
        self.sparsity = 0.0
        self.summary: Summary | None = None
        self._timekeeper: Optimizer | None = None  # the first that steps in a batch
        self._hooks: StepHooks | None = None
        self._judging: BestAtTarget | None = None
        self._macs = MacCount()
        self._log_name = "sparsity"
        self._seen = 0
        self._audit = Audit()
        self._restored = False  # whether a state was loaded since the last fit began
        self._after_module: AfterModule | None = None
        self._loading: RemovableHandle | None = None

    @overload
    @staticmethod
    def of(trainer: Trainer, required: Literal[True] = True) -> Sparsity: ...
    @overload
    @staticmethod
    def of(trainer: Trainer, required: bool) -> Sparsity | None: ...
    @staticmethod
    def of(trainer: Trainer, required: bool = True) -> Sparsity | None:
        """The trainer's (first) Sparsity callback.

        Raises:
            ValueError: it has none and one is required.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Sparsity):
                return callback
        if required:
            raise ValueError("the trainer has no Sparsity callback: add one, Trainer(callbacks=[Sparsity(...)])")
        return None

    @cached_property  # the Trainer asks for it at each of its hooks
    def state_key(self) -> str:
        def words(patterns: Patterns | None) -> list[str] | None:
            return None if patterns is None else [p if isinstance(p, str) else p.__name__ for p in patterns]

        return self._generate_state_key(
            include=words(self.pruner.targets.include), exclude=words(self.pruner.targets.exclude)
        )

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        hooked = pl_module.register_load_state_dict_pre_hook(expand_before_loading)  # type: ignore[no-untyped-call]
        self._loading = hooked

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in `setup`: a module may build its layers in its own `setup` or `configure_model`, which come later.
        refuse_strategy(trainer)
        self._start_anew(pl_module)
        self.pruner.watches = False
        self.attach(trainer, pl_module)
        self._join(trainer)
        if self.pruner.level and not self.pruner.num_updates and not self.pruner.step:
            rank_zero_info(
                f"the model is sparse already: its zeros, {self.pruner.level:.2%} of its weights, stay pruned"
            )
        self._judging = BestAtTarget(trainer, lambda: self.pruner.at_target)
        self.sparsity = self.pruner.sparsity

    def _start_anew(self, pl_module: LightningModule) -> None:
        """Forget the model of an earlier fit, unless this one continues it or a state that was loaded."""
        restored, self._restored = self._restored, False
        if not self.pruner.attached or restored or self.pruner.carries_on(pl_module):
            return
        self.pruner.reset()
        self.summary, self._macs, self._audit = None, MacCount(), Audit()
        rank_zero_info(
            "the Sparsity callback has pruned another model before, or this one with other weights: it forgets those "
            "masks. To carry masks over: sparsity.load_state_dict(sparsity.state_dict()) before fit"
        )

    def _join(self, trainer: Trainer) -> None:
        """Refuse a weight that another Sparsity callback prunes, and take a name of its own beside others."""
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, Sparsity)]  # type: ignore[attr-defined]
        others = [callback.pruner for callback in callbacks if callback is not self]
        if (reason := overlap(self.pruner, others)) is not None:
            raise ValueError(reason)
        if all(other.attached for other in others):  # the last one to attach names them all
            log_name_of_each = log_names([callback.pruner for callback in callbacks])
            for callback, log_name in zip(callbacks, log_name_of_each, strict=True):
                callback._log_name = log_name

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind to the module's weights; a structure that looks at how layers are joined sees a training batch."""
        with together(trainer):
            self.pruner.attach(pl_module, self._example(trainer, pl_module))

    def _example(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        structure = self.pruner.structure
        if structure.needs_example:
            return example_of(trainer, pl_module)
        last = structure.removes_outputs and self.pruner.targets.last is None  # to see which layer is the last one
        if structure.sees_example or last:
            return example_at_hand(trainer, pl_module)
        return None

    def _find_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up parameters that the module has replaced or added."""
        if self.pruner.shared:
            reshard(pl_module)
        if not self.pruner.moved:
            return
        new = set(self.pruner.find_again(self._example(trainer, pl_module)))
        if not new:
            return
        rank_zero_info(f"{', '.join(sorted(new))}: replaced or added after pruning was set up, and pruned from here on")
        trained = {param for optimizer in trainer.optimizers for param in self.pruner.weights_of(optimizer)}
        alone = [param.name for param in self.pruner.params if param.name in new and param not in trained]
        if alone and not trained:
            raise RuntimeError(
                f"{', '.join(alone[:5])}: replaced after the optimizers were made, so that no optimizer trains a "
                "pruned weight. Make the optimizers anew, or replace weights in configure_model"
            )
        if alone:
            rank_zero_warn(
                f"{', '.join(alone)}: replaced or added after the optimizers were made: no optimizer trains them"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = self.pruner
        if trainer.global_step == 0 and trainer.fit_loop.total_batch_idx < 0 and pruner.step > 0:
            pruner.restart()
        self._find_again(trainer, pl_module)
        pruner.apply()
        refuse_optimizers(trainer, pruner.masking)
        if not any(pruner.weights_of(optimizer) for optimizer in trainer.optimizers):
            raise ValueError(
                "no optimizer trains a weight that is to be pruned: "
                + ", ".join(param.name for param in pruner.params[:5])
                + ". Unfreeze them, or choose others by `include`"
            )
        self._hooks = StepHooks(before=self._before_step, after=self._after_step, written=self._written)
        self._hooks.follow(trainer, *trainer.optimizers)
        self._after_module = AfterModule(
            pl_module, "on_before_optimizer_step", lambda optimizer: self._before_step(trainer, optimizer)
        )
        pruner.trusts_steps = self._sees_last(trainer, pl_module)
        probe = Calibration(trainer, pl_module, self.calibration_batches).probe() if pruner.calibrates else None
        with together(trainer):
            pruner.prepare(*estimates(trainer, pruner.schedule), probe)
        self._seen = -1
        self.look(trainer)
        if pruner.structure.fixed is not None and pruner.schedule.final not in (0.0, pruner.structure.fixed):
            rank_zero_info(
                f"structure={pruner.structure.label} prescribes a sparsity of {pruner.structure.fixed:g}; "
                f"the schedule's {pruner.schedule.final:g} shapes only the way there"
            )
        for name, reason in pruner.misfits.items():
            rank_zero_info(f"{name} stays dense: {reason}")
        report_coverage(pruner)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._judging is not None:
            self._judging.after_sanity_check(trainer)

    def _sees_last(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether nobody changes gradients after this callback saw them, but by clipping, nor weights in the step."""
        hooks = "configure_gradient_clipping", "optimizer_step"
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return not any(_has_own(pl_module, LightningModule, hook) for hook in hooks) and not any(
            _has_own(callback, Callback, "on_before_optimizer_step")
            for callback in callbacks[callbacks.index(self) + 1 :]
            if not isinstance(callback, Sparsity)
        )

    # Steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._timekeeper = None
        if self._hooks is not None:
            self._hooks.follow(trainer, *trainer.optimizers)
            self.pruner.trusts_steps &= self._hooks.alone
        if self._after_module is not None:
            self._after_module.follow()
        self._find_again(trainer, pl_module)
        if self.pruner.thaws:
            names = self.pruner.thaw(self._example(trainer, pl_module))
            rank_zero_info(f"{', '.join(names)}: no longer frozen, pruned from here on")
        judge(self.pruner, trainer, pl_module, batch)
        with together(trainer):
            self.pruner.before_forward()
        self._macs.start(pl_module, self.pruner.params)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.pruner.attached and not self._macs.known:  # attention computes otherwise while it is counted
            self._macs.start(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        loaders = trainer.test_dataloaders
        self._macs.finish(batch, loaders[dataloader_idx] if isinstance(loaders, list) else loaders, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        unscale_gradients(trainer, optimizer)
        if self._after_module is None or not self._after_module.follows:
            self._before_step(trainer, optimizer)

    def _before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        self._macs.refuse_lost()
        if self._hooks is not None and not self._hooks.follows(optimizer):
            self._hooks.follow(trainer, optimizer)  # one that was made or replaced in this batch
        if self._timekeeper is None and self.pruner.weights_of(optimizer):
            self._timekeeper = optimizer
        skipped = found_infinite_gradients(trainer, optimizer)
        step = self.pruner.step if optimizer is self._timekeeper else None
        with together(trainer), self._macs.aside():
            self.pruner.before_step(step, optimizer=optimizer, observe=not skipped)
        if skipped:
            self.pruner.after_step(optimizer)  # the scaler leaves the step out, and its hook with it
        if self.pruner.num_updates != self._seen:
            self.look(trainer)

    def _after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        self.pruner.after_step(optimizer)

    def _written(self) -> None:
        """After an optimizer has put averaged weights into the model, or taken them back."""
        if self.pruner.attached:
            self.pruner.apply()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pruner.after_step()  # ends a sample, and a step that was replaced by one without hooks
        self._keep_time(trainer)
        if self.pruner.num_updates != self._seen:
            self.look(trainer)
        self._macs.refuse_lost()
        self._macs.finish(batch, trainer.train_dataloader, batch_idx)
        judge(self.pruner, trainer, pl_module, batch)

    def _keep_time(self, trainer: Trainer, ended: bool = False) -> None:
        """Let the schedule follow what is behind of training, and reach its last level before training ends."""
        if self.pruner.over:
            return
        behind, epochs = progress(trainer, ended)
        self.pruner.follow(behind, epochs)
        if behind is None or behind < 1:
            return
        sparsity, planned = self.pruner.sparsity, self.pruner.ends_last
        with together(trainer):
            caught_up = self.pruner.catch_up()
        if caught_up and not planned:
            rank_zero_warn(
                f"training ends after {self.pruner.step} optimizer steps, before the schedule does: the sparsity is "
                f"raised from {sparsity:.4f} to {self.pruner.sparsity:.4f} at once, without training after it. Let the "
                "schedule end earlier, or give its times in steps"
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._audit.fits(trainer, batch_idx, dataloader_idx):
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        """Compare weights with masks, and averaged weights too."""
        assert trainer.lightning_module is not None
        self._find_again(trainer, trainer.lightning_module)
        self._audit.check(self.pruner, trainer)
        self.mask_averages(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_time(trainer, ended=True)  # an epoch may be left before its last batch
        if self.pruner.num_updates != self._seen:
            self.look(trainer)
        judge_at_end(self.pruner, trainer, pl_module)
        self._check(trainer)
        pl_module.log(self._log_name, self.sparsity, sync_dist=True)
        for name, value in self.pruner.facts.items():
            pl_module.log(name, value, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pruner.after_step()
        self._check(trainer)
        judged = self._judging is not None and self._judging.judges
        if not self.pruner.at_target:
            target = self.pruner.target
            aim = "its end" if target is None else f"a sparsity of {target:g}"
            rank_zero_warn(
                f"training ended after {self.pruner.step} optimizer steps, before the schedule reached {aim}: the "
                f"sparsity is {self.sparsity:.4f}."
                + (" No checkpoint was judged the best, and none stopped it early." if judged else "")
                + " Train longer, or let the schedule end earlier."
            )
        self._release()
        self.summary = self.summarize(pl_module)
        if self.report and trainer.is_global_zero:
            with nice_to_have("the table of the layers"):
                Console().print(summary_table(self.summary))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # An interruption between opening and closing a step must not leave latent values in the model that is saved.
        if self.pruner.attached:
            self.pruner.after_step()
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        if self._loading is not None:
            self._loading.remove()
            self._loading = None
        if self.pruner.attached and not self.pruner.shared:
            self.pruner.to_weights()  # the strategy has moved the model to the CPU

    def _release(self) -> None:
        if self._hooks is not None:
            self._hooks.release()
            self._hooks = None
        self._timekeeper = None
        if self._after_module is not None:
            self._after_module.release()
            self._after_module = None
        if self._judging is not None:
            self._judging.release()
            self._judging = None
        self._macs.release()

    # What is logged

    def summarize(self, model: nn.Module, prefix: str = "") -> Summary:
        """What is left of each layer.

        Args:
            prefix: cut from the names, e.g. "net.".
        """
        return summarize(self.pruner, model, self._macs.macs(model, self.pruner), prefix)

    def look(self, trainer: Trainer) -> None:
        """After masks changed: log the sparsity, mask averaged weights."""
        self._seen = self.pruner.num_updates
        refuse_difference(self.pruner, trainer)
        self.sparsity = self.pruner.sparsity
        for logger in trainer.loggers:
            logger.log_metrics({self._log_name: self.sparsity}, step=trainer.global_step)
        self.mask_averages(trainer)

    @torch.no_grad()
    def mask_averages(self, trainer: Trainer) -> None:
        """Averages over weights of several masks are denser than any of them: mask them with the newest."""
        averages = list(averaged_models(trainer))
        masks = {param.name: param for param in self.pruner.masked if param.pruned} if averages else {}
        for average in averages:
            for name, weight in (*average.named_parameters(), *average.named_buffers()):
                param = masks.get(name) or masks.get(name.removeprefix("module."))
                if param is not None:
                    local(weight).mul_(param.mask.to(weight.device))

    # State

    def state_dict(self) -> dict[str, Any]:
        return {**self.pruner.state_dict(), "macs": self._macs.state_dict(), "sparsity": self.sparsity}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for state in checkpoint.get("optimizer_states", []):
            expand(state)
        saved = [key for key in checkpoint.get("callbacks", {}) if key.startswith("Sparsity{")]
        callbacks = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        if trainer.state.fn == "fit" and self.state_key not in saved and (others := set(saved) - callbacks):
            raise ValueError(
                f"the checkpoint was pruned with other include or exclude: {', '.join(sorted(others))} there, "
                f"{self.state_key} here. Train with the same ones, or start from the weights alone"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state_dict)
        attached = self.pruner.attached  # if not, no weights are there to be counted
        self.sparsity = self.pruner.sparsity if attached else state_dict.get("sparsity", 0.0)
        if "macs" in state_dict:
            self._macs.load_state_dict(state_dict["macs"])
        self._restored = True


def _has_own(obj: object, base: type, hook: str) -> bool:
    """Whether an object's hook is not that of a base class."""
    return hook in vars(obj) or getattr(type(obj), hook, None) is not getattr(base, hook)


def _meant(value: object) -> str:
    """What a value that is not a Pruner, given by position, was probably meant as."""
    if isinstance(value, (int, float)):
        return f"Sparsity takes a Pruner, or settings by name: Sparsity(sparsity={value!r})"
    if isinstance(value, str):
        axis = next((kind.axis for kind in (Scorer, Schedule, Structure) if value in names(kind)), "scorer")
        return f"Sparsity takes a Pruner, or settings by name: Sparsity({axis}={value!r})"
    if isinstance(value, Axis):
        return f"Sparsity takes a Pruner, or settings by name: Sparsity({value.axis}={type(value).__name__}(...))"
    return f"Sparsity takes a Pruner, or settings by name as in Sparsity(sparsity=0.9), got {value!r}"
