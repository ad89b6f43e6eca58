"""How the site's figures look: each is drawn twice, for light and for dark pages, as SVG without a background."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Theme:
    """Colours of a page. Those of lines have a contrast of at least 3 to the page, text of at least 7."""

    name: str
    page: str
    text: str
    soft: str  # lines that only divide
    box: str
    lines: tuple[str, ...]

    @property
    def main(self) -> str:
        return self.lines[0]


THEMES = (
    Theme(
        "light", "#ffffff", "#1b1f24", "#8a929c", "#eef3f9",
        ("#0b62b0", "#b3470b", "#2a7a3b", "#8a2f86", "#7a5c00", "#5b6470"),
    ),
    Theme(
        "dark", "#131416", "#eceff2", "#7d8690", "#22303f",
        ("#6cb6ff", "#ff9d5c", "#73d18a", "#e58be0", "#e0c060", "#aab4c0"),
    ),
)  # fmt: skip


def draw(name: str, picture: Callable[[Theme], plt.Figure], source: str | None = None) -> None:
    """Write NAME_light.svg and NAME_dark.svg beside this file: the same bytes each time.

    Args:
        name: of the figure.
        picture: draws it.
        source: what the figure shows, kept in its description.
    """
    settings = {"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 11, "font.family": "DejaVu Sans"}
    for theme in THEMES:
        colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text)
        with plt.rc_context({**settings, **colours, "axes.edgecolor": theme.soft, "axes.facecolor": "none"}):
            figure = picture(theme)
            path = HERE / f"{name}_{theme.name}.svg"
            figure.savefig(
                path,
                transparent=True,
                metadata={"Date": None, "Creator": None, "Description": source},
                bbox_inches="tight",
            )
            plt.close(figure)
            path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
