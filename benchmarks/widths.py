"""What a convolution costs in ONNX Runtime by its number of channels: odd numbers cost twice as much.

    python benchmarks/widths.py [--seconds 25]

Six 3x3 convolutions of as many channels, 14 x 14 pixels, batch 1, one thread, in turns: the least time of each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from pl_sparse.export.measure import latencies
from pl_sparse.export.onnx import open_onnx, save_onnx

WIDTHS = (30, 31, 32, 33, 34, 36, 40, 44, 48, 56, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS:
            layers = [layer for _ in range(6) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
            net = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *layers).eval()
            path = Path(folder) / f"{width}.onnx"
            save_onnx(net, torch.randn(2, 1, 14, 14), path)
            runs[str(width)] = open_onnx(path, threads=1)
    times = latencies(runs, torch.randn(1, 1, 14, 14), options.seconds, clock=time.process_time)
    print("| channels | ms | ns a weight |\n|---|---|---|")
    for width in WIDTHS:
        least = min(times[str(width)])
        print(f"| {width} | {least:.3f} | {1e6 * least / (6 * 9 * width**2):.1f} |")


if __name__ == "__main__":
    main()
