"""Who executes which zeros, as docs/targets.md has it: python docs/figures/targets.py"""

import matplotlib.pyplot as plt
from themes import Theme, draw

COLUMNS = ("single weights", "2:4, n:m", "blocks", "channels, heads\ntaken out")
NO, MAYBE, YES = "no", "documented", "measured"
GONE = (MAYBE, "smaller")  # a smaller dense model, in every runtime
ROWS = {  # how a row of the page's first table begins: its name here, and a state with a text for each column
    "ONNX Runtime": ("ONNX Runtime, CPU", (NO, "1.00x"), (NO, ""), (NO, ""), (YES, "3.09x")),
    "torch, CSR": ("torch, CSR, CPU", (YES, "3.9x at 95 %"), None, None, (YES, "2.14x")),
    "OpenVINO 2026.4.1, float": ("OpenVINO, float", (NO, "0.99x"), (NO, ""), (NO, ""), (YES, "3.00x")),
    "OpenVINO 2026.4.1, 8 bits": ("OpenVINO, 8 bits", (NO, "0.97x"), (NO, ""), (NO, ""), (YES, "1.99x")),
    "OpenVINO, 8 bits, with AMX": ("OpenVINO, 8 bits, AMX", (MAYBE, "reads fewer bytes"), None, None, GONE),
    "Core ML, Neural Engine": ("Core ML, Neural Engine", (MAYBE, "from 75 %"), None, (MAYBE, ""), GONE),
    "Core ML, CPU": ("Core ML, newer CPUs", None, (MAYBE, "m a factor of 16"), None, GONE),
    "ExecuTorch": ("ExecuTorch, x86", (NO, "0.99x"), (NO, ""), (NO, ""), GONE),
    "LiteRT (": ("LiteRT, x86", (NO, "1.00x"), (NO, ""), (NO, ""), GONE),
    "LiteRT, XNNPACK, ARM": ("LiteRT, ARM", (MAYBE, "1x1 convolutions"), None, None, GONE),
    "TensorRT": ("TensorRT, Ampere and later", None, (MAYBE, "2:4"), None, GONE),
    "torch 2.11 2:4": ("torch, cuSPARSELt, H200", None, (YES, "1.51x large"), None, GONE),
    "torch 2.11 BSR": ("torch, BSR, H200", None, None, (YES, "3.27x large"), GONE),
    "torch 2.11, half of heads": ("torch, dense, H200", None, None, None, (YES, "1.92x")),
    "Microcontrollers": ("microcontrollers", (NO, ""), (NO, ""), (NO, ""), GONE),
}
PLACES = (0.0, 1.0, 1.95, 2.55)  # where the columns begin
LEGEND = (
    (NO, "zeros are multiplied like any number"),
    (YES, "faster, measured here"),
    (MAYBE, "documented, or a smaller dense model; the speed was not measured here"),
)


def cells() -> list[tuple[str, str]]:
    """What the figure takes from the page: how a row begins, and a figure that is in it."""
    return [(key, cell[1].split()[0]) for key, (_, *row) in ROWS.items() for cell in row if cell and "x" in cell[1][:5]]


def source() -> str:
    """What the figure shows, in a line that is kept in the file."""
    return "; ".join(
        f"{row[0]}: " + ", ".join(" ".join(cell or ("-",)).strip() for cell in row[1:]) for row in ROWS.values()
    )


def picture(theme: Theme) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9.2, 5.8), layout="constrained")
    looks = {
        NO: {"marker": "x", "c": theme.lines[5], "s": 40},
        MAYBE: {"marker": "o", "c": "none", "edgecolors": theme.lines[1], "s": 60},
        YES: {"marker": "o", "c": theme.lines[0], "s": 60},
    }
    for y, (name, *row) in enumerate(ROWS.values()):
        axes.text(-0.08, y, name, ha="right", va="center", size=10)
        axes.axhline(y + 0.5, xmin=0, color=theme.soft, lw=0.6, alpha=0.5)
        for x, cell in zip(PLACES, row, strict=True):
            state, text = cell or (None, "")
            if state is not None:
                axes.scatter(x + 0.05, y, linewidths=1.8, **looks[state])
            axes.text(x + 0.12, y, text, va="center", size=9)
    for x, name in zip(PLACES, COLUMNS, strict=True):
        axes.text(x, -0.7, name, va="bottom", size=10, weight="bold")
    for below, (state, text) in enumerate(LEGEND, len(ROWS)):
        axes.scatter(0.05, below + 0.25, linewidths=1.8, **looks[state])
        axes.text(0.12, below + 0.25, text, va="center", size=9)
    axes.set(xlim=(-0.95, 3.1), ylim=(len(ROWS) + len(LEGEND) - 0.2, -1.6))
    axes.axis("off")
    return figure


if __name__ == "__main__":
    draw("targets", picture, source())
