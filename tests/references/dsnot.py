"""One output of Dynamic Sparse no Training, step by step.

Source: Zhang et al., 2023, arXiv:2310.08915, equations 2 and 3 and algorithm 1.
"""

from __future__ import annotations


def exchanged(
    weights: list[float], inputs: list[list[float]], kept: list[bool], cycles: int, threshold: float, power: float
) -> list[bool]:
    """The mask of an output.

    Args:
        weights: of the output.
        inputs: for each weight, the numbers that it is multiplied with.
        kept: the mask before.
    """
    kept, used = list(kept), set()
    means = [sum(x) / len(x) for x in inputs]
    variances = [sum((v - m) ** 2 for v in x) / (len(x) - 1) for x, m in zip(inputs, means, strict=True)]
    norms = [sum(v * v for v in x) ** 0.5 for x in inputs]
    part = [w * m for w, m in zip(weights, means, strict=True)]
    error = sum(p for p, k in zip(part, kept, strict=True) if not k)
    sign = 1 if error > 0 else -1
    for _ in range(cycles):
        if abs(error) <= threshold:
            break
        free = [j for j in range(len(weights)) if j not in used]
        grow = [j for j in free if not kept[j] and sign * part[j] > 0]
        drop = [j for j in free if kept[j] and sign * part[j] < 0]
        if not grow or not drop:
            break
        new = max(grow, key=lambda j: sign * part[j] / variances[j] ** power)
        old = min(drop, key=lambda j: abs(weights[j]) * norms[j])
        after = error - part[new] + part[old]
        if after * sign <= 0:
            break
        kept[new], kept[old], error = True, False, after
        used |= {new, old}
    return kept
