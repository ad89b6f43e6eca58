"""Scores and shares of post-training methods, by loops.

Sources: Zhang et al., Plug-and-play, ICLR 2024 (RIA). Yin et al., 2023, arXiv:2310.05175 (OWL).
"""

from __future__ import annotations

from torch import Tensor


def ria(weight: Tensor, x: Tensor, power: float) -> list[list[float]]:
    """The relative importance of a weight (out, in), inputs (positions, in)."""
    w = weight.abs().tolist()
    norms = [sum(v * v for v in column) ** 0.5 for column in x.t().tolist()]
    rows = [sum(row) for row in w]
    columns = [sum(column) for column in zip(*w, strict=True)]
    return [
        [(w[i][j] / rows[i] + w[i][j] / columns[j]) * norms[j] ** power for j in range(len(columns))]
        for i in range(len(rows))
    ]


def owl(scores: list[list[float]], sparsity: float, outlier: float, spread: float) -> list[float]:
    """The density of each tensor, before it is rounded to whole weights."""
    shares = []
    for tensor in scores:
        mean = sum(tensor) / len(tensor)
        shares.append(sum(s > outlier * mean for s in tensor) / len(tensor))
    scaled = [(d - min(shares)) / (max(shares) - min(shares)) * 2 * spread for d in shares]
    mean = sum(d * len(t) for d, t in zip(scaled, scores, strict=True)) / sum(len(t) for t in scores)
    return [d - mean + 1 - sparsity for d in scaled]
