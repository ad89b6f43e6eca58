"""Names: one registry per axis, the same for Python and the command line."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf
from torch import Tensor

from pl_sparse import Pruner, Sparsity
from pl_sparse.allocation import Allocation
from pl_sparse.app.hydra_api import composition, instantiate
from pl_sparse.core import registry
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import build, names, register
from pl_sparse.core.targets import TargetOptions, Targets
from pl_sparse.masking import Masking, SoftThresholded
from pl_sparse.pruner import PrunerOptions
from pl_sparse.regularizer import Regularizer
from pl_sparse.schedule import Schedule
from pl_sparse.scorer import Magnitude, Scorer
from pl_sparse.structure import Channel, Structure, structure
from pl_sparse.updater import Updater

CONF = Path(__file__).parent.parent / "conf"
AXES: dict[str, Any] = {
    "scorer": Scorer,
    "schedule": Schedule,
    "structure": Structure,
    "allocation": Allocation,
    "updater": Updater,
    "masking": Masking,
    "regularizer": Regularizer,
}
NEEDED = {  # what a name cannot do without, in Python and on the command line
    ("scorer", "ticket"): {"path": str(CONF / "train.yaml")},
    ("allocation", "budget"): {"kb": 100.0},
    ("updater", "threshold"): {"at_least": 0.7},
}
STEMS = [(axis, path.stem) for axis in AXES for path in sorted((CONF / axis).glob("*.yaml"))]
STEMS.remove(("masking", "shrunk"))  # an earlier name, which warns


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Names that a test registers are gone after it."""
    before = {axis: dict(entries) for axis, entries in registry._ENTRIES.items()}
    yield
    registry._ENTRIES.clear()
    registry._ENTRIES.update(before)


@pytest.mark.parametrize(("axis", "stem"), STEMS)
def test_every_option_of_the_command_line_is_a_name_in_python(axis: str, stem: str) -> None:
    needed = NEEDED.get((axis, stem), {})
    overrides = [f"{axis}={stem}", "sparsity=0.7", *(f"{axis}.{key}={value}" for key, value in needed.items())]
    with composition():
        cfg = hydra.compose("train", overrides)
    if (axis, stem) == ("regularizer", "none"):
        assert not cfg.get("regularizer")
        return
    if (axis, stem) == ("masking", "auto"):
        assert instantiate(cfg.masking) == Pruner(sparsity=0.7).masking
        return
    composed = instantiate(cfg[axis].regularizer if axis == "regularizer" else cfg[axis])
    arguments: dict[str, Any] = dict(needed)
    if axis == "schedule" or stem == "budget":
        arguments["final"] = 0.7
    if stem in ("admm", "growing_l2"):
        arguments |= {"sparsity": 0.7, "allocation": instantiate(cfg.allocation)}
    named = structure(stem) if axis == "structure" else build(AXES[axis], stem, **arguments)
    assert named == composed


def test_the_axes_of_the_default_run_are_those_of_python() -> None:
    with composition():
        cfg = hydra.compose("train", [])
    pruner = Sparsity(sparsity=cfg.sparsity).pruner
    for axis in AXES:
        if axis != "regularizer":
            assert instantiate(cfg[axis]) == getattr(pruner, axis), axis
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    where = {key: plain[key] for key in Targets.__dataclass_fields__}
    assert Targets(**{**where, "exclude": tuple(where["exclude"])}) == pruner.targets


def test_arguments_by_keyword_are_written_once() -> None:
    assert set(TargetOptions.__annotations__) == set(Targets.__dataclass_fields__)
    import inspect

    explicit = {name for name in inspect.signature(Pruner).parameters if name != "where"}
    assert set(PrunerOptions.__annotations__) == explicit | set(TargetOptions.__annotations__)


def score(self: Any, param: MaskedParameter) -> Tensor:
    return param.values


def test_builtin_names_cannot_be_taken() -> None:
    before = build(Scorer, "magnitude")

    with pytest.raises(
        ValueError, match=r"'magnitude' is already pl_sparse.scorer.weights.Magnitude: .* needs another"
    ):

        @register
        @dataclass(frozen=True)
        class Magnitude(Scorer):
            score = score

    # a subclass that is not registered takes no name either
    type("Magnitude", (build(Scorer, "random").__class__,), {})
    assert type(build(Scorer, "magnitude")) is type(before)


