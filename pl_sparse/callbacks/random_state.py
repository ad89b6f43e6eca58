"""Random generators that resume from a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["RandomState"]


class RandomState(Callback):
    """Saves the state of the random generators (torch, CUDA, NumPy, Python) in checkpoints, so that a resumed run with
    dropout or shuffling is the uninterrupted one, bit for bit.

    Only plain types are stored, which `torch.load(weights_only=True)` accepts. Each process has its own state, so that
    a training is exact if it resumes with the same number of processes; a further process starts from its seed.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the loaders are iterated for the first time: a shuffling one draws its seed then.
        state, self._restored = self._restored, None
        if state is None:
            return
        if "ranks" in state:
            if trainer.global_rank >= len(state["ranks"]):
                return
            state = state["ranks"][trainer.global_rank]
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, np.asarray(keys).tolist(), *rest],
            "python": list(random.getstate()),
        }
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return state
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, state)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
