"""A model in training mode without dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pl_sparse.core.upstream import compiled

__all__ = ["without_dropout"]

_FUNCTIONS = frozenset(
    (
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
    )
)
_WORDS = ("dropout", "droppath", "stochasticdepth")


class _NoDropout(TorchFunctionMode):
    """Functional dropout hands its input on; attention keeps all of its weights."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FUNCTIONS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        elif func is F.multi_head_attention_forward:
            kwargs["training"] = False
        return func(*args, **kwargs)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in training mode, norms included, and drops nothing.

    Dropout is known as a module by its class's name, as a function by what it is, and as an argument of attention and
    of recurrent layers. The training flags are left to the caller to put back.

    Args:
        model: its modules' flags are set.
    """
    model.train()
    recurrent = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    for module in model.modules():
        if any(word in type(module).__name__.lower() for word in _WORDS):
            module.eval()
    for layer, _ in recurrent:
        layer.dropout = 0.0
    try:
        with nullcontext() if compiled(model) else _NoDropout():
            yield
    finally:
        for layer, rate in recurrent:
            layer.dropout = rate