def test_a_cell_that_runs_twice_registers_twice_and_others_clash() -> None:
    for _ in range(2):
        first = dataclass(frozen=True)(type("Mine", (Scorer,), {"score": score, "__module__": "__main__"}))
        register(first)
    assert type(build(Scorer, "mine")) is first
    other = dataclass(frozen=True)(type("Mine", (Scorer,), {"score": score, "__module__": "elsewhere"}))
    with pytest.raises(ValueError, match=r"__main__\.Mine: elsewhere\.Mine needs another name"):
        register(other)
    register("mine2")(other)
    assert type(build(Scorer, "mine_2")) is other


def test_names_with_arguments_and_other_things() -> None:
    assert structure("coupled") == Channel(coupled=True)
    assert Pruner(structure="coupled", sparsity=0.5).structure == Channel(coupled=True)
    assert "coupled" in names(Structure) and "budget" in names(Allocation)
    with pytest.raises(TypeError, match="belongs to no axis"):
        register(dict)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="names a class"):
        register(3)  # type: ignore[call-overload]


def test_earlier_names_say_so() -> None:
    with pytest.warns(FutureWarning, match="masking=shrunk is called softthresholded"):
        assert isinstance(build(Masking, "shrunk"), SoftThresholded)
    with pytest.warns(FutureWarning, match="masking.Shrunk is called SoftThresholded"):
        from pl_sparse.masking import Shrunk
    assert Shrunk is SoftThresholded
    with pytest.warns(FutureWarning, match="needs_dense is called needs_latent"):
        cls = type("Old", (Scorer,), {"score": score, "needs_dense": True})
    assert cls.needs_latent is True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (0.9, r"Sparsity\(sparsity=0\.9\)"),
        ("movement", r"Sparsity\(scorer='movement'\)"),
        ("cubic", r"Sparsity\(schedule='cubic'\)"),
        (Magnitude(), r"Sparsity\(scorer=Magnitude\(\.\.\.\)\)"),
        ([], r"Sparsity\(sparsity=0\.9\), got \[\]"),
    ],
)
def test_a_value_by_position_says_what_was_meant(value: Any, meant: str) -> None:
    with pytest.raises(TypeError, match=meant):
        Sparsity(value)


def test_sparsity_takes_a_pruner_or_its_arguments() -> None:
    pruner = Pruner(sparsity=0.9)
    assert Sparsity(pruner).pruner is pruner
    assert Sparsity(scorer="movement", structure="nm24").pruner.schedule.final == 0.5  # the pattern's
    assert Sparsity(sparsity=0.9, targets=Targets(exclude=["fc"])).pruner.targets.exclude == ["fc"]
    assert Sparsity(sparsity=0.9, exclude=["fc"]).pruner.targets == Targets(exclude=["fc"])
    with pytest.raises(TypeError, match="sparsity belong to the Pruner"):
        Sparsity(pruner, sparsity=0.9)
    with pytest.raises(ValueError, match="exclude belong in targets"):
        Sparsity(sparsity=0.9, targets=Targets(), exclude=["fc"])


def test_entry_points_are_names(tmp_path: Path) -> None:
    """A distribution that names a scorer in its entry points, without being imported."""
    (tmp_path / "thirdparty.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from pl_sparse.scorer import Scorer

            @dataclass(frozen=True)
            class Cubed(Scorer):
                power: float = 3.0

                def score(self, param):
                    return param.values.abs() ** self.power
            """
        )
    )
    info = tmp_path / "thirdparty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pl_sparse.scorer]\ncubed = thirdparty:Cubed\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(
        """
        from pl_sparse import Pruner
        from pl_sparse.core.registry import names
        from pl_sparse.scorer import Scorer
        assert "thirdparty" not in sys.modules
        assert "magnitude" in names(Scorer) and "cubed" in names(Scorer)
        print(Pruner(scorer="cubed", sparsity=0.5).scorer)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Cubed(power=3.0)"
