"""Pruning while training against pruning after it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.reproduce.runs import Experiment, Run, accuracy, section, spread, table

_FASHION = "experiment=fashion_lenet300"
DENSE = Run("fashion_dense", f"{_FASHION} method=dense", seeds=2)
_BATCH = 128
_CALIBRATED = ("wanda", "sparsegpt")
_TUNED = " schedule.begin=0.8"
METHODS = {  # what is pruned when, and on how many batches: all of them with the same sparsity in every layer
    ("gmp", 0): "method=gmp",
    ("magnitude, after training", 0): "method=magnitude_oneshot",
    **{(f"{m}, after training", count): f"method={m}" for m in _CALIBRATED for count in (1, 8, 32)},
    ("magnitude, 3 epochs of fine-tuning", 0): f"method=magnitude_oneshot{_TUNED}",
    **{(f"{m}, 3 epochs of fine-tuning", 1): f"method={m}{_TUNED}" for m in _CALIBRATED},
}
RUNS = {
    (label, count, s): Run(
        f"fashion_{_slug}_{s}",
        f"{_FASHION} {arguments} allocation=uniform sparsity={s}" + f" calibration_batches={count}" * bool(count),
        seeds=2,
    )
    for s in (0.8, 0.9, 0.95)
    for (label, count), arguments in METHODS.items()
    for _slug in [f"{arguments.removeprefix('method=').replace(_TUNED, '_tuned')}_uniform_{count}"]
}


def aware(seeds: Sequence[int]) -> str:
    base = DENSE.values(seeds, accuracy)
    rows = [["dense", "", f"0 %: {spread(base, 2)}", *[""] * 2]]
    for label, count in METHODS:
        row = [label, f"{count * _BATCH:,}" if count else ""]
        for s in (0.8, 0.9, 0.95):
            values = RUNS[label, count, s].values(seeds, accuracy)
            loss = f" ({100 * (statistics.mean(values) - statistics.mean(base)):+.2f})" if base and values else ""
            row.append(spread(values, 2) + loss)
        rows.append(row)
    return section(
        "Pruning-aware against post-training",
        """
        A common claim: pruning during training loses less than one point, pruning after it two to five. LeNet-300-100
        on Fashion-MNIST, 15 epochs in total, two seeds. The difference to the dense network, in points, is in
        parentheses. All methods remove the same share of every layer (`allocation=uniform`), Wanda of every output.
        "Samples" is the number of images from which Wanda and SparseGPT take activations. The rows after training prune
        the same two dense networks after their last epoch. The rows of fine-tuned Wanda and SparseGPT are of an earlier
        run. With one threshold for all layers (`allocation=global`) magnitude has 79.76 ± 2.91, 65.94 ± 4.62 and
        39.33 ± 0.70 after training. This gains more than the samples do.
        """,
        table(["method", "samples", "80 %", "90 %", "95 %"], rows),
        f"`python train.py {_FASHION} method=sparsegpt allocation=uniform sparsity=0.9 calibration_batches=8`, "
        "tuned by `schedule.begin=0.8`",
    )


EXPERIMENTS = {"aware": Experiment([DENSE, *RUNS.values()], aware)}
