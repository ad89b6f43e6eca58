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

    Attributes:
        follows: whether there is such a hook; otherwise nothing is done.
    """

    def __init__(self, module: LightningModule, hook: str, function: Callable[..., None]) -> None:
        self._module, self._hook = module, hook
        self._earlier = vars(module).get(hook)  # set on the object, not its class
        self.follows = self._earlier is not None or getattr(type(module), hook) is not getattr(LightningModule, hook)
        if not self.follows:
            return
        own = getattr(module, hook)

        def both(*args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            function(*args, **kwargs)

        override(module, hook, both)

    def release(self) -> None:
        """Leave the module's hook as it was."""
        if self.follows and self._earlier is not None:
            override(self._module, self._hook, self._earlier)
        elif self.follows:
            restore(self._module, self._hook)
        self.follows = False
