"""Attention layers some heads of which are gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import use_fused_attention
from pl_sparse.network.attention import Attention

__all__ = ["FewerHeads", "head_indices"]


def head_indices(attention: Attention, heads: Sequence[int]) -> Iterator[tuple[nn.Module, int, set[int]]]:
    """Where some heads are in the weights of an attention layer.

    Returns:
        For each weight its layer, the dimension that heads are in, and the indices of these heads there.
    """
    for layer, name, layout in attention.weights:
        shape = layer.get_parameter(name).shape
        dim = int(layout.columns)
        index = torch.arange(shape[dim]).unsqueeze(1 - dim).expand(shape)  # each weight's place along the dimension
        yield layer, dim, set(layout.view(index)[list(heads)].flatten().tolist())  # view: (heads, weights of a head)


class FewerHeads(nn.MultiheadAttention):
    """Multi-head attention some heads of which were removed, so that they no longer fill the embedding.

    Attention weights, where they are asked for, are those of the heads that are left, or their mean.
    """

    @staticmethod
    def suit(module: nn.MultiheadAttention) -> None:
        """Give a layer this class if its heads do not fill the embedding, else torch's own."""
        fewer = module.num_heads * module.head_dim != module.embed_dim
        if fewer != isinstance(module, FewerHeads):
            module.__class__ = FewerHeads if fewer else nn.MultiheadAttention
            use_fused_attention(module, allowed=not fewer)  # it takes heads to fill the embedding

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; a mask of each head on its own is not taken."""
        if attn_mask is not None and attn_mask.dim() == 3:
            raise ValueError("an attention layer whose heads were removed takes no mask of each head: give one for all")
        batched = query.dim() == 3
        inputs = [x if batched else x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value)]
        if not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]  # (batch, length, embedding)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (  # (batch, heads, length, head_dim)
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        bias = _additive(attn_mask, q)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask if batched else key_padding_mask.unsqueeze(0), q)
            assert padding is not None
            padding = padding[:, None, None, :]  # (batch, 1, 1, keys)
            bias = padding if bias is None else bias + padding
        weights_out = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (batch, heads, queries, keys)
            attention = (scores if bias is None else scores + bias).softmax(-1)
            attention = nn.functional.dropout(attention, self.dropout, self.training)
            out = attention @ v
            weights_out = attention.mean(1) if average_attn_weights else attention
            weights_out = weights_out if batched else weights_out.squeeze(0)
        else:
            dropout = self.dropout if self.training else 0.0
            out = nn.functional.scaled_dot_product_attention(q, k, v, bias, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (batch, length, embedding)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return out if batched else out.squeeze(0 if self.batch_first else 1), weights_out


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to scores: in torch's attention layers True means that a position is left out."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
