"""One optimizer step: python docs/figures/one_step.py"""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from themes import Theme, draw

PARTS = (
    ("scorer", "observes the gradients"), ("schedule", "is a level due?"), ("allocation", "how many in each layer?"),
    ("structure", "which go together?"), ("updater", "new masks from the old"), ("masking", "latent values, gradients"),
)  # fmt: skip


def picture(theme: Theme) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9.6, 4.3))
    axes.set(xlim=(0, 96), ylim=(0, 43))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, edge: str) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2", fc=theme.box, ec=edge, lw=1.6
            )
        )

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, lw=1.8, color=colour))

    for x, first, second in ((1, "sparse", "weights"), (42, "dense", "gradients"), (83, "sparse", "weights")):
        box(x, 33, 12, 8, theme.main)
        axes.text(x + 6, 38.4, first, ha="center", va="center", weight="bold")
        axes.text(x + 6, 35.4, second, ha="center", va="center")
    for x, above, below in (
        (13.6, "forward, backward", "your module, unchanged"),
        (54.6, "optimizer.step()", "your optimizer"),
    ):
        arrow((x, 37), (x + 28, 37), theme.text)
        axes.text(x + 13.7, 38.4, above, ha="center", va="bottom", family="DejaVu Sans Mono", size=10)
        axes.text(x + 13.7, 35.6, below, ha="center", va="top", size=9.5)
    box(22, 1, 41, 24, theme.lines[1])
    axes.text(42.5, 22.4, "before the step", ha="center", va="center", weight="bold", color=theme.lines[1])
    for row, (word, text) in enumerate(PARTS):
        y = 19.2 - 3.15 * row
        axes.text(24, y, word, va="center", family="DejaVu Sans Mono", size=10, weight="bold")
        axes.text(36.5, y, text, va="center", size=10)
    box(67, 10, 28, 15, theme.lines[2])
    axes.text(81, 22.4, "after the step", ha="center", va="center", weight="bold", color=theme.lines[2])
    axes.text(69, 18.6, "masking", va="center", family="DejaVu Sans Mono", size=10, weight="bold")
    axes.text(69, 15.4, "stores latent values,", va="center", size=10)
    axes.text(69, 12.6, "writes mask · values", va="center", size=10)
    arrow((48, 32.8), (48, 25.3), theme.lines[1])
    arrow((89, 25.3), (89, 32.8), theme.lines[2])
    return figure


if __name__ == "__main__":
    draw("one_step", picture)
