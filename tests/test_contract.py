"""What every scorer, structure and schedule, and every YAML of the configuration, has to keep."""

import copy
import inspect
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch.nn import functional as F

from pl_sparse import Pruner
from pl_sparse.allocation import Allocation, kept
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.settings import check
from pl_sparse.core.registry import build, catalogue
from pl_sparse.core.targets import find
from pl_sparse.masking import Masking
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import Schedule
from pl_sparse.scorer import Scorer
from pl_sparse.structure import NM, Row, Structure, Transposable
from pl_sparse.structure import structure as named
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import vit_tiny
from pl_sparse.updater import SRigL, Updater

CONF = Path(__file__).parent.parent / "conf"
SCORERS = sorted(set(catalogue(Scorer)) - {"occurrence"})  # of rows of tables alone
SCHEDULES = sorted(catalogue(Schedule))
STRUCTURES = [
    "unstructured",
    "nm24",
    "nm14",
    "nm48",
    "nm24t",
    "row",
    "block4x4",
    "channel",
    "feature",
    "kernel",
    "head",
    "expert",
    "layer",
]
STEPS = 12


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    (x, y), _, _ = Digits().load()
    return x, y


class Mixture(torch.nn.Module):
    """Four experts, of which two are chosen for a token, that add to it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = torch.nn.Linear(dim, 4)
        self.experts = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(dim, dim)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, -1)  # (batch, length, top_k)
        gates = weights.new_zeros(*x.shape[:-1], 4).scatter(-1, chosen, weights)
        return x + sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def network(structure: str = "") -> torch.nn.Module:
    """A transformer with convolution, attention and linear layers, and one batch norm."""
    depth = 2 if structure == "layer" else 1
    model = vit_tiny(shape=(1, 8, 8), classes=12, dim=16, depth=depth, heads=4, patch=2)
    model.patches = torch.nn.Sequential(model.patches, torch.nn.BatchNorm2d(16))
    if structure == "expert":
        model.norm = torch.nn.Sequential(Mixture(16), model.norm)
    return model


@cache
def ticket(structure: str = "") -> str:
    """A file of random masks for the model that is trained here."""
    path = Path(tempfile.mkdtemp()) / "ticket.safetensors"
    model = network(structure)
    generator = torch.Generator().manual_seed(0)
    save_file({f"mask:{p.name}": torch.rand(p.shape, generator=generator) < 0.5 for p in find(model)}, path)
    return str(path)


def scoring(name: str, structure: str = "") -> Scorer:
    """A scorer with what it cannot do without."""
    return build(Scorer, name, **({"path": ticket(structure)} if name == "ticket" else {}))


def train(
    pruner: Pruner, data: tuple[torch.Tensor, torch.Tensor], half: bool, structure: str = ""
) -> Iterator[torch.nn.Module]:
    """Train the network; yields it in the middle and at the end."""
    torch.manual_seed(0)
    x, y = data
    model = network(structure).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner.attach(model, x[:2])
    pruner.prepare(STEPS, probe=Probe(model, [(x[:32], y[:32])], lambda b: F.cross_entropy(model(b[0]), b[1])))
    for step in range(STEPS):
        batch = slice(step * 32, step * 32 + 32)
        optimizer.zero_grad()
        pruner.before_forward()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        assert torch.isfinite(loss)
        pruner.before_step(step, STEPS, optimizer)
        optimizer.step()
        pruner.after_step()
        if step == STEPS // 2 and half:
            yield model
    yield model


def triples() -> Iterator[Any]:
    """Each pair of a scorer, a structure and a schedule within a third of all triples; the others are slow."""
    for (i, scorer), (j, structure), (k, schedule) in product(*map(enumerate, (SCORERS, STRUCTURES, SCHEDULES))):
        whole = structure in ("expert", "layer")
        if (scorer == "reap" and structure != "expert") or (whole and scorer in ("hardconcrete", "softthreshold")):
            continue  # refused
        marks = () if (i + j + k) % 3 == 0 else (pytest.mark.slow,)
        yield pytest.param(scorer, structure, schedule, marks=marks)


@pytest.mark.parametrize(("scorer", "structure", "schedule"), list(triples()))
def test_every_scorer_structure_and_schedule(
    scorer: str, structure: str, schedule: str, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    def made() -> Pruner:
        options = {} if schedule in ("constant", "oneshot") else {"end": 0.75}
        timed = build(Schedule, schedule, final=0.5, every=2, **options)
        return Pruner(scoring(scorer, structure), timed, structure, "uniform", misfit="dense")

    pruner = made()
    *_, model = train(pruner, digits, False, structure)
    assert pruner.at_target
    exact = sum(kept(pruner.target, group.numel) for group in pruner.groups)
    coarsest = max(group.numel // max(group.shape[0], 1) for group in pruner.groups)
    nonzero = 0
    for param in pruner.params:
        assert not param.weight[~param.mask].any()
        nonzero += int(param.mask.sum())
    assert nonzero == pruner.kept
    assert abs(nonzero - exact) <= (
        0 if structure in ("unstructured", "row") or structure.startswith("nm") else coarsest
    )
    pattern(named(structure), pruner)

    # the same seed gives the same masks; the weights load into the plain class, under its own names
    twin = made()
    list(train(twin, digits, False, structure))
    for a, b in zip(pruner.params, twin.params, strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.weight, b.weight)
    plain = network(structure)
    plain.load_state_dict(model.state_dict(), strict=True)


def pattern(structure: Structure, pruner: Pruner) -> None:
    """Every unit is kept whole or removed whole; an n:m group keeps at most n."""
    for group in pruner.groups:
        for param, layout in group.members:
            mask = layout.view(param.mask)
            units = structure.pool(mask.double())
            if isinstance(structure, NM):
                assert int(units.sum(-1).max()) <= structure.n
            elif isinstance(structure, Transposable):
                blocks = units.unflatten(-1, (structure.m, structure.m))
                assert bool((blocks.sum(-1) == structure.n).all()) and bool((blocks.sum(-2) == structure.n).all())
            elif isinstance(structure, Row):
                rows = units.flatten(1).sum(1)
                rows = rows[rows > 0] if isinstance(pruner.updater, SRigL) else rows
                assert int(rows.max() - rows.min()) <= 1
            else:
                assert bool(((units == 0) | (units == 1)).all())


@pytest.mark.parametrize("masking", sorted(catalogue(Masking)))
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_state_survives(scorer: str, masking: str, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    if scoring(scorer).needs_latent and not build(Masking, masking).remembers:
        pytest.skip("the masking forgets what the scorer needs")
    if scorer == "reap":
        pytest.skip("it scores experts alone")
    needed = catalogue(Masking)[masking].rests_on
    if needed is not None and not isinstance(scoring(scorer), needed):
        pytest.skip("the masking applies what another scorer learns")

    def made() -> Pruner:
        return Pruner(scoring(scorer), build(Schedule, "linear", final=0.6, every=2), masking=masking)

    pruner = made()
    middle = next(train(pruner, digits, half=True))
    state = copy.deepcopy(pruner.state_dict())
    twin = made()
    twin.load_state_dict(state)
    twin.attach(copy.deepcopy(middle))
    restored = twin.state_dict()
    assert restored["step"] == state["step"] and restored["params"].keys() == state["params"].keys()
    for name, tensors in state["params"].items():
        assert tensors.keys() == restored["params"][name].keys()
        for key, value in tensors.items():
            same = restored["params"][name][key]
            assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same


def yamls(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


GROUPS = sorted({path.parent.name for path in CONF.glob("*/*.yaml")})


REQUIRED = {
    ("data", "image_folder"): ["data.root=."],
    ("scorer", "ticket"): ["scorer.path=somewhere"],
    ("data", "movie_reviews"): ["data.root=.", "data.tokenizer=somewhere"],
    ("data", "torchvision"): ["data.name=CIFAR10", "data.root=."],
    ("data", "huggingface"): ["data.name=somewhere"],
    ("model", "timm"): ["model.name=resnet18"],
    ("model", "huggingface"): ["model.name=somewhere"],
    ("model", "transformer"): ["model.path=somewhere"],
    ("experiment", "movie_reviews_movement"): ["data.root=.", "model.path=somewhere"],
    ("target", "ms"): ["target.ms=1"],
    ("distill", "teacher"): ["distill.teacher=somewhere"],
    ("data", "imagenet"): ["data.root=."],
    ("data", "squad"): ["data.root=.", "data.tokenizer=somewhere"],
    ("data", "causal_text"): ["data.root=.", "data.tokenizer=somewhere"],
    ("model", "causal_lm"): ["model.name=somewhere"],
    ("model", "question_answering"): ["model.name=somewhere"],
    **{
        ("experiment", path.stem): ["data.root=."]
        for kind in ("imagenet", "squad", "llama")
        for path in CONF.glob(f"experiment/{kind}_*.yaml")
    },
    ("experiment", "squad_bert_obert"): ["data.root=.", "distill.teacher=somewhere"],
}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in yamls(group)])
def test_every_yaml_composes(group: str, option: str) -> None:
    overrides = [f"{group}={option}"]
    overrides += REQUIRED.get((group, option), [])
    cfg = compose(overrides)
    check(cfg)
    for node in nodes(cfg):
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        assert open_ended or {key for key in node if not str(key).startswith("_")} <= set(parameters)


def compose(overrides: list[str]) -> DictConfig:
    with composition():
        cfg = hydra.compose("train", overrides)
    OmegaConf.set_struct(cfg, False)
    cfg.output_dir = "somewhere"
    return cfg


def nodes(node: object) -> Iterator[DictConfig]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from nodes(value)


@pytest.mark.parametrize(
    ("group", "axis"),
    [
        ("scorer", Scorer),
        ("schedule", Schedule),
        ("allocation", Allocation),
        ("masking", Masking),
        ("updater", Updater),
    ],
)
def test_every_class_of_an_axis_has_a_yaml(group: str, axis: type) -> None:
    assert set(catalogue(axis)) <= set(yamls(group))
