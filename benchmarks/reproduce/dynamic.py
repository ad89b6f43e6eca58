"""Dynamic sparse training: densities, neurons that stay alive, network surgery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.reproduce.at_init import DENSE, DENSE5
from benchmarks.reproduce.runs import Experiment, Run, accuracy, errors, section, spread, table

METHODS = ("rigl", "sparse_momentum", "set", "static")
DST = {
    (method, density): Run(
        f"{method}_{density}", f"experiment=mnist_lenet300 method={method} sparsity={round(1 - density, 2)}", seeds=2
    )
    for density in (0.01, 0.02, 0.05, 0.1)
    for method in METHODS
}
LONG = Run(
    "sparse_momentum_0.01_100",
    "experiment=mnist_lenet300 method=sparse_momentum sparsity=0.99 trainer.max_epochs=100",
    seeds=2,
)
PUBLISHED = {
    0.01: {"sparse_momentum": "97.53", "set": "95.80"},
    0.02: {"sparse_momentum": "98.20", "set": "97.74"},
    0.05: {"sparse_momentum": "98.53", "set": "98.14"},
    0.1: {"sparse_momentum": "98.67", "set": "98.39"},
}


def dst(seeds: Sequence[int]) -> str:
    rows = []
    for density, published in PUBLISHED.items():
        for method in METHODS:
            run = DST[method, density]
            ours = [run.spread(seeds, accuracy), spread(run.last(seeds, "lenet300", "MNIST"), 2)]
            rows.append([f"{density:.0%}", method, published.get(method, ""), *ours, str(len(run.done(seeds)))])
    ours = [LONG.spread(seeds, accuracy), spread(LONG.last(seeds, "lenet300", "MNIST"), 2)]
    rows.insert(2, ["1%", "sparse_momentum, 100 epochs", "97.53", *ours, str(len(LONG.done(seeds)))])
    return section(
        "Dynamic sparse training by density",
        """
        Claim (the data of Dettmers and Zettlemoyer 2019, 100 epochs): sparse momentum is more accurate than SET at
        every density; at 1 % it has 97.5 against 95.8 %. Ours: LeNet-300-100 on MNIST, 20 epochs, all three layers
        sparse. At 1 % the order is that of the claim; from 2 % on SET is as good here. The gap to the published figure
        at 1 % comes from the shorter training: an independent implementation of sparse momentum reaches 96.88 in 20
        epochs and 97.31 in 100.
        """,
        table(["density", "method", "published accuracy %", "ours, best", "last epoch", "seeds"], rows),
        "`python train.py experiment=mnist_lenet300 method=rigl sparsity=0.99`",
    )


# RigL's network

RIGL = Run("mnist_rigl_200", "experiment=mnist_rigl_lenet300", seeds=2)


def alive(weights: Sequence[Tensor]) -> list[int]:
    """Inputs and hidden units that a path from an input to an output passes through."""
    forward = [torch.ones(weights[0].shape[1], dtype=torch.bool)]
    for weight in weights:
        forward.append((weight != 0).float() @ forward[-1].float() > 0)
    backward = torch.ones(weights[-1].shape[0], dtype=torch.bool)
    counts = []
    for weight, reached in zip(reversed(weights), reversed(forward[:-1]), strict=True):
        backward = ((weight != 0).float().t() @ backward.float() > 0) & reached
        counts.append(int(backward.sum()))
    return counts[::-1]


def rigl(seeds: Sequence[int]) -> str:
    ready = RIGL.done(seeds)
    found = [alive([RIGL.saved(seed)[f"fc{i}.weight"] for i in (1, 2, 3)]) for seed in ready]
    rows = [
        ["published, 200 epochs", "1.44", "1.48", "408-100-69"],
        ["independent implementation, 200 epochs", "1.62", "1.73", "400-121-72"],
        [
            "ours, 200 epochs",
            *errors(RIGL, seeds, "lenet300", scale="unit")[:2],
            ", ".join("-".join(map(str, counts)) for counts in found) or "not run",
        ],
    ]
    return section(
        "The neurons that RigL keeps",
        """
        Claim (Evci et al. 2020, table 2): with 99 and 89 % sparsity in the first two layers of LeNet-300-100 and a
        dense last layer, RigL reaches an error of 1.44 % and connects about half of the pixels and few hidden units.
        The experiment follows the protocol of the paper's code: Glorot's initialization, biases of 0, pixels in [0, 1],
        all 60,000 images, a rate of 0.2 for 75 of 200 epochs, a third of it for 20 and a ninth for the rest, weight
        decay 1e-4, a first drop fraction of 0.3, and the best epoch by test error. The result depends on all of these
        together. An earlier experiment here had 40 epochs, standardized pixels, torch's initialization, a cosine, a
        drop fraction of 0.5, weight decay 5e-4, and the best epoch by validation. It gave 2.17 ± 0.11 (last epoch
        2.19 ± 0.14) and kept 395-41-58 and 401-42-63; independent code gave 2.19 in that protocol. One change alone did
        not improve it: 200 epochs (2.4 %), a drop fraction of 0.3 (2.2 %), updates every 1,000 steps (2.4 %), a rate of
        0.1 (2.8 %), pixels in [0, 1] (2.9 %). "Alive" counts the pixels and hidden units on a path from an input to an
        output.
        """,
        table(["", "error %, best", "last epoch", "alive"], rows),
        "`python train.py experiment=mnist_rigl_lenet300`",
    )


# Dynamic network surgery

DNS = Run("mnist_dns", "experiment=mnist_dns_lenet300", seeds=3)
DNS5 = Run("mnist_dns_lenet5", "experiment=mnist_dns_lenet5", seeds=2)


def dns(seeds: Sequence[int]) -> str:
    rows = [
        ["lenet300", "dense", "2.28", *errors(DENSE, seeds, "lenet300")],
        ["lenet300", "98.2 %", "1.99", *errors(DNS, seeds, "lenet300")],
        ["lenet5", "dense", "0.91", *errors(DENSE5, seeds, "lenet5")],
        ["lenet5", "99.1 %", "0.91", *errors(DNS5, seeds, "lenet5")],
    ]
    return section(
        "Dynamic network surgery",
        """
        Claim (Guo et al. 2016, table 1): surgery removes 98.2 % of LeNet-300-100 and 99.1 % of LeNet-5 without loss.
        Each layer keeps its share of the paper; the thresholds here follow from these counts. Training is short: 30 and
        10 epochs, 16,500 and 5,500 steps of 100 images. Surgery lasts for most of it, and the rate falls as a cosine.
        With a rate that falls in steps while weights are still removed, the error of LeNet-300-100 was 4.9 %. With
        surgery that ends at 70 % of training instead of 80 %, the error of LeNet-5 was 3.3 %.
        """,
        table(["network", "sparsity", "published error %", "ours, best", "last epoch", "seeds"], rows),
        "`python train.py experiment=mnist_dns_lenet300`, `python train.py experiment=mnist_dns_lenet5`",
    )


EXPERIMENTS = {
    "dst": Experiment([*DST.values(), LONG], dst),
    "rigl": Experiment([RIGL], rigl),
    "dns": Experiment([DENSE, DNS, DENSE5, DNS5], dns),
}
