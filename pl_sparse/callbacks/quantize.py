"""The callback that trains a model to compute with integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pl_sparse.callbacks.best_at_target import BestAtTarget
from pl_sparse.callbacks.calibration import first_batches, network_of
from pl_sparse.callbacks.clock import Timetable, total_steps
from pl_sparse.quantize import Quantization
from pl_sparse.schedule import Time

__all__ = ["Quantize"]


class Quantize(Callback):
    """Trains for integers: `Trainer(callbacks=[Sparsity(sparsity=0.9), Quantize(Int8())])`.

    From `begin` on the module's network computes with rounded weights; optimizer, masks and checkpoints keep its
    floating-point parameters. Validation sees the rounded network too, and checkpoints and early stopping that monitor
    a metric judge only from then on. The network stays rounded after training; `quantization.convert()` returns it with
    integers, `quantization.release()` restores floating point. A resumed training ends like an uninterrupted one.

    Args:
        quantization: `Int8()` or `Int4Weight()`.
        begin: when the simulation of integers begins, best after the last pruning.
        freeze: the time from which ranges and BatchNorm's statistics are fixed.
        network: the name of the submodule that is quantized; None for `net` where there is one, else the module itself,
            whose `forward` its `training_step` must then call.

    Raises:
        ValueError: before training starts, if the network cannot be quantized, or there are several processes.
    """

    def __init__(
        self, quantization: Quantization, begin: Time = 0.7, freeze: Time = 0.9, network: str | None = None
    ) -> None:
        self.quantization = quantization
        self.begin = begin
        self.freeze = freeze
        self.network = network
        self.active = False
        self._frozen = False
        self._first = True  # whether the first batch is still to come
        self._calls = 0  # of the network, in the first batch
        self._hook: RemovableHandle | None = None
        self._times = Timetable("quantization", begin=begin, freeze=freeze)
        self._restored: Mapping[str, Any] | None = None
        self._example: Tensor | None = None
        self._judging: BestAtTarget | None = None

    def net(self, module: LightningModule) -> nn.Module:
        """The part of a module that is quantized, or the module itself."""
        if self.network is not None:
            return module.get_submodule(self.network)
        return network_of(module)

    # Before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError("processes do not share ranges of activations: quantization trains in one process alone")
        self._judging = BestAtTarget(trainer, lambda: self.active)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = total_steps(trainer)
        self._times.start(trainer)
        begin, freeze = self._times.at("begin"), self._times.at("freeze")
        if begin >= total or freeze < begin:
            raise ValueError(
                f"begin={self.begin!r} is step {begin} and freeze={self.freeze!r} is step {freeze}, of {total}: "
                "begin must be before the end of training, and freeze must not be before begin"
            )
        with torch.random.fork_rng():  # a loader that shuffles draws its seed
            x = _input(first_batches(trainer, 1)[0])
        self._example = x
        net = self.net(pl_module)
        restored, self._restored = self._restored, None
        if trainer.global_step == 0 and self.active:  # a second fit
            self.quantization.release()
            self.active = False
        self._frozen = False
        # Even where it begins later: what cannot be quantized is refused before training.
        self.quantization.prepare(net, x)
        if restored is not None and restored["active"]:
            self.active = True
            self._frozen = restored["frozen"]
            self.quantization.load_state_dict(restored["ranges"])
        else:
            self.quantization.release()
        self._first = True
        self._calls = 0
        self._hook = net.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: Any) -> None:
        self._calls += 1

    # Steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._example is not None
        self._times.batch_starts(trainer)
        if self._times.passed("begin") and not self.active:
            self.quantization.prepare(self.net(pl_module), self._example)
            self.active = True
        if self._times.passed("freeze") and not self._frozen:
            self.quantization.freeze()
            self._frozen = True
        self.quantization.learning = True  # a network in evaluation mode, as pretrained ones come, has ranges too
        net = self.net(pl_module)
        if self._first and "forward" in vars(net):
            # Multiply-accumulates of the first batch are counted by hooks of layers, which a graph does not call.
            training = net.training
            with torch.no_grad():
                type(net).forward(net.eval(), _input(batch))
            net.train(training)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._times.batch_ended(trainer)
        self.quantization.learning = False
        if not self._first:
            return
        self._first = False
        self._unhook()
        if not self._calls:
            name = self.network or ("net" if self.net(pl_module) is not pl_module else "the module's forward")
            raise ValueError(
                f"training_step did not call {name}, so that nothing would be quantized: give Quantize(network=...) "
                f"the submodule that it calls, one of {', '.join(key for key, _ in pl_module.named_children())}"
            )

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._unhook()
        self._times.release()
        self.quantization.learning = None
        if self._judging is not None:
            self._judging.release()
            self._judging = None

    # State

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": self.active,
            "frozen": self._frozen,
            "ranges": self.quantization.state_dict(),
            "times": self._times.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        self._times.load_state_dict(state_dict.get("times"))


def _input(batch: Any) -> Tensor:
    """The input of the network in a batch: the tensor that it is or begins with."""
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, Tensor):
        raise ValueError(
            f"quantization traces networks with one input tensor, and a training batch is a {type(batch).__name__} "
            "that does not begin with a tensor"
        )
    return x
