"""Progress in plain lines."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from pl_sparse.callbacks.run.history import History

__all__ = ["ProgressLines"]


class ProgressLines(Callback):
    """Prints a line per epoch, about `most` lines in all: what a log keeps where a progress bar would fill it.

    Args:
        most: lines of a whole training.
    """

    def __init__(self, most: int = 30) -> None:
        self.most = most

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.max_epochs or 0
        every = max(-(-epochs // self.most), 1)
        epoch = trainer.current_epoch + 1
        if epoch % every and epoch != epochs:
            return
        rows = next((callback.rows for callback in trainer.callbacks if isinstance(callback, History)), [])  # type: ignore[attr-defined]
        if rows:
            _print(rows[-1], epoch, epochs)


@rank_zero_only
def _print(row: dict[str, float], epoch: int, epochs: int) -> None:
    shown = ("sparsity", "train/loss", "train/acc", "val/loss", "val/acc")
    values = "  ".join(f"{name} {row[name]:.4f}" for name in shown if name in row)
    of = f"/{epochs}" if epochs > 0 else ""
    print(f"epoch {epoch}{of}  {values}  {row['seconds']:.1f} s", flush=True)
