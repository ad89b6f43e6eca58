"""What an optimizer remembers, and weights, without what belongs to pruned weights."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.core.optimizers import SCALES, leaves_zeros
from pl_sparse.core.parameter import MaskedParameter, packed, unpacked

__all__ = ["compacted", "compacted_weights", "expand", "expand_before_loading", "expand_weights"]

_KEPT = "kept_of_masked"
_MASK, _SHAPE = ".kept_mask", ".kept_shape"  # what follows the name of a weight of which the kept part is there


def compacted(state: Mapping[str, Any], optimizer: Optimizer, params: Sequence[MaskedParameter]) -> dict[str, Any]:
    """The state of an optimizer, of each of these weights that of what its mask keeps alone, and the mask.

    Left as it is: what is not zero where the weight is pruned, sizes of gradients excepted, and an optimizer whose
    steps might move a pruned weight whose gradient is zero.

    Args:
        state: `optimizer.state_dict()`.
        optimizer: whose state it is.
        params: weights whose pruned part never returns.
    """
    if not leaves_zeros(optimizer):
        return dict(state)
    masks = _masks(params)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    of_each = dict(state["state"])
    for index, weight in enumerate(weights):
        mask = masks.get(id(weight))
        if mask is None or index not in of_each:
            continue
        of_one, kept = dict(of_each[index]), dict[str, Tensor]()
        for key, value in of_one.items():
            like = isinstance(value, Tensor) and value.is_floating_point() and value.shape == mask.shape
            if like and (key in SCALES or not bool((value.bool() & ~mask).any())):
                kept[key] = value[mask]
        if kept:
            of_one |= kept
            of_one[_KEPT] = {"mask": packed(mask), "shape": list(mask.shape), "keys": list(kept)}
            of_each[index] = of_one
    return {**state, "state": of_each}


def expand(state: MutableMapping[str, Any]) -> None:
    """The reverse, in place: of pruned weights there are zeros, and for sizes of gradients ones, as nothing is divided
    by them then but zeros. A state that is not compact stays as it is."""
    for of_one in state.get("state", {}).values():
        if not isinstance(of_one, dict) or _KEPT not in of_one:
            continue
        seen = of_one.pop(_KEPT)
        mask = unpacked(seen["mask"], torch.Size(seen["shape"]))
        for key in seen["keys"]:
            values = of_one[key]
            whole = torch.full(mask.shape, float(key in SCALES), dtype=values.dtype, device=values.device)
            whole[mask.to(values.device)] = values
            of_one[key] = whole


def compacted_weights(
    tensors: Mapping[str, Tensor], model: nn.Module, params: Sequence[MaskedParameter]
) -> dict[str, Tensor]:
    """Weights by name, of each of these what its mask keeps alone, beside its mask and its shape.

    A weight of which any pruned element is not zero to the bit is left as it is.

    Args:
        tensors: the `state_dict` of the model.
        model: whose weights they are.
        params: weights whose pruned part never returns.
    """
    masks, out = _masks(params), dict(tensors)
    for name, weight in model.named_parameters(remove_duplicate=False):
        mask, value = masks.get(id(weight)), out.get(name)
        if mask is None or value is None or value.shape != mask.shape:
            continue
        gone = value.masked_fill(mask, 0).contiguous().view(torch.uint8)
        if not bool(gone.any()):
            out[name] = value[mask]
            out[name + _MASK], out[name + _SHAPE] = packed(mask), torch.tensor(mask.shape)
    return out


def expand_weights(tensors: MutableMapping[str, Any]) -> None:
    """The reverse of `compacted_weights`, in place. Weights that are whole stay as they are.

    Args:
        tensors: the `state_dict` of a checkpoint that `callbacks.Compact(weights=True)` made smaller. A plain model
            loads it then with `strict=True`.

    >>> tensors = {"fc.weight": torch.tensor([5.0]), "fc.bias": torch.ones(1)}
    >>> tensors |= {"fc.weight.kept_mask": packed(torch.tensor([[False, True]]))}
    >>> tensors |= {"fc.weight.kept_shape": torch.tensor([1, 2])}
    >>> expand_weights(tensors)
    >>> {name: tensor.tolist() for name, tensor in tensors.items()}
    {'fc.weight': [[0.0, 5.0]], 'fc.bias': [1.0]}
    """
    for key in [key for key in tensors if key.endswith(_MASK)]:
        name = key.removesuffix(_MASK)
        mask = unpacked(tensors.pop(key), torch.Size(tensors.pop(name + _SHAPE).tolist()))
        values = tensors[name]
        whole = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        whole[mask.to(values.device)] = values
        tensors[name] = whole


def expand_before_loading(module: nn.Module, tensors: dict[str, Any], *_: Any) -> None:
    """`expand_weights` as a hook of `Module.register_load_state_dict_pre_hook`."""
    expand_weights(tensors)


def _masks(params: Sequence[MaskedParameter]) -> dict[int, Tensor]:
    """The masks of weights that are pruned and whole in this process, by the identity of the weight."""
    return {id(param.weight): param.mask for param in params if param.pruned and type(param) is MaskedParameter}
