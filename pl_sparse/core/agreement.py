"""What processes that train one model have to see alike: rank 0 decides, the others hear of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor

__all__ = ["agree_on", "agreed", "agreeing"]

T = TypeVar("T")

_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def agreeing(together: bool) -> Iterator[None]:
    """Within the block `agreed` is that of rank 0.

    Args:
        together: whether several processes are in the block, all of them in the same places.
    """
    token = _together.set(together)
    try:
        yield
    finally:
        _together.reset(token)


def agreed(make: Callable[[], T]) -> T:
    """What rank 0 makes; every process makes its own where none other is in the block.

    >>> agreed(lambda: 7)
    7
    """
    if not _together.get():
        return make()
    import torch.distributed as dist

    box: list[T | None] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    made: T = box[0]  # type: ignore[assignment]
    return made


def agree_on(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that they have in rank 0; nothing is done where no other process is in the block."""
    if _together.get():
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, src=0)
