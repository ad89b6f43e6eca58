"""Accuracy of all methods on digits, from the table of docs/methods.md: python docs/figures/methods.py"""

import re

import matplotlib.pyplot as plt
from themes import HERE, Theme, draw

ROW = re.compile(r"^\| `(\w+)` \|.*\| (\d+) % \| ([\d.]+) ± ([\d.]+) \|$", re.MULTILINE)
DENSE = 96.9
LEAST = 93.5  # what is below is named in the corner
Row = tuple[str, int, float, float]
"""Name, sparsity, accuracy and deviation of a method."""


def ordered(found: list[tuple[str, ...]]) -> list[Row]:
    """The rows of a table as numbers, the best first."""
    return sorted(((n, int(s), float(a), float(d)) for n, s, a, d in found), key=lambda row: (-row[2], row[0]))


def rows() -> list[Row]:
    table, _, _ = (HERE.parent / "methods.md").read_text(encoding="utf-8").partition("\n## ")
    return ordered(ROW.findall(table))


def source_of(found: list[Row]) -> str:
    """What a figure shows, in a line that is kept in the file: a test sees when the table is another one."""
    return " ".join(f"{name}:{sparsity}:{accuracy}:{deviation}" for name, sparsity, accuracy, deviation in found)


def source() -> str:
    return source_of(rows())


def dots(theme: Theme, found: list[Row], dense: float, least: float, label: str, size: tuple[str, float]) -> plt.Figure:
    """A dot with a bar for each method, the best first.

    Args:
        theme: of the page.
        found: the rows.
        dense: the accuracy of the dense network.
        least: methods below are named in the corner.
        label: of the accuracies.
        size: what methods of lower sparsity are called, and the height in inches.
    """
    shown = [row for row in found if row[2] >= least]
    below = [row for row in found if row[2] < least]
    figure, axes = plt.subplots(figsize=(9.2, size[1]), layout="constrained")
    axes.axvline(dense, color=theme.soft, lw=1.4, ls="--")
    axes.text(dense, -1.1, "dense", ha="center", va="bottom", size=10)
    for chosen, colour, marker, kind in (
        (lambda s: s >= 85, theme.lines[0], "o", "about 90 % sparsity"),
        (lambda s: s < 85, theme.lines[1], "s", size[0]),
    ):
        places = [k for k, row in enumerate(shown) if chosen(row[1])]
        values, bars = [shown[k][2] for k in places], [shown[k][3] for k in places]
        axes.errorbar(values, places, xerr=bars, fmt=marker, color=colour, ms=6, lw=1.6, capsize=3, label=kind)
    axes.set_yticks(range(len(shown)), [row[0] for row in shown], family="DejaVu Sans Mono", size=9.5)
    axes.set(ylim=(len(shown) - 0.4, -1.4), xlabel=label)
    axes.grid(axis="x", color=theme.soft, alpha=0.3)
    axes.legend(loc="upper left", frameon=True, facecolor=theme.page, edgecolor=theme.soft, labelcolor=theme.text)
    text = "pruned after training,\nand not trained further:\n" + "\n".join(
        f"{name}  {accuracy:.1f} ± {deviation:.1f} at {sparsity} %" for name, sparsity, accuracy, deviation in below
    )
    axes.text(
        0.985,
        0.02,
        text,
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        size=9.5,
        bbox={"fc": theme.page, "ec": "none"},
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def picture(theme: Theme) -> plt.Figure:
    label = "test accuracy %, digits, mean ± deviation of three seeds"
    return dots(theme, rows(), DENSE, LEAST, label, ("about 50 %: 2:4, channels", 9.6))


if __name__ == "__main__":
    draw("methods", picture, source())
