"""Experiments of full size, for machines that we do not have: what their files say."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.reproduce.runs import ROOT, Experiment, section, table

KINDS = ("imagenet", "squad", "llama")


def full(seeds: Sequence[int]) -> str:
    rows = []
    for kind in KINDS:
        for path in sorted((ROOT / "conf" / "experiment").glob(f"{kind}_*.yaml")):
            head = path.read_text().partition("defaults:")[0]
            words = " ".join(line.lstrip("# ") for line in head.splitlines())
            rows.append([f"`{path.stem}`", "Published" + words.partition("Published")[2].partition(" Not run here")[0]])
    return section(
        "Experiments of full size",
        """
        Recipes of published size. None was run: they need larger machines. `tests/test_full_reproductions.py` composes
        each of them and trains ten steps on small generated data. The file of each recipe has its source, its settings
        and where it differs.
        """,
        table(["experiment", "published"], rows),
        "<!-- not run: it needs ImageNet and eight GPUs -->",
        "`python train.py experiment=imagenet_resnet50_rigl data.root=FOLDER trainer.devices=8`",
    )


EXPERIMENTS = {"full": Experiment([], full)}
