"""Write docs/performance.md from the figures in docs/data, between its markers.

    python benchmarks/report.py [--check]

`--check` changes nothing, and fails where the page is not that of the figures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PAGE, DATA = DOCS / "performance.md", DOCS / "data"
BANDWIDTHS = {"HBM3 of an H100": 3.35e12, "a link of 400 Gb/s": 50e9}  # bytes per second, by their makers


def data(name: str) -> dict[str, Any]:
    path = DATA / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(values: Sequence[float]) -> str:
    median, low, high = values
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def step() -> str:
    parts = []
    figures = data("step")
    for model, rows in figures.get("models", {}).items():
        shown = [
            (name, f"{row['ms']:.2f}", spread(row["processor"]), spread(row["wall"]), row["goal"] or "")
            for name, row in rows.items()
        ]
        head = (f"`{model}`", "ms of the wall", "ratio, processor's time", "ratio, wall", "goal")
        rounds = next(iter(rows.values())).get("rounds", "")
        parts.append(
            table(head, shown) + f"\n\n{rounds} rounds, {figures['threads']} thread(s).".replace("\n\n rounds,", "")
        )
    left_out = [f"{name}: {reason}" for name, reason in figures.get("missing", {}).items()]
    return "\n\n".join(parts + [f"Not measured: {'; '.join(left_out)}."] * bool(left_out))


def growth() -> str:
    figures = data("topk")
    rows = [
        (
            f"{row['millions']:g}",
            row["way"],
            f"{row['seconds']:.4f}",
            f"{1e3 * row['seconds'] / row['millions']:.1f}",
            f"{row['memory']:.2f}",
        )
        for row in figures.get("rows", [])
    ]
    head = ("million weights", "a global mask at 90 %", "seconds", "ns per weight", "extra memory / weights")
    return table(head, rows)


def update() -> str:
    parts = []
    for name in ("update", "update85"):
        figures = data(name)
        goal = "0.4 s" if name == "update85" else ""
        rows = [
            (
                way,
                *(f"{row[key]:.2f}" for key in ("first", "later")),
                goal,
                f"{row['passes']:.1f}",
                f"{row['memory']:.2f}",
            )
            for way, row in figures.items()
            if isinstance(row, dict)
        ]
        head = (
            f"{figures['millions']:g} million weights",
            "first, s",
            "later, s",
            "goal",
            "passes",
            "extra memory / weights",
        )
        parts.append(table(head, rows) + f"\n\n{figures['threads']} thread(s).")
    return "\n\n".join(parts)


def sizes() -> str:
    figures = data("costs")
    goals = figures.get("goals", {})
    rows = [
        (
            way,
            f"{row['memory']:.2f}",
            goals["memory"].get(way, ""),
            f"{row['checkpoint']:.2f}",
            goals["checkpoint"].get(way, ""),
        )
        for way, row in figures.get("sizes", {}).items()
    ]
    return table(("", "memory, bytes per weight", "goal", "checkpoint, bytes per weight", "goal"), rows)


def times() -> str:
    return table(("", ""), [(name, f"{value:.2f}") for name, value in data("costs").get("times", {}).items()])


def plan() -> str:
    """7 B weights on 64 GPUs, from the figures that are measured and from what makers say of memory and links."""
    sizes = data("costs").get("sizes", {})
    memory = {way: row["memory"] for way, row in sizes.items() if "compact" not in way}  # compact: of a checkpoint
    each = 7e9 / 64
    histogram = 67_000  # bytes of the histograms of a threshold, whatever the number of weights
    hbm, link = BANDWIDTHS.values()
    rows = [("weights per GPU", f"{each / 1e6:.0f} M")]
    rows += [(f"{way}: bytes per GPU beside weights", f"{each * b / 1e9:.2f} GB") for way, b in memory.items() if b]
    rows += [
        ("a step, hard: bytes moved in memory (gradient in and out, mask)", f"{each * 9 / 1e9:.2f} GB"),
        ("seconds of that at 3.35 TB/s", f"{each * 9 / hbm:.5f}"),
        (
            "an update, magnitude: bytes moved (two passes over weights, a mask, weights out)",
            f"{each * 13 / 1e9:.2f} GB",
        ),
        ("seconds of that at 3.35 TB/s", f"{each * 13 / hbm:.5f}"),
        (
            "an update of single weights under one threshold: bytes between GPUs, as histograms travel",
            f"{64 * histogram / 1e6:.1f} MB",
        ),
        (
            "an update by units of several weights, or LAMP: bytes to each GPU, as weights are gathered three times",
            f"{3 * 7e9 * 4 / 1e9:.0f} GB",
        ),
        ("seconds of that at 400 Gb/s", f"{3 * 7e9 * 4 / link:.2f}"),
    ]
    return table(("7 B weights on 64 GPUs, float32", ""), rows)


WAYS = ("calls", "graph")  # from Python, and within a CUDA graph


def _faster(row: dict[str, Any], kind: str) -> list[str]:
    """How much faster than dense it is in calls, and in a graph."""
    return [f"{row['dense'][way] / row[kind][way]:.2f}x" if way in row.get(kind, {}) else "" for way in WAYS]


def gpu() -> str:
    found = sorted(path for path in DATA.glob("gpu-*.json") if not json.loads(path.read_text())["tiny"])
    if not found:
        return "Not measured: it needs a GPU (`python benchmarks/gpu.py`, at most nine minutes)."
    parts = []
    for path in found:
        figures = json.loads(path.read_text())
        rows = [
            (
                model,
                way,
                f"{ways['dense']['ms']:.1f}",
                f"{row['ms']:.1f}",
                f"{row['ratio']:.3f} ({row['of'][0]:.3f} to {row['of'][1]:.3f})",
            )
            for model, ways in figures.get("step", {}).items()
            for way, row in ways.items()
            if way != "dense"
        ]
        parts.append(f"{figures['card']}, torch {figures['torch']}; all figures: [{path.name}](data/{path.name})")
        parts.append(table(("a step in bf16", "", "dense ms", "ms", "ratio to dense"), rows))
        rows = [
            (name, f"{row['later']:.3f}", f"{row['memory']:.2f}") for name, row in figures.get("update", {}).items()
        ]
        parts.append(table(("an update", "seconds", "extra memory / weights"), rows))
        waits = [
            (way, row["tensors"], sum(row["step"].values()) - 1, sum(row["update"].values()) - 1)
            for way, row in figures.get("syncs", {}).items()
            if "update" in row
        ]  # the profiler waits once itself
        parts.append(table(("the host waits, BERT-base", "tensors", "in a step", "in an update"), waits))
        rows = [
            (name, *(f"{row[power]['seconds']:.4f} ({row[power]['memory']:.2f})" for power in row))
            for name, row in figures.get("pieces", {}).items()
        ]
        powers = next(iter(figures.get("pieces", {}).values()), {})
        parts.append(table(("scores made at once: seconds (extra memory / weights)", *powers), rows))
        blocks = figures.get("blocks", {})
        rows = [
            (
                name,
                *(f"{1e3 * row['dense'][way]:.3f}" for way in WAYS),
                *_faster(row, "cuSPARSELt"),
                *_faster(blocks.get(name, {}), "blocks"),
            )
            for name, row in figures.get("inference", {}).items()
        ]
        head = [f"{kind}, {way}" for kind in ("dense ms", "2:4 faster", "blocks faster") for way in ("calls", "graph")]
        parts.append(table(("half precision (out x in)", *head), rows))
        rows = [
            (name, *(f"{1e3 * row['dense'][way]:.2f}" for way in WAYS), *_faster(row, "half"), *_faster(row, "2:4"))
            for name, row in figures.get("networks", {}).items()
        ]
        head = [f"{kind}, {way}" for kind in ("dense ms", "half faster", "2:4 faster") for way in ("calls", "graph")]
        parts.append(table(("a forward pass, half precision", *head), rows))
        shard, fast = figures.get("fsdp", {}), figures.get("compiled", {})
        rows = [(f"FSDP2, one process, {way}", f"{shard[way]:.1f}") for way in ("dense", "hard") if way in shard]
        rows += [(f"torch.compile, {way}", f"{row['ms']:.1f}") for way, row in fast.items()]
        parts.append(table(("a step of BERT-base otherwise", "ms"), rows))
        parts += [f"Not measured: {name}, {why}" for name, why in figures["failed"].items()]
    return "\n\n".join(parts)


PARTS: dict[str, Callable[[], str]] = {part.__name__: part for part in (step, growth, update, sizes, times, plan, gpu)}


def written(page: str) -> str:
    """The page with every part between its markers."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        assert pattern.search(page), f"{PAGE.name} has no markers of {name}"
        text = part()
        page = pattern.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    new = written(page)
    if arguments.check:
        sys.exit(f"{PAGE.name} is not that of docs/data: python benchmarks/report.py" if new != page else 0)
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
