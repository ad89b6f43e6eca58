"""Where a model keeps its parameters, to see at next to no cost whether any was replaced."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn

from pl_sparse.core.upstream import registries

__all__ = ["Places"]


class Places:
    """The parameters and submodules of a model by where they stand, as they are now.

    A look costs some 50 ns per parameter and module, without a walk through the model.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> places = Places(net)
    >>> net[0].weight = nn.Parameter(net[0].weight.detach())
    >>> places.hold
    False
    """

    def __init__(self, model: nn.Module) -> None:
        # a list that a module leaves gets another registry
        owned = [(vars(module), *registry) for module in model.modules() for registry in registries(module)]
        self._registries = [registry for _, _, registry in owned]
        self._sizes = [len(registry) for registry in self._registries]
        entries = owned + [(registry, *entry) for registry in self._registries for entry in registry.items()]
        self._of: list[dict[str, Any]] = [registry for registry, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._held: list[Any] = [held for _, _, held in entries]
        self._identities = set(map(id, self._held))

    @property
    def hold(self) -> bool:
        """Whether each parameter and submodule is still where it was, and no other came."""
        return [*map(len, self._registries)] == self._sizes and all(
            map(is_, map(dict.get, self._of, self._names), self._held)
        )

    def __contains__(self, held: object) -> bool:
        """Whether a parameter or submodule was in the model."""
        return id(held) in self._identities  # it is held, so that no other object has its identity
