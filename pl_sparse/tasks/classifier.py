"""A LightningModule that trains any network to classify."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from pl_sparse.callbacks.rewind import training_length
from pl_sparse.tasks.lr import ConstantLR, LRSchedule

__all__ = ["Classifier"]


class Classifier(LightningModule):
    """Cross-entropy training of `net`.

    Logs train/loss, train/acc, val/loss, val/acc, test/loss, test/acc, as means over the epoch's samples. For val and
    test it also logs the network's `reported_metrics()`, torchmetrics by name.

    Args:
        net: from inputs (batch, *shape) to logits (batch, classes), or (batch, ..., classes) with labels (batch, ...).
        classes: the number of classes.
        optimizer: makes the optimizer from parameter groups. Biases and norms have no weight decay.
        lr_schedule: the learning rate over training.
        label_smoothing: in [0, 1).
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer] = torch.optim.AdamW,
        lr_schedule: LRSchedule | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = net
        self.classes = classes
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule or ConstantLR()
        self.label_smoothing = label_smoothing
        self.val_acc = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(classes, average="micro", validate_args=False)
        own: Any = getattr(net, "reported_metrics", dict)
        self.own = nn.ModuleDict({split: nn.ModuleDict(own()) for split in ("val", "test")})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=self.label_smoothing)
        accuracy = (logits.detach().argmax(-1) == y).float().mean()
        metrics = {"train/loss": loss.detach(), "train/acc": accuracy}
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(y), sync_dist=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, metric: MulticlassAccuracy) -> None:
        x, y = batch
        logits = self.net(x)
        metric.update(logits.argmax(-1), y)
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        self.log(f"{split}/loss", loss, batch_size=len(y), prog_bar=True, sync_dist=True)
        self.log(f"{split}/acc", metric, batch_size=len(y), prog_bar=True)
        for name, own in self.own[split].items():  # type: ignore[operator]
            own.update(logits, y)
            self.log(f"{split}/{name}", own, batch_size=len(y))

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.net.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in self.net.parameters() if p.requires_grad and p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}] * bool(decayed)
        groups += [{"params": others, "weight_decay": 0.0}] * bool(others)
        optimizer = self.optimizer(groups)
        total = training_length(self.trainer)
        if total == float("inf"):
            if not isinstance(self.lr_schedule, ConstantLR):
                raise ValueError(
                    f"{type(self.lr_schedule).__name__} needs the length of training: set max_epochs or max_steps"
                )
            return optimizer
        schedule, steps = self.lr_schedule, int(total)
        scheduler = LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
