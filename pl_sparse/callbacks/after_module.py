"""A function that is called after the module's own hook, where Lightning calls the callbacks before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from pl_sparse.core.upstream import override, restore

__all__ = ["AfterModule"]


class AfterModule:
    """Calls a function after a hook of the module, where the module has one of its own.

    Gradients that the module cleans or scales in `on_before_optimizer_step` are seen as the optimizer will see them,
    and still before they are clipped; the module's hook sees the dense gradients.

    Args:
        module: whose hook it is.
        hook: its name.
        function: gets the hook's arguments.
    """

    def __init__(self, module: LightningModule, hook: str, function: Callable[..., None]) -> None:
        self._module, self._hook, self._function = module, hook, function
        self._both: Callable[..., None] | None = None  # what stands in the hook's place
        self._earlier: Any = None  # what stood there on the object, not its class
        self.follow()

    @property
    def follows(self) -> bool:
        """Whether there is such a hook; otherwise nothing is done."""
        return self._both is not None

    def follow(self) -> None:
        """Stand last again, where something has set or wrapped the hook since."""
        current = vars(self._module).get(self._hook)
        if current is not None and current is self._both:
            return
        self._both, self._earlier = None, current
        if current is None and getattr(type(self._module), self._hook) is getattr(LightningModule, self._hook):
            return
        own = getattr(self._module, self._hook)

        def both(*args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            if self._both is both:  # not one that something else has wrapped, with another around it
                self._function(*args, **kwargs)

        self._both = both
        override(self._module, self._hook, both)

    def release(self) -> None:
        """Leave the module's hook as it was; what something else has put around it stays."""
        ours, self._both = self._both, None
        if ours is None or vars(self._module).get(self._hook) is not ours:
            return
        if self._earlier is not None:
            override(self._module, self._hook, self._earlier)
        else:
            restore(self._module, self._hook)
