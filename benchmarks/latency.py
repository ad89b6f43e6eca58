"""How well the latency table predicts networks: measured against predicted milliseconds at random widths.

    python benchmarks/latency.py [--model resnet20] [--widths 10] [--batch 8] [--runtime onnxruntime]

Networks of random widths are made by removing channels, and measured in turns, so that a disturbance hits all of them
alike. The table knows single layers alone; four networks, the dense one and narrower ones, are measured
in the same turns and tell what is between layers from it (`Network.fit`). The target is a median error of 5 %.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pl_sparse.allocation import Units
from pl_sparse.callbacks.cost_target import opened
from pl_sparse.core.files import write_json
from pl_sparse.core.group import Group
from pl_sparse.core.targets import find
from pl_sparse.export import shrink
from pl_sparse.export.measure import latencies
from pl_sparse.network.cost import Network
from pl_sparse.network.latency import LatencyTable
from pl_sparse.network.runtimes import RUNTIMES, Runtime
from pl_sparse.structure import Channel
from pl_sparse.tasks import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=[*models.__all__, "mobilenet"])
    parser.add_argument("--widths", type=int, default=10)
    parser.add_argument("--width", type=int, help="of the model, where it has one")
    parser.add_argument(
        "--multiple", type=int, default=1, help="widths are multiples of it, as hardware.multiple has it"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=28, help="pixels along a side")
    parser.add_argument("--repeats", type=int, default=15, help="of each layer at each width")
    parser.add_argument("--seconds", type=float, default=10.0, help="that networks are measured for")
    parser.add_argument("--runtime", default="torch", choices=RUNTIMES)
    parser.add_argument("--threads", type=int, help="as many as torch uses, if none are given")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chance = random.Random(0)
    named = "dim" if arguments.model == "vit_tiny" else "width"
    options = {named: arguments.width} if arguments.width else {}
    make = mobilenet if arguments.model == "mobilenet" else getattr(models, arguments.model)
    dense = make(shape=(1, arguments.size, arguments.size), classes=10, **options).eval()
    x = torch.randn(arguments.batch, 1, arguments.size, arguments.size)
    structure = Channel(coupled=True)
    nets: list[nn.Module] = [dense]
    network = Network(_groups(structure, dense, x), dense, x, arguments.multiple)
    kept = list(network.samples)
    for _ in range(arguments.widths):
        by = arguments.multiple
        kept.append([min(by * chance.randint(max(n // 8 // by, 1), -(-n // by)), n) for n in network.units])
    for widths in kept[1:]:
        net = copy.deepcopy(dense)
        groups = _groups(structure, net, x)
        units = Units(groups, structure, lambda param: param.weight.detach().abs())
        for g, count in enumerate(widths):
            units.assign(g, structure.select(units[g], count))
            for param, _ in (*groups[g].members, *groups[g].companions):
                with torch.no_grad():
                    param.weight.mul_(param.mask)
        shrink(net, x[:2])
        nets.append(net)
    with tempfile.TemporaryDirectory() as folder:
        table = LatencyTable(Path(folder) / "table.json", arguments.repeats, arguments.runtime)
        table.measure(network.layers)
        layers = [float(network.cost(widths, "ms", table)) for widths in kept]
    runs = {str(i): opened(net, x, arguments.runtime) for i, net in enumerate(nets)}
    times = latencies(runs, x, arguments.seconds, 10**6, clock=Runtime(arguments.runtime).clock)
    measured = [statistics.median(times[name]) for name in runs]
    known = len(network.samples)
    network.fit(table, measured[:known])
    predicted = [float(network.cost(widths, "ms", table)) for widths in kept]
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)][known:]
    title = f"{arguments.model}, {arguments.runtime}, batch {arguments.batch}, {torch.get_num_threads()} threads"
    shown = Table("widths", "measured ms", "layers ms", "predicted ms", "error", title=title)
    for widths, m, alone, p in zip(kept, measured, layers, predicted, strict=True):
        shown.add_row(" ".join(map(str, widths)), f"{m:.3f}", f"{alone:.3f}", f"{p:.3f}", f"{(p - m) / m:+.1%}")
    shown.add_row("median error", "", "", "", f"{statistics.median(errors):.1%}", end_section=True)
    shown.add_row("largest", "", "", "", f"{max(errors):.1%}")
    Console().print(shown)
    if arguments.json:
        write_json(arguments.json, {"measured": measured, "layers": layers, "predicted": predicted, "widths": kept})


def mobilenet(shape: tuple[int, int, int], classes: int, width: int = 32) -> nn.Module:
    """Inverted residuals, as those of MobileNet V2: 1 x 1, depthwise 3 x 3, 1 x 1."""

    def conv(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(outputs)]

    class Block(nn.Sequential):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            wide = 4 * inputs
            middle = [*conv(inputs, wide), nn.ReLU(), *conv(wide, wide, 3, stride, wide), nn.ReLU()]
            super().__init__(*middle, *conv(wide, outputs))
            self.adds = stride == 1 and inputs == outputs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x) if self.adds else super().forward(x)

    widths = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2)]
    blocks = [Block(*one) for one in [*widths, (4 * width, 4 * width, 1)]]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)]
    return nn.Sequential(*conv(shape[0], width, 3), nn.ReLU(), *blocks, *head)


def _groups(structure: Channel, net: nn.Module, x: torch.Tensor) -> list[Group]:
    return [group for group in structure.groups(find(net, last=False), net, x) if group.reason is None]


if __name__ == "__main__":
    main()
