"""Best means best at the target: checkpoints and early stopping judge a model only once it is as sparse as asked."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pl_sparse.callbacks.monitored import require, require_of_sanity_check
from pl_sparse.core.upstream import last_checkpoint_is_due, of_kind, saving_best, skipping_checks, validation_has_run

__all__ = ["BestAtTarget"]


class BestAtTarget:
    """Holds `EarlyStopping` and the monitoring `ModelCheckpoint`s of a trainer back while `ready()` is False.

    What they monitor has to be logged: that is checked after the sanity check, and at the first time that they look,
    ready or not.

    A ModelCheckpoint goes on saving its last checkpoint, and all checkpoints with `save_top_k=-1`, but remembers none
    of them as its best.

    Args:
        trainer: its callbacks are held back until `release`.
        ready: whether the model is one that may be the best.
    """

    def __init__(self, trainer: Trainer, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self._undo: list[Callable[[], None]] = []
        self._required: list[tuple[str, str]] = []  # a metric, and the class of what monitors it
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if of_kind(callback, EarlyStopping):
                self._undo.append(skipping_checks(callback, self._skipping(callback, trainer)))
                required = callback.strict
            elif of_kind(callback, ModelCheckpoint) and callback.monitor is not None:
                self._undo.append(saving_best(callback, self._saving(callback)))
                required = callback.save_top_k != 0
            else:
                continue
            if required:
                self._required.append((callback.monitor, type(callback).__name__))

    @property
    def judges(self) -> bool:
        """Whether anything judges."""
        return bool(self._undo)

    def after_sanity_check(self, trainer: Trainer) -> None:
        """Check that what is monitored is logged, as far as the sanity check knows.

        Raises:
            MissingMetricError: it is not.
        """
        for metric, who in self._required:
            require_of_sanity_check(metric, trainer, who)

    def release(self) -> None:
        """Leave the callbacks as they were."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _skipping(self, callback: EarlyStopping, trainer: Trainer) -> Callable[[], bool]:
        """Whether an EarlyStopping leaves its check out."""

        def skips() -> bool:
            if callback.strict:
                _require(callback, trainer)
            return not self.ready()

        return skips

    def _saving(self, callback: ModelCheckpoint) -> Callable[[Callable[[], None], Trainer], None]:
        """What a ModelCheckpoint does in place of saving its best."""

        def save(saves: Callable[[], None], trainer: Trainer) -> None:
            if callback.save_top_k != 0:
                _require(callback, trainer)
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


def _require(callback: EarlyStopping | ModelCheckpoint, trainer: Trainer) -> None:
    """Check that what a callback monitors is logged, once validation has been run.

    Raises:
        MissingMetricError: it is not.
    """
    if not trainer.sanity_checking and validation_has_run(trainer):
        assert callback.monitor is not None
        require(callback.monitor, trainer.callback_metrics, type(callback).__name__)
