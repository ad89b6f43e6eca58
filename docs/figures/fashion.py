"""Accuracy of presets on Fashion-MNIST, from the second table of docs/methods.md: python docs/figures/fashion.py"""

import re

import matplotlib.pyplot as plt
from methods import Row, dots, ordered, source_of
from themes import HERE, Theme, draw

CELLS = re.compile(r"\| `(\w+)` \| (\d+) % \| ([\d.]+) ± ([\d.]+) (?=\|)")
LEAST = 80  # what is below is named in the corner


def table() -> list[Row]:
    """All rows, the dense network's among them; two stand in a line of the page."""
    return ordered(CELLS.findall((HERE.parent / "methods.md").read_text(encoding="utf-8")))


def rows() -> list[Row]:
    return [row for row in table() if row[0] != "dense"]


def source() -> str:
    return source_of(rows())


def picture(theme: Theme) -> plt.Figure:
    (dense,) = (row[2] for row in table() if row[0] == "dense")
    label = "test accuracy %, Fashion-MNIST, mean ± deviation of two seeds"
    return dots(theme, rows(), dense, LEAST, label, ("50 to 60 %", 4.6))


if __name__ == "__main__":
    draw("fashion", picture, source())
