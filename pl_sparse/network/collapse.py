"""A network through which nothing passes any more is an error, a layer that died beside others a warning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.network.hooks import evaluated, hooked, tensors

__all__ = ["Collapse", "depends_on_inputs", "passes"]

_REMEDY = (
    "What usually helps: allocation=erk, uniform or lamp instead of global, a lower sparsity, a later or slower "
    "schedule, or overrides or exclude for such layers"
)
_TARGETS = ("label", "target")


class Collapse:
    """Watches for layers that keep no weight below a sparsity of 1.

    Where one died, something that the network computes is computed twice, the second time with other inputs. What is
    the same to the bit depends on the targets alone: a RuntimeError; where weights may return, once the last masks are
    set. What was asked for on purpose (`ablation`), and what cannot be tried, is a warning.

    Attributes:
        judged: whether nothing is to be said of the masks there are.
    """

    def __init__(self) -> None:
        self._dead: list[str] = []
        self._named: set[str] = set()
        self.judged = True

    def look(self, dead: Collection[str]) -> None:
        """After masks changed.

        Args:
            dead: the names of the weights of which none is kept.
        """
        self._dead = list(dead)
        self.judged = not self._dead

    def judge(
        self,
        step: int,
        sparsity: float,
        wanted: bool,
        returning: bool,
        depends: Callable[[], bool],
        warn: Callable[[str], Any],
    ) -> None:
        """Say, between two optimizer steps, what the layers that are dead mean.

        Args:
            step: optimizer steps so far.
            sparsity: of the model.
            wanted: whether it was asked for.
            returning: whether weights may return.
            depends: whether the loss, or what the network returns, depends on its inputs.
            warn: what warns.

        Raises:
            RuntimeError: nothing passes through the network.
        """
        if self.judged:
            return
        self.judged = True
        new = set(self._dead) - self._named
        if returning and not new:
            return
        dead, where = ", ".join(self._dead), f"kept no weight at a sparsity of {sparsity:.4f}"
        if not wanted and not returning and not depends():
            raise RuntimeError(
                f"nothing passes through the network after {step} optimizer steps: {dead} {where}, and the loss "
                f"no longer depends on the inputs. {_REMEDY}"
            )
        if new:
            self._named |= new
            warn(f"{dead} {where} and pass nothing on. {_REMEDY}")


@torch.no_grad()
def passes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether what a model returns changes with these inputs: of several outputs the loss, or the logits."""

    def outputs() -> Any:
        out = model(*args, **kwargs)
        if isinstance(out, Mapping):
            out = next((out[key] for key in ("loss", "logits") if out.get(key) is not None), out)
        return torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors(out)])

    with evaluated(model):
        return depends_on_inputs(outputs, [model])


def depends_on_inputs(compute: Callable[[], Tensor], networks: Collection[nn.Module]) -> bool:
    """Whether what is computed changes with the inputs of networks; True where that cannot be found out.

    Args:
        compute: calls some of the networks, twice in the same way.
    """
    try:
        first = compute()
        with _other_inputs(networks) as changed:
            second = compute()
    except Exception:  # of code that is not ours: other inputs need not make sense to it
        return True
    return not changed or not torch.equal(first, second)


@contextmanager
def _other_inputs(networks: Collection[nn.Module]) -> Iterator[list[nn.Module]]:
    """Within the block networks that are called from outside get other inputs; yields those that did.

    To floats noise is added. Where there are none, integers change places, but those that are named as targets.
    """
    depth = 0
    changed: list[nn.Module] = []
    generator = torch.Generator().manual_seed(0)

    def enter(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal depth
        depth += 1
        if depth > 1:
            return None
        inputs = {key: value for key, value in kwargs.items() if not any(word in key for word in _TARGETS)}
        floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in (*args, *inputs.values()))

        def other(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dtype == torch.bool or x.is_floating_point() != floats:
                return x
            changed.append(called)
            if floats:
                return x + torch.randn(x.shape, generator=generator).to(x) * (1 + x.abs())
            return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].reshape(x.shape)

        return tuple(other(x) for x in args), kwargs | {key: other(x) for key, x in inputs.items()}

    def leave(called: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        nonlocal depth
        depth -= 1

    with hooked(networks, pre=enter, post=leave):
        yield changed
