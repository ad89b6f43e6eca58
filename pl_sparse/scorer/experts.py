"""Scores of experts by their contribution to the outputs of their layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axes, register
from pl_sparse.network.experts import Experts, expert_layers
from pl_sparse.network.hooks import evaluated, hooked
from pl_sparse.network.probe import Probe
from pl_sparse.scorer.base import Scorer, observed
from pl_sparse.structure import Expert

__all__ = ["REAP"]


@register
@dataclass(frozen=True)
class REAP(Scorer):
    """S_j = 1 / |X_j| sum over x in X_j of g_j(x) |f_j(x)|_2, for structure=expert.

    X_j are the calibration tokens that the router sends to expert j, g_j(x) is the weight of that expert for the token
    as the layer uses it (renormalized, if the layer renormalizes), f_j(x) the expert's output. An expert that receives
    no token scores 0. All weights of an expert have its score.

    Both kinds of experts are read off their own code: of a list each expert's output is replaced by |f_j(x)| e_j, so
    that the layer itself multiplies it with g_j(x) and row x of its output has the products; experts in one module,
    called with (hidden states, indices, weights), are called once more for each of them.

    Source: Lasby et al., REAP the experts: why pruning prevails for one-shot MoE compression, 2025, arXiv:2510.13999.
    """

    calibrates: ClassVar[bool] = True

    def refusal(self, axes: Axes) -> str | None:
        if not isinstance(axes.structure, Expert):
            return "scorer=reap scores whole experts: use structure=expert, or another scorer"
        return super().refusal(axes)

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        by_weight = {id(param.weight): param for param in params}
        for layer, saliency in _saliencies(probe).values():
            for _, _, _, parameter, unit in layer.tensors(probe.model):
                param = by_weight.get(id(parameter))
                if param is not None:
                    score = saliency.to(param.values)
                    seen = score[unit] if unit is not None else score.view(-1, *(1,) * (parameter.dim() - 1))
                    param.state["calibrated"] = seen.expand(param.shape)

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "calibrated")


@torch.no_grad()
def _saliencies(probe: Probe) -> dict[str, tuple[Experts, Tensor]]:
    """The saliency of the experts, (experts,), by the name of what holds them, with the layer."""
    model = probe.model
    layers = {layer.name: layer for layer in expert_layers(model) if layer.reason is None}
    watched = {model.get_submodule(layer.path if layer.parts else name): layer for name, layer in layers.items()}
    device = next(model.parameters()).device
    totals = {name: torch.zeros(2, layer.count, device=device) for name, layer in layers.items()}
    busy: list[nn.Module] = []

    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if busy or module not in watched:
            return
        layer = watched[module]
        busy.append(module)
        try:
            terms = _listed(module, layer, args, kwargs) if layer.parts else _stacked(module, layer, args, kwargs)
        finally:
            busy.pop()
        totals[layer.name] += torch.stack([terms.sum(0), (terms > 0).sum(0)])  # terms: (tokens, experts)

    with hooked(watched, post=look), evaluated(model):
        for batch in probe.batches:
            probe.loss(batch)
    sums = probe.reduced(list(totals.values()))
    return {
        name: (layers[name], terms / count.clamp_min(1e-12)) for name, (terms, count) in zip(totals, sums, strict=True)
    }


def _listed(module: nn.Module, layer: Experts, args: Any, kwargs: Any) -> Tensor:
    """g_j(x) |f_j(x)| of each token and expert of a list, (tokens, experts), as the layer itself multiplies them."""
    numbers = {part: i for i, part in enumerate(layer.parts)}
    width = 0
    found = []
    while width < layer.count:  # as many experts at a time as the output is wide
        first = width

        def norm(part: nn.Module, args: Any, kwargs: Any, out: Tensor, first: int = first) -> Tensor:
            new = torch.zeros_like(out)
            if 0 <= numbers[part] - first < out.shape[-1]:
                new[..., numbers[part] - first] = out.norm(dim=-1)
            return new

        with hooked(layer.parts, post=norm):
            seen = _first(module(*args, **kwargs))
        with hooked(layer.parts, post=lambda part, args, kwargs, out: torch.zeros_like(out)):
            others = _first(module(*args, **kwargs))  # shared experts, residual connections
        found.append((seen - others).flatten(0, -2).float())
        width += seen.shape[-1]
    return torch.cat(found, -1)[:, : layer.count].clamp_min(0)


def _first(out: Any) -> Tensor:
    tensor: Tensor = out if isinstance(out, Tensor) else out[0]
    return tensor


def _stacked(module: nn.Module, layer: Experts, args: Any, kwargs: Any) -> Tensor:
    """The same of experts in one module, which is called with a token's single expert and its weight at a time."""
    given: list[Any] = [*args, *kwargs.values()]
    hidden, chosen, weights = [*given, None, None, None][:3]
    if not (
        (isinstance(hidden, Tensor) and isinstance(chosen, Tensor) and isinstance(weights, Tensor))
        and not chosen.is_floating_point()
        and chosen.shape == weights.shape
        and len(chosen) == len(hidden)
    ):
        raise ValueError(
            f"scorer=reap cannot see what the experts of {layer.name} add: {type(module).__name__} is not called with "
            "(hidden states, indices, weights) of tokens. Use scorer=magnitude"
        )
    terms = torch.zeros(len(hidden), layer.count, device=hidden.device)
    for expert in range(layer.count):
        token, place = torch.where(chosen == expert)
        if len(token):
            new = [hidden[token], chosen[token, place].unsqueeze(1), weights[token, place].unsqueeze(1), *given[3:]]
            named = dict(zip(kwargs, new[len(args) :], strict=True))
            terms[token, expert] = _first(module(*new[: len(args)], **named)).norm(dim=-1).float()
    return terms
