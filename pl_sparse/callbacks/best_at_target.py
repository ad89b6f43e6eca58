"""Best means best at the target: checkpoints and early stopping judge a model only once it is as sparse as asked."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pl_sparse.core.upstream import last_checkpoint_is_due, of_kind, saving_best, skipping_checks

__all__ = ["BestAtTarget"]


class BestAtTarget:
    """Holds `EarlyStopping` and the monitoring `ModelCheckpoint`s of a trainer back while `ready()` is False.

    A ModelCheckpoint goes on saving its last checkpoint, and all checkpoints with `save_top_k=-1`, but remembers none
    of them as its best.

    Args:
        trainer: its callbacks are held back until `release`.
        ready: whether the model is one that may be the best.
    """

    def __init__(self, trainer: Trainer, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self._undo: list[Callable[[], None]] = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if of_kind(callback, EarlyStopping):
                self._undo.append(skipping_checks(callback, lambda: not self.ready()))
            elif of_kind(callback, ModelCheckpoint) and callback.monitor is not None:
                self._undo.append(saving_best(callback, self._saving(callback)))

    @property
    def judges(self) -> bool:
        """Whether anything judges."""
        return bool(self._undo)

    def release(self) -> None:
        """Leave the callbacks as they were."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _saving(self, callback: ModelCheckpoint) -> Callable[[Callable[[], None], Trainer], None]:
        """What a ModelCheckpoint does in place of saving its best."""

        def save(saves: Callable[[], None], trainer: Trainer) -> None:
            if self.ready():
                saves()
            elif callback.save_top_k == -1:
                saves()
                callback.best_k_models = {}
                callback.best_model_path = callback.kth_best_model_path = ""
                callback.best_model_score = None
            elif callback.save_last:
                last_checkpoint_is_due(callback, trainer)

        return save
