"""Whether a logger has its library and its server answers, found out in seconds and before training."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from threading import Thread
from typing import Any

from pl_sparse.core.optional import missing

__all__ = ["obstacle"]

_LIBRARIES = {
    "MLFlowLogger": ("mlflow",),
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
}
"""Of which a logger needs one; the first has the name of the extra."""


def obstacle(logger: Mapping[str, Any], seconds: float = 8.0) -> str | None:
    """Why a logger cannot log: its library is missing, or its server does not answer. None if it can.

    Args:
        logger: its settings, with `_target_`.
        seconds: to wait for an answer, names looked up included.
    """
    kind = str(logger.get("_target_", "")).rpartition(".")[2]
    lacking = [missing(name, name) for name in _LIBRARIES.get(kind, ())]
    if lacking and None not in lacking:
        return lacking[0]
    url = _url(kind, logger)
    reason = None if url is None else _unreachable(url, seconds)
    if reason is None:
        return None
    wandb = kind == "WandbLogger"
    remedy = (
        "mode=offline keeps the run here, for wandb sync" if wandb else "tracking_uri=sqlite:///FILE needs no server"
    )
    return f"{kind} cannot reach {url}: {reason}. {remedy}"


def _url(kind: str, logger: Mapping[str, Any]) -> str | None:
    if kind == "WandbLogger" and logger.get("mode") in (None, "online") and not logger.get("offline"):
        if logger.get("mode") is None and os.environ.get("WANDB_MODE", "online") != "online":
            return None
        if "WANDB_BASE_URL" in os.environ:
            return os.environ["WANDB_BASE_URL"]
        import wandb

        return str(wandb.Settings().base_url)
    if kind == "MLFlowLogger":
        uri = str(logger.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or "")
        return uri if uri.startswith(("http://", "https://")) else None
    return None


def _unreachable(url: str, seconds: float) -> str | None:
    """Why nothing answers; any answer of a server counts, an error too."""
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
            reasons.append(None)
        except urllib.error.HTTPError as error:
            error.close()
            reasons.append(None)
        except (OSError, ValueError) as error:
            reasons.append(str(getattr(error, "reason", error)))

    asking = Thread(target=ask, daemon=True)  # a look-up of a name knows no timeout
    asking.start()
    asking.join(seconds)
    return reasons[0] if reasons else f"no answer within {seconds:g} s"
