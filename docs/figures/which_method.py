"""The tree "which method": python docs/figures/which_method.py"""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from themes import Theme, draw

from pl_sparse.app.reference import options

GMP = "method=gmp       up to 90 %\nmethod=gmp_star  above\nmethod=obert     transformers, 95 %"
TREE = (  # what executes it, what is there, settings, and the presets among them
    (
        "A dense runtime: CPU, phone,\nmicrocontroller", "Channels must leave it",
        "pl-sparse slim RUN --speedup 2\nstructure=coupled shrink_every=1", (),
    ),
    (
        "An NVIDIA GPU\n(Ampere or newer)", "2:4",
        "method=asp    of a trained network\nmethod=srste  from scratch", ("asp", "srste"),
    ),
    ("A sparse kernel or\na smaller file", "trained network, fine-tuned", GMP, ("gmp", "gmp_star", "obert")),
    ("", "from scratch", "method=gmp   the best accuracy\nmethod=rigl  sparse all along", ("gmp", "rigl")),
    (
        "", "no training at all (language models)",
        "method=wanda      to 50 %\nmethod=sparsegpt  to 60 %", ("wanda", "sparsegpt"),
    ),
    ("", "sparse before training (research)", "method=snip     to 90 %\nmethod=synflow  above", ("snip", "synflow")),
    (
        "The sparsity is unknown", "",
        "target=accuracy_drop  what accuracy allows\ntarget=latency        what speed asks for", (),
    ),
)  # fmt: skip


def picture(theme: Theme) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(10.9, 6.8))
    axes.set(xlim=(-0.5, 110.5), ylim=(-2, 66))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, edge: str, mono: bool = False, height: float = 7.6) -> None:
        patch = FancyBboxPatch(
            (x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=1", fc=theme.box, ec=edge, lw=1.5
        )
        axes.add_patch(patch)
        axes.text(
            x + 1.2, y, text, va="center", size=9 if mono else 9.5, family="DejaVu Sans Mono" if mono else "DejaVu Sans"
        )

    axes.text(1, 64, "What will execute it?", weight="bold", va="center")
    axes.text(36, 64, "What is there?", weight="bold", va="center")
    axes.text(64, 64, "Start with", weight="bold", va="center")
    for row, (first, second, settings, methods) in enumerate(TREE):
        assert all(method in options("method") for method in methods)
        y = 56.5 - 8.9 * row
        if first:
            box(0, y, 29, first, theme.main)
        anchor = 56.5 - 8.9 * max(k for k in range(row + 1) if TREE[k][0])
        start = (29, anchor)
        if second:
            axes.plot([start[0], 32, 32, 35], [anchor, anchor, y, y], color=theme.soft, lw=1.4)
            axes.text(36, y, second.replace(" (", "\n("), va="center", size=9.5)
            axes.plot([35 + 26.0, 63], [y, y], color=theme.soft, lw=1.4)
        else:
            axes.plot([29, 63], [y, y], color=theme.soft, lw=1.4)
        box(63, y, 47, settings, theme.lines[2], mono=True)
    return figure


if __name__ == "__main__":
    draw("which_method", picture)
