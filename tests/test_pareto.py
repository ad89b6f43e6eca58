"""Points, series, fronts, hypervolume and constraints, compared with loops."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from pl_sparse.core.files import write_json
from pl_sparse.results.fronts import (
    AXES,
    Series,
    baselines,
    best,
    front,
    hypervolume,
    merge_seeds,
    metric,
    pareto,
    smallest,
)
from pl_sparse.results.runs import gather

KEY = "test/acc"


def made(folder: Path, accuracy: float | None = 0.9, sparsity: float = 0.5, **options: Any) -> Path:
    """The folder of a finished run, as training leaves it."""
    scorer, seed, size = (options.pop(k, d) for k, d in (("scorer", "magnitude"), ("seed", 0), ("size", 1000)))
    overrides = options.pop("overrides", [f"scorer={scorer}", f"sparsity={sparsity}", f"seed={seed}"])
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(overrides))
    config = {"seed": seed, "sparsity": sparsity, "output_dir": str(folder), "scorer": {"_target_": f"x.{scorer}"}}
    config |= {"data": {"_target_": "Digits", "seed": seed}, "model": {"width": 8}}
    config |= {"callbacks": {"best": {"dirpath": f"{folder}/checkpoints"}}, **options.pop("config", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {
        "method": scorer,
        "scorer": scorer,
        "seed": seed,
        "sparsity": sparsity,
        KEY: accuracy,
        "val/acc": accuracy,
        "macs_sparse": 100 * (1 - sparsity),
        "macs_dense": 100,
        "size_bytes": {"dense": 2000, "compressed": size},
    }
    write_json(folder / "metrics.json", {**metrics, **options})
    return folder


# The front


def unbeaten_by_pairs(costs: list[float], values: list[float]) -> set[int]:
    """The points that no other beats, pair by pair."""
    finite = [i for i in range(len(costs)) if math.isfinite(costs[i]) and math.isfinite(values[i])]
    return {
        i
        for i in finite
        if not any(
            costs[j] <= costs[i] and values[j] >= values[i] and (costs[j] < costs[i] or values[j] > values[i])
            for j in finite
        )
    }


def covered(costs: list[float], values: list[float], reference: tuple[float, float]) -> float:
    """The area of the union of rectangles, cell by cell of the grid of all corners."""
    xs = sorted({min(c, reference[0]) for c in costs if math.isfinite(c)} | {reference[0]})
    ys = sorted({max(v, reference[1]) for v in values if math.isfinite(v)} | {reference[1]})
    area = 0.0
    for (x0, x1), (y0, y1) in itertools.product(itertools.pairwise(xs), itertools.pairwise(ys)):
        if any(c <= x0 and v >= y1 for c, v in zip(costs, values, strict=True)):
            area += (x1 - x0) * (y1 - y0)
    return area


@pytest.mark.parametrize("seed", range(40))
def test_front_and_hypervolume_are_those_of_all_pairs(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(0, 9)
    grid = [0.0, 0.1, 0.25, 0.25, 0.5, 0.75, 1.0, 1.5, math.nan]  # ties, points outside the reference, missing ones
    costs, values = ([draw.choice(grid) for _ in range(count)] for _ in range(2))
    unbeaten = pareto(costs, values)
    assert set(unbeaten) == unbeaten_by_pairs(costs, values) and len(unbeaten) == len(set(unbeaten))
    assert [costs[i] for i in unbeaten] == sorted(costs[i] for i in unbeaten)
    for reference in ((1.0, 0.0), (0.6, 0.2)):
        assert hypervolume(costs, values, reference) == pytest.approx(covered(costs, values, reference), abs=1e-12)


def test_small_fronts() -> None:
    assert pareto([], []) == [] and hypervolume([], []) == 0
    assert pareto([1], [0.5]) == [0] and pareto([math.nan], [0.5]) == [] and pareto([1], [math.inf]) == []
    assert sorted(pareto([1, 1], [0.5, 0.5])) == [0, 1]
    assert hypervolume([1.0], [0.9]) == 0 and hypervolume([0.25], [0.8]) == pytest.approx(0.6)


# Gathering


def test_runs_are_found_whatever_their_state(tmp_path: Path) -> None:
    for name in ("10", "9"):
        made(tmp_path / "sweep" / name)
    for name, status in (
        ("run", {"state": "running", "step": 3, "total": 10}),
        ("bad", {"state": "failed", "error": "out of memory"}),
    ):
        write_json(tmp_path / "sweep" / name / "status.json", status)
    (tmp_path / "sweep" / "cut/.hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "cut/.hydra/overrides.yaml").write_text("- seed=1\n- hydra.verbose=true\n")
    broken = made(tmp_path / "sweep" / "torn")
    broken.joinpath("metrics.json").write_text('{"method": "mag')
    (tmp_path / "sweep" / ".cache/x").mkdir(parents=True)
    (tmp_path / "sweep" / ".cache/x/metrics.json").write_text("{}")
    runs = gather([tmp_path, tmp_path / "sweep/9"])  # named twice, found once
    assert [(run.folder.name, run.state) for run in runs] == [
        ("9", "finished"), ("10", "finished"), ("bad", "failed"), ("cut", "unfinished"), ("run", "running"),
        ("torn", "failed"),
    ]  # fmt: skip
    states = {run.folder.name: run for run in runs}
    assert states["bad"].error == "out of memory" and "metrics.json" in str(states["torn"].error)
    assert states["cut"].command == "pl-sparse train seed=1"
    assert [len(run.models) for run in runs] == [1, 1, 0, 0, 0, 0]
    assert len(merge_seeds(runs)) == 1
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        gather([tmp_path / "nowhere"])


def test_a_whole_front_and_tickets_are_several_models(tmp_path: Path) -> None:
    run = made(tmp_path / "front", 0.7, 0.9)
    levels = [{"sparsity": s, KEY: a, "method": "gmp"} for s, a in ((0.5, 0.9), (0.8, 0.8), (0.9, 0.7))]
    write_json(run / "front.json", levels)
    running = tmp_path / "running"
    write_json(running / "front.json", levels[:2])
    write_json(running / "status.json", {"state": "running"})
    lottery = made(tmp_path / "lottery", 0.6, 0.64)
    for i, remaining in enumerate((1.0, 0.8, 0.36)):
        row = {"level": i, "remaining": remaining, "val/acc": 0.9 - i / 10}
        write_json(lottery / f"levels/level_{i:02d}/metrics.json", row)
    models = {run.folder.name: run.models for run in gather([tmp_path])}
    assert [m["sparsity"] for m in models["front"]] == [0.5, 0.8, 0.9]
    assert [m["sparsity"] for m in models["running"]] == [0.5, 0.8]
    assert [m["sparsity"] for m in models["lottery"]] == pytest.approx([0, 0.2, 0.64])
    assert models["lottery"][1]["scorer"] == "magnitude" and "size_bytes" not in models["lottery"][1]


# Series


def test_seeds_are_one_series_and_settings_are_not(tmp_path: Path) -> None:
    values = {0.5: (0.90, 0.92, 0.97), 0.9: (0.8, 0.81, 0.82)}
    for scorer, sparsity in itertools.product(("magnitude", "movement"), values):
        for seed, value in enumerate(values[sparsity]):
            made(tmp_path / f"{scorer}{sparsity}{seed}", value, sparsity, scorer=scorer, seed=seed)
    made(tmp_path / "more", 0.5, 0.5, config={"lr": 0.1}, overrides=["scorer=magnitude", "sparsity=0.5", "lr=0.1"])
    all_series = merge_seeds(gather([tmp_path]))
    sizes = {(s.label, round(s.cost(AXES["sparsity"]), 2)): len(s.points) for s in all_series}
    assert sizes == {
        ("magnitude", 0.5): 3, ("magnitude", 0.1): 3, ("movement", 0.5): 3, ("movement", 0.1): 3,
        ("magnitude lr=0.1", 0.5): 1,
    }  # fmt: skip
    first = next(s for s in all_series if s.label == "movement" and s.cost(AXES["sparsity"]) == 0.5)
    mean = sum(values[0.5]) / 3
    assert first.accuracy(KEY) == pytest.approx(mean)
    assert first.spread(KEY) == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values[0.5]) / 2))
    assert math.isnan(next(s for s in all_series if len(s.points) == 1).spread(KEY))


def test_settings_that_decide_nothing_set_no_run_apart(tmp_path: Path) -> None:
    shown = [
        {"trainer": {"max_epochs": 2, "enable_progress_bar": True, "profiler": None}, "threads": 2, "trust": True},
        {"trainer": {"max_epochs": 2, "enable_progress_bar": False, "log_every_n_steps": 1}, "prefix_cache": "off"},
        {"trainer": {"max_epochs": 2, "profiler": {"_target_": "P", "filename": "p"}}, "resume_with": "changed"},
    ]
    for seed, config in enumerate(shown):
        overrides = ["trainer.enable_progress_bar=true", "threads=2"] if seed == 0 else ["+trainer.profiler=simple"]
        data = {"_target_": "Digits", "seed": seed, "num_workers": seed}
        made(tmp_path / str(seed), seed=seed, config={**config, "data": data}, overrides=overrides)
    (series,) = merge_seeds(gather([tmp_path]))
    assert len(series.points) == 3 and series.label == "magnitude"
    made(tmp_path / "longer", seed=3, config={"trainer": {"max_epochs": 3}}, overrides=["trainer.max_epochs=3"])
    assert [len(series.points) for series in merge_seeds(gather([tmp_path]))] == [3, 1]


def test_the_spread_of_a_cost_is_zero_where_the_seeds_agree(tmp_path: Path) -> None:
    for seed, size in enumerate((1000, 1100, 1300)):
        made(tmp_path / str(seed), seed=seed, size=size, sparsity=0.9)  # the mean of three times 0.1 is rounded
    (series,) = merge_seeds(gather([tmp_path]))
    assert series.cost_spread(AXES["sparsity"]) == 0 and series.cost_spread(AXES["latency"]) == 0
    assert series.cost_spread(AXES["size"]) == pytest.approx(math.sqrt(70000 / 3))


def test_a_label_is_what_methods_differ_in(tmp_path: Path) -> None:
    made(tmp_path / "a", scorer="magnitude", structure="2:4")
    made(tmp_path / "b", scorer="magnitude", structure="unstructured")
    made(tmp_path / "c", scorer="movement", structure="unstructured", masking="frozen")
    assert {s.label for s in merge_seeds(gather([tmp_path]))} == {
        "magnitude 2:4",
        "magnitude unstructured",
        "movement unstructured",
    }
    assert {s.label for s in merge_seeds(gather([tmp_path / "a"]))} == {"magnitude"}


def test_missing_values_leave_only_their_axis(tmp_path: Path) -> None:
    made(tmp_path / "a", 0.9, 0.5, latency_ms=2.0, latency_dense_ms=4.0)
    made(tmp_path / "b", 0.8, 0.9, size_bytes={"dense": 2000})
    made(tmp_path / "c", None, 0.95)
    all_series = merge_seeds(gather([tmp_path]))
    assert [len(front(all_series, AXES[key], KEY)) for key in ("sparsity", "size", "latency", "exported")] == [
        2,
        1,
        1,
        0,
    ]
    (series,) = front(all_series, AXES["latency"], KEY)
    assert series.share(AXES["latency"]) == series.share(AXES["size"]) == series.share(AXES["macs"]) == 0.5
    assert metric(all_series) == KEY


# Constraints


def folder_name(series: Series | None) -> str | None:
    return series.points[0].run.folder.name if series else None


def test_the_best_under_a_constraint(tmp_path: Path) -> None:
    made(tmp_path / "dense", 0.9, 0.0, size=2000)
    made(tmp_path / "near", 0.89, 0.5, size=1200)  # exactly a point below
    made(tmp_path / "small", 0.889, 0.9, size=500)
    made(tmp_path / "same", 0.895, 0.51, size=1200)
    all_series = merge_seeds(gather([tmp_path]))
    accuracies = baselines(all_series, KEY)
    assert list(accuracies.values()) == [0.9]
    size = AXES["size"]
    assert folder_name(smallest(all_series, size, KEY, accuracies)) == "same"  # as small, and more accurate
    assert folder_name(smallest(all_series, size, KEY, accuracies, 0.02)) == "small"
    assert folder_name(smallest(all_series, size, KEY, 0.8)) == "small"
    assert smallest(all_series, size, KEY, 0.99) is None and smallest(all_series, size, KEY, {}) is None
    assert (
        folder_name(best(all_series, size, KEY, 1200)) == "same"
        and folder_name(best(all_series, size, KEY, 1199)) == "small"
    )
    assert best(all_series, size, KEY, 499) is None and best(all_series, AXES["latency"], KEY, 1e9) is None


def test_the_baseline_is_of_the_same_task(tmp_path: Path) -> None:
    made(tmp_path / "dense", 0.9, 0.0)
    made(tmp_path / "other", 0.7, 0.9, config={"model": {"width": 99}}, size=10)
    all_series = merge_seeds(gather([tmp_path]))
    assert folder_name(smallest(all_series, AXES["size"], KEY, baselines(all_series, KEY), 0.5)) == "dense"


def test_numbers_survive_the_files(tmp_path: Path) -> None:
    """The JSON that is written has null for NaN, which is read as missing."""
    run = made(tmp_path / "a", math.nan)
    assert json.loads((run / "metrics.json").read_text())[KEY] is None
    (series,) = merge_seeds(gather([run]))
    assert math.isnan(series.accuracy(KEY)) and front([series], AXES["sparsity"], KEY) == []
