"""N:M patterns during training, channels by regularization, L0 gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.reproduce.runs import Experiment, Run, accuracy, errors, section, spread, table

# N:M

_NM = "experiment=fashion_nm_lenet5"
NM_DENSE = Run("nm_dense", f"{_NM} method=dense", seeds=2)
NM = {
    (method, pattern): Run(f"nm_{method}_{pattern}", f"{_NM} method={method} structure={pattern}", seeds=2)
    for pattern in ("nm24", "nm14")
    for method in ("srste", "ste", "asp")
}


def nm(seeds: Sequence[int]) -> str:
    rows = [["dense", "", NM_DENSE.spread(seeds, accuracy), _last(NM_DENSE, seeds), str(len(NM_DENSE.done(seeds)))]]
    for (method, pattern), run in NM.items():
        label = f"{pattern[2]}:{pattern[3]}"
        rows.append([method, label, run.spread(seeds, accuracy), _last(run, seeds), str(len(run.done(seeds)))])
    return section(
        "N:M during training",
        """
        Claim (Zhou et al. 2021, table 2; ImageNet): SR-STE keeps the dense accuracy at 2:4 and loses about a point at
        1:4; plain STE is less accurate. ASP prunes the dense network in the middle of training and continues. Ours:
        LeNet-5 on Fashion-MNIST, 6 epochs. The first convolution has one input channel and stays dense.
        """,
        table(["method", "pattern", "test accuracy %, best", "last epoch", "seeds"], rows),
        f"`python train.py {_NM} method=srste structure=nm24`",
    )


def _last(run: Run, seeds: Sequence[int]) -> str:
    return spread(run.last(seeds, "lenet5", "FashionMNIST"), 2)


# Channels

_CHANNELS = "experiment=fashion_channels_resnet20"
CHANNELS_DENSE = Run("channels_dense", f"{_CHANNELS} method=dense", seeds=2)
_SLIMMING = "regularizer.regularizer.strength=0.01 regularizer.until=0.4 schedule.begin=0.4"
CHANNELS = {
    method: Run(
        f"channels_{method}", f"{_CHANNELS} method={method} model=resnet20 model.width=8 {more}".strip(), seeds=2
    )
    for method, more in {"slimming": _SLIMMING, "group_lasso": "", "gmp": ""}.items()
}


def channels(seeds: Sequence[int]) -> str:
    rows = [["dense", "0 %", "0 %", CHANNELS_DENSE.spread(seeds, accuracy), "", str(len(CHANNELS_DENSE.done(seeds)))]]
    for method, run in CHANNELS.items():
        sparsity = run.spread(seeds, lambda metrics: float(metrics["sparsity"]), 1)
        cost = run.spread(seeds, lambda metrics: metrics["macs_sparse"] / metrics["macs_dense"], 1)
        removed = spread((removed_channels(run.saved(seed)) for seed in run.done(seeds)), 1)
        row = [method, f"{removed} %", f"{sparsity} %", run.spread(seeds, accuracy), f"{cost} %"]
        rows.append([*row, str(len(run.done(seeds)))])
    return section(
        "Channels by regularization",
        """
        Claim (Liu et al. 2017, table 1; CIFAR-10): slimming removes channels of a ResNet-164 by the scales of its batch
        norms. With 40 % of the channels removed, which is 15 % of the parameters, the fine-tuned network is 0.3 points
        more accurate than the dense one. With 60 %, which is 34.5 % of the parameters, it is 0.94 less accurate. Ours:
        ResNet-20 of width 8 on 10,000 images of Fashion-MNIST, 12 epochs. Half of the weights are removed in whole
        channels, which is more than either. The penalty lasts for 60 % of training; removal and fine-tuning follow.
        Slimming has a penalty of a hundred times the paper's for 40 % of training, because the training is that much
        shorter. With the paper's penalty for 60 % it ends at 78.5. `gmp` removes channels by magnitude without a
        penalty.
        """,
        table(["method", "channels removed", "weights removed", "test accuracy %", "MACs left", "seeds"], rows),
        f"`python train.py {_CHANNELS} method=slimming model=resnet20 model.width=8 {_SLIMMING}`",
    )


def removed_channels(weights: Mapping[str, Tensor]) -> float:
    """The share of the filters of all convolutions that are all zero."""
    zero = torch.cat([(w.flatten(1) == 0).all(1) for w in weights.values() if w.dim() == 4])
    return float(zero.float().mean())


# L0

L0 = Run("mnist_l0_lenet5", "experiment=mnist_l0_lenet5", seeds=1)


def l0(seeds: Sequence[int]) -> str:
    rows = [["published, 200 epochs, lambda 0.1", "20-25-45-462", "0.9", ""]]
    rows += [
        ["published, 200 epochs, lambda by layer", "9-18-65-25", "1.0", ""],
        [
            "ours, 20 epochs, lambda 0.1",
            ", ".join(architecture(L0.saved(seed)) for seed in L0.done(seeds)) or "not run",
            *errors(L0, seeds, "lenet5")[:2],
        ],
    ]
    return section(
        "L0 on LeNet-5",
        """
        Claim (Louizos et al. 2017, table 1): gates on filters and input units leave 20-25-45-462 of LeNet-5's
        20-50-800-500 at an error of 0.9 %. The paper trains for 200 epochs with 100 images per step. Ours trains for 20
        (11,000 steps), in which no gate of a filter closes. "Architecture" counts the filters, and the inputs of the
        two linear layers, that are not all zero.
        """,
        table(["", "architecture", "error %, best", "last epoch"], rows),
        "`python train.py experiment=mnist_l0_lenet5`",
    )


def architecture(weights: Mapping[str, Tensor]) -> str:
    """Filters of the convolutions, and inputs of the linear layers, that have a weight."""
    filters = [int((weights[f"conv{i}.weight"].flatten(1) != 0).any(1).sum()) for i in (1, 2)]
    inputs = [int((weights[f"fc{i}.weight"] != 0).any(0).sum()) for i in (1, 2)]
    return "-".join(map(str, filters + inputs))


EXPERIMENTS = {
    "nm": Experiment([NM_DENSE, *NM.values()], nm),
    "channels": Experiment([CHANNELS_DENSE, *CHANNELS.values()], channels),
    "l0": Experiment([L0], l0),
}
