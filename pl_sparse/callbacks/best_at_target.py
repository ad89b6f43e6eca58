"""Best means best at the target: checkpoints and early stopping judge a model only once it is as sparse as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


class Judging:
    """Holds `EarlyStopping` and the monitoring `ModelCheckpoint`s of a trainer back while `ready()` is False.

    A ModelCheckpoint goes on saving its last checkpoint, and all checkpoints with `save_top_k=-1`, but remembers none
    of them as its best.
    """

    def __init__(self, trainer: Trainer, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self._undo: list[tuple[Any, str]] = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping):
                self._wrap(callback, "_should_skip_check", self._skipping)
            elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                self._wrap(callback, "_save_topk_checkpoint", self._saving)

    @property
    def judges(self) -> bool:
        """Whether anything judges."""
        return bool(self._undo)

    def release(self) -> None:
        """Leave the callbacks as they were."""
        for callback, method in self._undo:
            vars(callback).pop(method, None)
        self._undo = []

    def _wrap(
        self, callback: Any, method: str, wrapper: Callable[[Any, Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        setattr(callback, method, wrapper(callback, getattr(callback, method)))
        self._undo.append((callback, method))

    def _skipping(self, callback: EarlyStopping, check: Callable[..., bool]) -> Callable[..., bool]:
        return lambda trainer: not self.ready() or check(trainer)

    def _saving(self, callback: ModelCheckpoint, save: Callable[..., None]) -> Callable[..., None]:
        def wrapped(trainer: Trainer, candidates: dict[str, torch.Tensor]) -> None:
            if self.ready():
                save(trainer, candidates)
            elif callback.save_top_k == -1:
                save(trainer, candidates)
                callback.best_k_models = {}
                callback.best_model_path = callback.kth_best_model_path = ""
                callback.best_model_score = None
            elif callback.save_last:
                # Lightning saves the last checkpoint only after another one at the same step: let it think so.
                callback._last_global_step_saved = trainer.global_step
                callback._last_checkpoint_saved = ""

        return wrapped
