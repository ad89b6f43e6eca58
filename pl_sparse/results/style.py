"""The look of all figures: colours, frame, resolution."""

from __future__ import annotations

import os

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pl_sparse.core.files import replacing

__all__ = ["BLUE", "GREY", "PALETTE", "VERMILION", "remove_frame", "save"]

# Okabe and Ito's palette, which every colour vision distinguishes, and two more colours. page/data.js has the same.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#8C8C8C")
BLUE, VERMILION, GREY = PALETTE[0], PALETTE[1], PALETTE[7]

_DPI = 150


def remove_frame(axis: Axes) -> None:
    """Leave out the frame above and at the right, and draw a faint grid behind the data."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#D9D9D9", linewidth=0.6)
    axis.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike[str], title: str = "") -> None:
    """Write a figure whole or not at all.

    Args:
        figure: the figure.
        path: the picture; its suffix gives the format.
        title: above the figure; "" for none.
    """
    if title:
        figure.suptitle(title, x=0.02, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
