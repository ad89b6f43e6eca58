"""A callback that trains the model of Hugging Face's `Trainer` to be sparse."""

from __future__ import annotations

import warnings
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.core.files import replacing
from pl_sparse.core.optional import library
from pl_sparse.network.probe import Probe
from pl_sparse.pruner import Pruner, PrunerOptions

library("transformers", "SparsityCallback", "transformers")
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

__all__ = ["STATE_FILE", "SparsityCallback"]

STATE_FILE = "pl_sparse.pt"
"""What a checkpoint's folder holds of the pruner."""


class SparsityCallback(TrainerCallback):
    """Trains the model to be sparse: `Trainer(callbacks=[SparsityCallback(sparsity=0.9)])`.

    Between two optimizer steps the parameters are the sparse weights, so that evaluation, `save_model` and
    `save_pretrained` see them. Each checkpoint's folder gets the pruner's state, and
    `trainer.train(resume_from_checkpoint=...)` resumes from it. The Trainer clips gradients before it calls the
    callback, so scorers see clipped gradients.

    Args:
        pruner: a `Pruner`; None: it is made from the other arguments.
        calibration_batches: the number of training batches for scorers and updaters that look at the whole model.
        resume_from: the folder of the checkpoint to resume from, if it is neither in `output_dir` nor the
            `resume_from_checkpoint` of the training's arguments.
        options: those of `Pruner`.
    """

    def __init__(
        self,
        pruner: Pruner | None = None,
        *,
        calibration_batches: int = 1,
        resume_from: str | Path | None = None,
        **options: Unpack[PrunerOptions],
    ) -> None:
        if pruner is not None and options:
            raise TypeError(f"{', '.join(options)} belong to the Pruner")
        self.pruner = Pruner(**options) if pruner is None else pruner
        self.calibration_batches = calibration_batches
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pruner, model, loader = self.pruner, kwargs["model"], kwargs["train_dataloader"]
        pruner.attach(model, self._example(model, loader) if pruner.structure.sees_example else None)
        if state.global_step:
            pruner.load_state_dict(torch.load(self._saved(args, state), map_location="cpu", weights_only=True))
        elif pruner.step:
            pruner.restart()
        pruner.apply()
        per_epoch = None
        if hasattr(loader, "__len__"):
            per_epoch = max(-(-len(loader) // args.gradient_accumulation_steps), 1)
        following = islice(chain.from_iterable(repeat(loader)), self.calibration_batches, None)
        probe = Probe(
            model,
            lambda: self._batches(model, loader),
            lambda batch: _loss(model, batch),
            fresh=lambda: self._batches(model, following),
        )
        pruner.prepare(state.max_steps, per_epoch, probe if pruner.calibrates else None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.before_forward()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.before_step(self.pruner.step, optimizer=_unwrapped(kwargs["optimizer"]))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.after_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and self.pruner.attached:
            logs["sparsity"] = self.pruner.sparsity

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            with replacing(folder / STATE_FILE) as temporary:
                torch.save(self.pruner.state_dict(), temporary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.after_step()
        if not self.pruner.at_target:
            warnings.warn(
                f"training ended after {self.pruner.step} optimizer steps at a sparsity of {self.pruner.sparsity:.4f}, "
                "before the schedule reached its end",
                stacklevel=2,
            )

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The pruner's state in the checkpoint that training goes on from.

        Raises:
            ValueError: it is nowhere.
        """
        folders = [self.resume_from, args.resume_from_checkpoint]
        folders.append(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        for folder in folders:
            if folder is not None and (Path(folder) / STATE_FILE).is_file():
                return Path(folder) / STATE_FILE
        raise ValueError(
            f"training resumes from step {state.global_step}, and {folders[-1]} has no {STATE_FILE}: give "
            "SparsityCallback(resume_from=...), the folder of the checkpoint"
        )

    def _example(self, model: nn.Module, loader: Any) -> dict[str, Any]:
        """Two samples of the first batch."""
        with torch.random.fork_rng(devices=[]):  # a shuffling loader draws its seed
            batch = self._batches(model, loader, 1)[0]
        return {key: value[:2] if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _batches(self, model: nn.Module, loader: Any, count: int | None = None) -> list[dict[str, Any]]:
        device = next(model.parameters()).device
        return [
            {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            for batch in islice(loader, self.calibration_batches if count is None else count)
        ]


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**batch)["loss"]
    return loss


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer of torch behind that of accelerate."""
    while not isinstance(getattr(optimizer, "optimizer", None), (type(None), dict)):
        optimizer = optimizer.optimizer
    result: Optimizer = optimizer
    return result
