"""Progress: in plain lines, or in the terminal's bar."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from pl_sparse.callbacks.monitored import nearest
from pl_sparse.callbacks.run.history import BOOKKEEPING, History

__all__ = ["ProgressBar", "ProgressLines"]

_MOST = 8


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


class ProgressBar(RichProgressBar):
    """Lightning's bar, with the sparsity and the last value of a metric whether or not the module shows it there.

    Args:
        metric: its name; another spelling of it counts, too.
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        items = super().get_metrics(trainer, pl_module)
        for name in ("sparsity", nearest(self.metric, trainer.callback_metrics)):
            if name is not None and name in trainer.callback_metrics:
                items[name] = f"{float(trainer.callback_metrics[name]):.4f}"
        return items


@rank_zero_only
def _print(row: dict[str, float], epoch: int, epochs: int) -> None:
    values = "  ".join(f"{name} {row[name]:.4f}" for name in _shown(row))
    of = f"/{epochs}" if epochs > 0 else ""
    print(f"epoch {epoch}{of}  {values}  {row['seconds']:.1f} s", flush=True)


def _shown(row: dict[str, float]) -> list[str]:
    """The names that a line shows: those of the package's own tasks first, then whatever a module logs.

    >>> _shown({"epoch": 0, "lr": 0.1, "sparsity": 0.5, "valid_f1": 0.9, "train/loss": 1.0, "train/loss_step": 1.0})
    ['sparsity', 'train/loss', 'valid_f1']
    """
    first = [name for name in ("sparsity", "train/loss", "train/acc", "val/loss", "val/acc") if name in row]
    others = [name for name in row if name not in {*first, *BOOKKEEPING} and not name.endswith("_step")]
    of_a_split = [name for name in others if name.startswith(("train", "val"))]
    return [*first, *(of_a_split or others * (len(first) < 2))][:_MOST]
