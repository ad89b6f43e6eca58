"""What an optimizer remembers, without what it remembers of pruned weights."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_sparse.core.optimizers import SCALES, leaves_zeros
from pl_sparse.core.parameter import MaskedParameter, packed, unpacked

__all__ = ["compacted", "expand"]

_KEPT = "kept_of_masked"


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
    masks = {id(param.weight): param.mask for param in params if param.pruned and type(param) is MaskedParameter}
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
