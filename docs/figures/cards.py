"""The figure of each card of a method: sparsity, and weights that are kept, over a training on digits.

python docs/figures/cards.py [METHOD ...] trains the presets as the first table of docs/methods.md does, with seed 0, in
about eight minutes. A figure has no colours of its own: the page inlines it and sets them (docs/_static/site.css).
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import hydra
import numpy as np
from safetensors import safe_open

from pl_sparse.app.hydra_api import composition
from pl_sparse.app.reference import options
from pl_sparse.app.training import train

OUT = Path(__file__).parent / "cards"
LEFT, WIDTH, TOP, HEIGHT = 58, 396, 26, 86  # of the upper panel
BELOW, LINE, COUNT = 150, 2.4, 60  # the lower panel: where it begins, a weight's height, and how many there are


@dataclass(frozen=True)
class Masks:
    """The masks of a training after its updates.

    Attributes:
        steps: the optimizer steps after which they were kept.
        kept: (steps, weights), whether each weight is kept.
        ever: positions of the weights that are kept at some time.
        total: optimizer steps of the training.
        epochs: of the training.
    """

    steps: list[int]
    kept: np.ndarray
    ever: np.ndarray
    total: int
    epochs: int

    @property
    def sparsity(self) -> list[float]:
        return [float(1 - row.mean()) for row in self.kept]

    @property
    def returned(self) -> float:
        """The share of the weights kept at the end that were pruned before."""
        last = self.kept[-1]
        return float((~self.kept[:, last]).any(0).mean())


def trained(method: str, folder: Path) -> Masks:
    """Train a preset in a folder, and read its masks."""
    with composition():
        given = [f"method={method}", f"output_dir={folder}", "callbacks=masks", "threads=1", "seed=0"]
        cfg = hydra.compose("train", [*given, "trainer.check_val_every_n_epoch=10"])  # which no mask depends on
    with contextlib.redirect_stdout(io.StringIO()):  # its report
        train(cfg)
    paths = sorted((folder / "masks").glob("step_*.safetensors"))
    rows, shapes = [], {}
    for path in paths:
        with safe_open(path, "np") as file:
            shapes = json.loads(file.metadata()["shapes"])
            bits = [np.unpackbits(file.get_tensor(name))[: prod(shape)] for name, shape in shapes.items()]
        rows.append(np.concatenate(bits).astype(bool))
    steps = [int(path.stem.removeprefix("step_")) for path in paths]
    kept = np.stack(rows)
    return Masks(steps, kept, ever(steps, kept), steps[-1], cfg.trainer.max_epochs)


def ever(steps: Sequence[int], kept: np.ndarray) -> np.ndarray:
    """Positions of the weights that are kept at some time: all of them where training begins without masks."""
    return np.arange(kept.shape[1]) if steps[0] > 1 else np.flatnonzero(kept.any(0))


def x_of(masks: Masks, step: float) -> float:
    return LEFT + WIDTH * step / masks.total


def number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def curve(masks: Masks) -> str:
    """The sparsity in force, in steps from 0."""
    path, y = f"M{LEFT} {number(TOP + HEIGHT)}", TOP + float(HEIGHT)
    for step, sparsity in zip(masks.steps, masks.sparsity, strict=True):
        new = TOP + HEIGHT * (1 - sparsity)
        if abs(new - y) > 0.05:
            path += f"H{number(x_of(masks, step))}V{number(new)}"
            y = new
    return path + f"H{LEFT + WIDTH}"


def lines(masks: Masks) -> str:
    """A line for each of COUNT weights while it is kept: those that are kept longest first."""
    sample = masks.ever[((np.arange(COUNT) + 0.5) * len(masks.ever) / COUNT).astype(int)]
    edges = [0, *masks.steps, masks.total]
    history = np.concatenate([np.ones((1, masks.kept.shape[1]), bool), masks.kept])[:, sample].T
    if masks.steps[0] <= 1:  # masks that training begins with
        history[:, 0] = history[:, 1]
    lengths = np.diff(edges)
    order = sorted(range(len(history)), key=lambda k: (-float(history[k] @ lengths), tuple(~history[k])))
    path = ""
    for row, k in enumerate(order):
        y = number(BELOW + (row + 0.5) * LINE)
        begins = None
        for place, on in enumerate([*history[k], False]):
            if on and begins is None:
                begins = edges[place]
            elif not on and begins is not None:
                if edges[place] > begins:
                    start, end = x_of(masks, begins), x_of(masks, edges[place])
                    path += f"M{number(start)} {y}h{number(end - start)}"
                begins = None
    return path


def described(method: str, masks: Masks) -> str:
    """What the figure shows, as a text in its place."""
    levels, part = np.array(masks.sparsity), np.array(masks.steps) / masks.total
    final = levels[-1]
    first = int(np.argmax(levels > 0.005))
    reached = len(levels) - int(np.argmax(np.abs(levels[::-1] - final) > 0.005)) if np.ptp(levels) > 0.005 else first
    reached = min(reached, len(levels) - 1)
    last = max((k for k in range(1, len(part)) if not np.array_equal(masks.kept[k - 1], masks.kept[k])), default=0)
    if reached > first:
        ways = "rises and falls" if np.diff(levels).min() < -0.005 else "rises"
        between = f"between {percent(part[first])} and {percent(part[reached])} of training"
        text = f"the sparsity {ways} to {percent(final)} {between}."
    elif part[first] < 0.01:
        text = f"the sparsity is {percent(final)} from the start."
    else:
        text = f"the sparsity is {percent(final)} after one cut at {percent(part[first])} of training."
    if masks.returned >= 0.005 and part[last] > part[reached] + 0.01:
        text += f" The masks change until {percent(part[last])} of training."
    share = f"{percent(masks.returned)} of" if masks.returned >= 0.005 else "None of"
    return f"{method}: {text} {share} the weights kept at the end had been pruned before."


def words(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="figure-text" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{text}</text>'


def picture(method: str, masks: Masks) -> str:
    bottom, right = BELOW + COUNT * LINE, LEFT + WIDTH
    text = described(method, masks)
    levels = {share: TOP + HEIGHT * (1 - share) for share in (0, 0.5, 1)}
    grid = "".join(f"M{LEFT} {number(y)}h{WIDTH}" for y in levels.values())
    parts = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 {number(bottom + 26)}" role="img"',
        f'aria-label="{text}">',
        f"<title>{text}</title>",
        words(LEFT, 14, "sparsity"),
        *(words(LEFT - 7, y + 4.5, percent(share), "end") for share, y in levels.items()),
        f'<path class="figure-soft" d="{grid}"/>',
        f'<path class="figure-line" d="{curve(masks)}"/>',
        words(LEFT, BELOW - 9, f"{COUNT} of {len(masks.ever):,} weights, each a line while it is kept"),
        f'<path class="figure-kept" stroke-width="{number(LINE - 0.6)}" d="{lines(masks)}"/>',
        words(LEFT, bottom + 18, "epoch 0"),
        words(right, bottom + 18, str(masks.epochs), "end"),
        "</svg>",
    )
    return "\n".join(parts) + "\n"


def main(methods: Sequence[str]) -> None:
    OUT.mkdir(exist_ok=True)
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            masks = trained(method, Path(folder) / "run")
        (OUT / f"{method}.svg").write_text(picture(method, masks), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in options("method") if name != "dense"])
