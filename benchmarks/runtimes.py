"""One network in every runtime that is installed, with all channels and with half of them: sizes, times, verdicts.

    python benchmarks/runtimes.py [--width 32] [--seconds 3]

resnet20 for 28 x 28 pixels at random weights: times and sizes do not depend on them. Half of the channels of each layer
are masked by magnitude and taken out. Both networks run in turns, batch 1, one thread, in the time
of the processor. The table is Markdown.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch

from pl_sparse import Pruner
from pl_sparse.export import ONNX, CoreML, Export, ONNXInt8, OpenVINO, OpenVINOInt8, TorchExport, shrink
from pl_sparse.export.measure import device_name, latencies, percentile, ratio
from pl_sparse.quantize import post_training
from pl_sparse.schedule import OneShot
from pl_sparse.tasks.models import resnet20

FORMATS: dict[str, Export] = {
    "torch": TorchExport(), "onnx": ONNX(), "onnx_int8": ONNXInt8(), "openvino": OpenVINO(),
    "openvino_int8": OpenVINOInt8(), "coreml": CoreML(),
}  # fmt: skip


def halved(net: torch.nn.Module, example: torch.Tensor) -> torch.nn.Module:
    """A copy without half of its channels."""
    net = copy.deepcopy(net)
    pruner = Pruner("magnitude", OneShot(final=0.5), structure="coupled", allocation="uniform")
    pruner.attach(net, example=example)
    pruner.prepare(1)
    pruner.before_step(0)
    shrink(net, example)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    example = torch.randn(2, 1, 28, 28)
    dense = resnet20(shape=(1, 28, 28), classes=10, width=options.width).eval()
    nets = {"dense": dense, "smaller": halved(dense, example)}
    counts = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    print(f"resnet20, width {options.width}: {counts[0]:,} -> {counts[1]:,} parameters; {device_name()}\n")
    print("| runtime | kB | ms | faster | verdict |")
    print("|---|---|---|---|---|")
    for name, format in FORMATS.items():
        if (reason := format.refusal(dense, example, Pruner(sparsity=0.5).structure, 0.5)) is not None:
            print(f"| {format.runtime} (`{name}`) | | | | not installed: {reason} |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs, sizes = {}, []
            for key, net in nets.items():
                written = post_training(net, [example.repeat(16, 1, 1, 1)]) if format.dtype == "int8" else net
                path = Path(folder) / key / format.file
                path.parent.mkdir()
                format.write(written, example, path)
                sizes.append(f"{format.size(path) / 1e3:,.0f}")
                if format.unmeasurable() is None:
                    runs[key] = net if name == "torch" else format.open(path, written)
            line = f"| {format.runtime} (`{name}`) | {' -> '.join(sizes)} |"
            if not runs:
                print(f"{line} | | converted, not measured: {format.unmeasurable()} |", flush=True)
                continue
            times = latencies(runs, example[:1], options.seconds, clock=time.process_time)
            faster, claimed = ratio(times["dense"], times["smaller"])
            medians = " -> ".join(f"{percentile(times[key], 0.5):.2f}" for key in nets)
            verdict = f"{faster:.2f}x faster" if claimed and faster > 1 else "no speed-up on this device"
            print(f"{line} {medians} | {faster:.2f}x | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
