"""All schedules on one axis, to 90 %: python docs/figures/schedules.py

Built from conf/schedule, each with its defaults; staircase rests on 50, 80 and 90 %.
"""

import matplotlib.pyplot as plt
from themes import Theme, draw

from pl_sparse.app.reference import options
from pl_sparse.core.registry import build
from pl_sparse.schedule import Schedule

STEPS = 1000
LEARNED = {"paced": "levels that validation decides on"}
ARGUMENTS = {
    "staircase": {"sparsities": (0.5, 0.8, 0.9)},
    "tickets": {},
    "constant": {"begin": 0.0},
    "oneshot": {"begin": 0.0},
}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))


def levels(name: str) -> list[float]:
    """The sparsity in force at each step."""
    schedule = build(Schedule, name, final=0.9, **ARGUMENTS.get(name, {}))
    now, found = 0.0, []
    for step in range(STEPS + 1):
        due = schedule.levels(step, STEPS)
        now = due[-1] if due else now
        found.append(100 * now)
    return found


def picture(theme: Theme) -> plt.Figure:
    drawn = [name for name in options("schedule") if name not in LEARNED]
    smooth = [name for name in ("linear", "cosine", "cubic", "exponential", "constant", "oneshot") if name in drawn]
    figure, pair = plt.subplots(1, 2, figsize=(10.4, 4.2), sharey=True, layout="constrained")
    for axes, names, title in (
        (pair[0], smooth, "curves"),
        (pair[1], [n for n in drawn if n not in smooth], "rounds and cycles"),
    ):
        for index, name in enumerate(names):
            colour = theme.lines[index % len(theme.lines)]
            axes.plot(
                range(STEPS + 1),
                levels(name),
                label=name,
                color=colour,
                ls=DASHES[index % 4],
                lw=2,
                drawstyle="steps-post",
            )
        axes.set(xlabel="training", title=title, ylim=(-3, 100), xticks=[0, STEPS / 4, STEPS / 2, 3 * STEPS / 4, STEPS])
        axes.set_xticklabels(["0", "¼", "½", "¾", "1"])
        axes.grid(color=theme.soft, alpha=0.3)
        axes.legend(
            loc="lower right",
            frameon=True,
            facecolor=theme.page,
            edgecolor=theme.soft,
            labelcolor=theme.text,
            fontsize=9.5,
        )
        axes.spines[["top", "right"]].set_visible(False)
    pair[0].set_ylabel("sparsity %")
    return figure


if __name__ == "__main__":
    draw("schedules", picture)
