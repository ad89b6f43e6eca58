"""Comparisons of methods: intervals, tests, verdicts, and the command."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pl_sparse.app.study import main
from pl_sparse.results.fronts import Point, Series
from pl_sparse.results.runs import Run
from pl_sparse.results.study import compare, report, t_quantile, two_sided

TABLE = {(1, 0.95): 12.706, (2, 0.95): 4.303, (4, 0.95): 2.776, (9, 0.99): 3.250, (29, 0.95): 2.045}


def test_students_quantiles_are_those_of_tables() -> None:
    for (degrees, confidence), value in TABLE.items():
        assert t_quantile(degrees, confidence) == pytest.approx(value, abs=6e-4)
        assert two_sided(value, degrees) == pytest.approx(1 - confidence, abs=2e-4)


def series(label: str, values: list[float], first: int = 0) -> Series:
    metrics = [{"seed": first + seed, "test/acc": value} for seed, value in enumerate(values)]
    return Series(label, tuple(Point(Run(Path("."), "finished"), m) for m in metrics))


def test_a_shift_of_all_seeds_is_no_noise_and_a_mean_of_some_is() -> None:
    random.seed(0)
    base = [0.9 + random.gauss(0, 0.02) for _ in range(6)]
    better = [value + 0.01 + random.gauss(0, 0.001) for value in base]
    other = [0.91 + random.gauss(0, 0.02) for _ in range(6)]
    found = compare(0.9, [series("better", better), series("base", base), series("other", other)], "test/acc")
    verdicts = {(d.first, d.second): d.verdict for d in found}
    assert verdicts["better", "base"] == "better is larger"  # paired, though the spread of seeds is twice as large
    assert verdicts["better", "other"] == verdicts["base", "other"] == "noise"
    differences = [b - a for a, b in zip(base, better, strict=True)]
    mean = sum(differences) / 6
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 5 / 6)
    assert found[0].mean == pytest.approx(mean) and found[0].interval == pytest.approx(2.5706 * error, rel=1e-4)
    assert found[0].p == pytest.approx(3 * two_sided(mean / error, 5))
    (lone,) = compare(0.9, [series("a", [0.5, 0.6]), series("b", [0.7], first=1)], "test/acc")
    assert lone.seeds == 1 and lone.verdict == "one seed allows no comparison" and lone.mean == pytest.approx(-0.1)


def test_unequal_budgets_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, steps in (("gmp", 100), ("lth", 300)):
        for seed in (0, 1):
            folder = tmp_path / f"{method}{seed}"
            folder.mkdir()
            metrics = {"method": method, "seed": seed, "sparsity": 0.9, "sparsity_requested": 0.9}
            (folder / "metrics.json").write_text(json.dumps({**metrics, "test/acc": 0.9 + seed / 50, "steps": steps}))
    report(tmp_path, Console(width=120))
    out = capsys.readouterr().out
    assert "the budgets differ: 100, 300 optimizer steps" in out and "noise" in out
    contents = json.loads((tmp_path / "study.json").read_text())
    assert contents["metric"] == "test/acc" and [row["method"] for row in contents["methods"]] == ["gmp", "lth"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["methods=gmp,riggl", "seeds=0"], "methods=riggl: there is no such method. Did you mean 'rigl'"),
        (["methods=gmp", "levels=0.5"], "seeds=... is missing"),
        (["methods=gmp", "seeds=0,1", "sparsity=0.5"], "sparsity=0.5: a study compares several, levels=0.5"),
        (["nowhere"], "nowhere is not a folder"),
    ],
)
def test_what_a_study_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_the_baseline_is_trained_before_the_overview_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        "pl_sparse.app.study.subprocess.run", lambda command, check: commands.append(command) or Ended()
    )
    monkeypatch.setattr("pl_sparse.app.study.report", lambda *_: None)
    main(["methods=gmp,dense", "seeds=0", f"hydra.sweep.dir={tmp_path}"])
    assert [next(w for w in words if w.startswith("method=")) for words in commands] == ["method=dense", "method=gmp"]
    assert ["~hydra.callbacks.overview" in words for words in commands] == [True, False]


class Ended:
    returncode = 0


@pytest.mark.slow
def test_a_study_trains_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    assert sys.executable
    settings = ["trainer.max_epochs=2", "data.limit=200", "hydra.sweep.dir=there"]
    main(["methods=gmp,random,dense", "seeds=0,1", "levels=0.5,0.8", *settings])
    contents = json.loads(Path("there/study.json").read_text())
    seen = {(row["method"], row["sparsity"], row["seeds"]) for row in contents["methods"]}
    assert {level for _, level, _ in seen} == {0.0, 0.5, 0.8} and len(seen) == 5
    assert {seeds for _, _, seeds in seen} == {2} and len(contents["differences"]) == 2
    assert "dense" in Path("there/pareto.csv").read_text()
