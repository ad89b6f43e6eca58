"""Random small models, axes and trainer options: a refusal before training, or the exact target.

`make test-fuzz` runs 3,000 examples, FUZZ=300 FUZZ_SEED=7 with it others.
"""

import math
import os
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pl_sparse import Sparsity
from pl_sparse.allocation import Allocation, Budget, Units, kept
from pl_sparse.core.parametrized import is_computed
from pl_sparse.core.registry import build, names, registered
from pl_sparse.core.targets import find
from pl_sparse.masking import Masking
from pl_sparse.pruner import Pruner
from pl_sparse.schedule import Schedule
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Structure
from pl_sparse.updater import DropGrow, Reconstruct, Updater

EXAMPLES = int(os.environ.get("FUZZ", "60"))
VERBOSE = False
SIZES = (1, 2, 3, 4, 8)
CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NORMS = (
    parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm,
)  # fmt: skip
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.001),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.01, max_iter=2),
}


@dataclass(frozen=True)
class Case:
    """One example: plain values, so that a failure can be read and run again."""

    kind: str  # of the inputs: "vector", "sequence", "tokens", "1d", "2d", "3d"
    channels: int
    size: int
    layers: tuple[tuple[str, int, str | None], ...]  # kind, width, what is done with it
    outputs: int
    last: str | None
    axes: dict[str, Any]
    where: dict[str, Any]
    trainer: dict[str, Any]
    optimizer: str
    batches: int
    sized: bool
    seed: int


class Own(nn.Module):
    """A parameter of its own, inputs first, and a scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.gain = nn.Parameter(torch.ones(1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.kernel) * self.gain


class Twice(nn.Module):
    """One layer by two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(x)))


class First(nn.Module):
    """The first output of a layer that has several, for itself or beside itself."""

    def __init__(self, layer: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.layer, self.copies = layer, copies

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(*[x] * self.copies)[0]
        return out


class Mean(nn.Module):
    """The mean over positions: those after the channels, or those before them."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def spatial_layer(kind: str, inputs: int, width: int, dims: int) -> tuple[nn.Module, int]:
    """A layer for images, and its channels."""
    conv, transposed = CONVS[dims]
    if kind == "transposed":
        return transposed(inputs, width, 2), width
    if kind == "depthwise":
        return conv(inputs, inputs, 1, groups=inputs), inputs
    if kind == "norm":
        return BATCH_NORMS[dims](inputs), inputs
    return conv(inputs, width, 3 if kind == "wide" else 1, padding="same", bias=kind != "wide"), width


def sequence_layer(kind: str, inputs: int, width: int) -> tuple[nn.Module, int]:
    """A layer for sequences, and its features."""
    heads = 2 if inputs % 2 == 0 else 1
    if kind in ("lstm", "gru", "rnn"):
        recurrent = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        both = width % 2 == 0
        return First(recurrent(inputs, width // 2 if both else width, batch_first=True, bidirectional=both)), width
    if kind == "attention":
        return First(nn.MultiheadAttention(inputs, heads, batch_first=True), 3), inputs
    if kind == "encoder":
        return nn.TransformerEncoderLayer(inputs, heads, width, dropout=0.1, batch_first=True), inputs
    return vector_layer(kind, inputs, width)


def vector_layer(kind: str, inputs: int, width: int) -> tuple[nn.Module, int]:
    """A layer for vectors, and its features."""
    if kind == "norm":
        return nn.LayerNorm(inputs), inputs
    if kind == "own":
        return Own(inputs, width), width
    if kind == "twice":
        return Twice(inputs), inputs
    return nn.Linear(inputs, width, bias=kind != "wide"), width


LAYERS = {
    "vector": ("linear", "linear", "wide", "own", "twice", "norm"),
    "sequence": ("linear", "lstm", "gru", "rnn", "attention", "encoder", "norm"),
    "image": ("conv", "conv", "wide", "transposed", "depthwise", "norm"),
}


def treated(made: nn.Module, how: str | None) -> nn.Module:
    """A layer that is frozen, or whose weight is computed."""
    if how == "frozen":
        return made.requires_grad_(False)
    if how is not None and isinstance(made, (nn.Linear, nn.modules.conv._ConvNd)):
        return NORMS[int(how)](made)  # type: ignore[no-any-return]
    return made


def network(case: Case) -> nn.Sequential:
    torch.manual_seed(case.seed)
    dims = int(case.kind[0]) if case.kind[0].isdigit() else 0
    parts: list[nn.Module] = [nn.Embedding(5, case.channels)] if case.kind == "tokens" else []
    width = case.channels
    for kind, outputs, how in case.layers:
        if dims:
            made, width = spatial_layer(kind, width, outputs, dims)
        elif case.kind == "vector":
            made, width = vector_layer(kind, width, outputs)
        else:
            made, width = sequence_layer(kind, width, outputs)
        parts += [treated(made, how), nn.ReLU() if outputs % 2 else nn.Tanh()]
    if case.kind != "vector":
        parts.append(Mean(tuple(range(2, 2 + dims)) if dims else (1,)))
    return nn.Sequential(*parts, treated(nn.Linear(width, case.outputs), case.last))


class Batches(Dataset[Any]):
    """Inputs and targets, by index."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        dims = int(case.kind[0]) if case.kind[0].isdigit() else 1
        shape = {"vector": (case.channels,), "sequence": (case.size, case.channels), "tokens": (case.size,)}.get(
            case.kind, (case.channels, *(case.size,) * dims)
        )
        count = 4 * case.batches
        self.x = torch.randn(count, *shape, generator=generator)
        if case.kind == "tokens":
            self.x = torch.randint(5, (count, *shape), generator=generator)
        self.y = torch.randint(case.outputs, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Stream(IterableDataset[Any]):
    """The same, without a length."""

    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter([self.data[i] for i in range(len(self.data))])


class Module(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net, self.case, self.losses = network(case), case, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any) -> Tensor:
        out = self(batch[0])
        targets = F.one_hot(batch[1], self.case.outputs).to(out.dtype)
        return F.mse_loss(out, targets) if self.case.outputs == 1 else F.cross_entropy(out, batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = OPTIMIZERS[self.case.optimizer]([p for p in self.parameters() if p.requires_grad])
        return made


class Started(Callback):
    """How many batches were begun."""

    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


def ticket(model: nn.Module, folder: str) -> str:
    path = Path(folder) / "ticket.safetensors"
    save_file({f"mask:{p.name}": torch.rand(p.shape) < 0.5 for p in find(model, frozen="prune")}, path)
    return str(path)


def pruner_of(case: Case, model: nn.Module, folder: str) -> Pruner:
    axes = dict(case.axes)
    if axes["scorer"] == "ticket":
        axes["scorer"] = build(Scorer, "ticket", path=ticket(model, folder))
    if axes["allocation"] == "budget":
        axes["allocation"] = Budget(
            macs=axes["schedule"].get("final", 0.5) or 0.5, final=axes["schedule"]["final"] or 1.0
        )
    options = dict(axes["schedule"])
    axes["schedule"] = build(Schedule, options.pop("name"), **options)
    return Pruner(**axes, **case.where)


def run(case: Case) -> str:
    """Train; what came of it, once it is what it has to be."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, started = Module(case), Started()
        try:
            sparsity = Sparsity(pruner_of(case, model, folder), report=False)
            data = Batches(case)
            loader = DataLoader(data if case.sized else Stream(data), batch_size=4)
            trainer = Trainer(
                accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, callbacks=[started, sparsity], **case.trainer,
            )  # fmt: skip
            trainer.fit(model, loader)
        except RuntimeError as error:
            if "nothing passes through the network" in str(error):
                return "collapsed"
            raise
        except ValueError as error:
            if "hold NaN" in str(error) and not all(map(math.isfinite, model.losses)):
                return "diverged"
            if started.batches:
                raise
            return f"refused: {error}" if VERBOSE else "refused"
    assert not [w for w in caught if "were not zero" in str(w.message)]
    assert all(map(math.isfinite, model.losses)), model.losses
    model.eval()
    x = data.x[:4]
    assert model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x).isfinite().all()
    if any("before the schedule reached its end" in str(w.message) for w in caught):  # what is learned is not caught up
        return "short"
    check(sparsity)
    return "trained"


def check(sparsity: Sparsity) -> None:
    """The counts in the model are those that are reported, and those that were asked for."""
    pruner = sparsity.pruner
    nonzeros = 0
    for param in pruner.masked:
        assert not param.weight[~param.mask].any(), param.name
        if param in pruner.params:
            nonzeros += int(torch.count_nonzero(param.weight))
        if is_computed(param.module):
            assert not param.module.weight[~param.mask].any(), param.name  # type: ignore[operator,index]
    total = pruner.numel
    count = round((1 - sparsity.sparsity) * total)
    assert count == pruner.kept == sum(int(param.mask.sum()) for param in pruner.params)
    assert sparsity.summary is not None
    assert sparsity.summary.sparsity == sparsity.sparsity  # misfits are in the table, as dense, and count in neither
    # a weight that returns is zero until it gets a gradient
    may_be_zero = (
        pruner.masking.transforms or pruner.schedule.falls or isinstance(pruner.updater, (DropGrow, Reconstruct))
    )
    assert nonzeros <= count if may_be_zero else nonzeros == count, (nonzeros, count)
    assert pruner.at_target
    if pruner.updater.targets_sparsity and not isinstance(pruner.allocation, Budget):
        exact(pruner)


def exact(pruner: Pruner) -> None:
    """As many weights are kept as the sparsity, and each override, asks for; what units allow, and need."""
    units = Units(pruner.groups, pruner.structure, pruner.scorer.score)
    level = pruner.schedule.final
    counts = [int(units.alive(i).sum()) for i in range(len(units))]
    if pruner.structure.fixed is not None:
        for i, (_, override) in enumerate(pruner.group_overrides):
            asked = kept((pruner.structure.fixed if override is None else override) * bool(level), units.sizes[i])
            pattern = pruner.structure.select(pruner.structure.pool(torch.zeros(pruner.groups[i].shape)), asked)
            assert sum(param.kept for param, _ in pruner.groups[i].members) == int(pattern.sum())
        return
    free = [i for i, (_, override) in enumerate(pruner.group_overrides) if override is None]
    for i, (_, override) in enumerate(pruner.group_overrides):
        if override is not None:
            override = override if level else 0.0
            assert counts[i] == max(kept(override, units.sizes[i]), units.least(i, override)), pruner.groups[i].name
    if not free:
        return
    some = int(type(pruner.allocation).__name__ in ("Uniform", "ERK", "OWL"))
    leasts = [units.least(i, level, some) for i in free]
    assert all(counts[i] >= least for i, least in zip(free, leasts, strict=True))
    got = sum(counts[i] * units.weights[i] for i in free)
    needed = sum(least * units.weights[i] for i, least in zip(free, leasts, strict=True))
    asked = kept(level, sum(units.sizes[i] * units.weights[i] for i in free))
    coarsest = max(units.weights[i] for i in free)
    if coarsest == 1:
        assert got == max(asked, needed), (got, asked, needed)
    else:
        assert abs(got - asked) < coarsest or got == needed > asked, (got, asked, needed, coarsest)


# The examples


def axis(kind: type, *more: str) -> list[str]:
    """All names of an axis that pl_sparse has itself, and shorthands."""
    builtin = [name for name in names(kind) if registered(kind.axis)[name].builtin]
    return [*builtin, *more]


@st.composite
def schedules(draw: Any, fixed_count: bool) -> dict[str, Any]:
    choices = axis(Schedule)
    name = draw(st.sampled_from(["constant"] * 3 * len(choices) + choices if fixed_count else choices))
    final = draw(st.sampled_from([0.5, 0.9]) | st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.99]))
    options: dict[str, Any] = {"name": name, "final": final}
    if name not in ("tickets",):
        options["begin"] = draw(st.sampled_from([0.0] * 6 + [0.25, 0.25, "1 steps", 2, "1 epochs"]))
    if name not in ("tickets", "oneshot") and draw(st.booleans()):
        options["end"] = draw(st.sampled_from([0.5, 0.75, 1.0, 1.0, 4, "2 epochs"]))
    if name in ("linear", "cubic", "cosine", "exponential", "constant"):
        options["every"] = draw(st.sampled_from([1, 2, 0.3, "1 epoch"]))
    if name == "oneshot":
        options |= {"rounds": draw(st.sampled_from([1, 3])), "begin": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 1]))}
    if name in ("iterative", "tickets"):
        options["rate"] = draw(st.sampled_from([0.2, 0.5, 0.8]))
    if name == "cyclic":
        options["cycles"] = draw(st.sampled_from([1, 3]))
    return options


def agreeing(axes: dict[str, Any]) -> dict[str, Any]:
    """The axes with defaults in the place of what the others refuse."""
    for name, plain in {"": "", "masking": "auto", "updater": "prune", "structure": "unstructured"}.items():
        axes = {**axes, name: plain} if name else axes
        schedule = {key: value for key, value in axes["schedule"].items() if key != "name"}
        try:
            made = build(Schedule, axes["schedule"]["name"], **schedule)
            scorer = "magnitude" if axes["scorer"] == "ticket" else axes["scorer"]
            allocation = "erk" if axes["allocation"] == "budget" else axes["allocation"]
            Pruner(**{**axes, "scorer": scorer, "allocation": allocation, "schedule": made})
            break
        except ValueError:
            pass
    if axes["allocation"] == "budget" and axes["structure"] != "coupled":
        axes["allocation"] = "erk"
    return axes


@st.composite
def cases(draw: Any) -> Case:
    kind = draw(st.sampled_from(["vector", "vector", "sequence", "tokens", "1d", "2d", "3d"]))
    width = st.sampled_from(SIZES)
    how = st.sampled_from([None] * 6 + ["frozen", "0", "1", "2", "3"])
    layers = LAYERS["image" if kind[0].isdigit() else "sequence" if kind == "tokens" else kind]
    rarely = st.sampled_from([False] * 7 + [True])
    updater = draw(st.sampled_from(["prune"] * 5 + axis(Updater)))
    schedule = draw(schedules(updater == "dropgrow"))
    axes = {
        "scorer": draw(st.sampled_from(["magnitude"] * 3 + axis(Scorer))),
        "schedule": schedule,
        "structure": draw(st.sampled_from(["unstructured"] * 6 + axis(Structure, "nm24", "nm12", "nm12t", "block2x2"))),
        "allocation": draw(st.sampled_from(axis(Allocation))),
        "updater": updater,
        "masking": draw(st.sampled_from(["auto"] * 5 + axis(Masking))),
    }
    where: dict[str, Any] = {"misfit": draw(st.sampled_from(["dense"] * 5 + ["error"]))}
    if draw(rarely):
        where["overrides"] = {"Linear": draw(st.floats(0, 1))}
    if draw(rarely):
        where["last"] = draw(st.booleans())
    if draw(rarely):
        where["frozen"] = "prune"
    if draw(rarely):
        where["ablation"] = draw(
            st.sampled_from(["shuffle", "reinit"] if schedule["name"] == "oneshot" else ["invert"])
        )
    if not draw(rarely):
        axes = agreeing(axes)
    trainer: dict[str, Any] = {
        "max_epochs": draw(st.integers(1, 3)),
        "accumulate_grad_batches": draw(st.sampled_from([1, 1, 2, 3])),
        "precision": draw(st.sampled_from(["32-true"] * 3 + ["64-true", "bf16-mixed"])),
        "gradient_clip_val": draw(st.sampled_from([None, None, 0.1])),
    }
    if draw(st.sampled_from([False, False, True])):
        trainer |= {"max_steps": draw(st.integers(1, 9)), "max_epochs": -1}
    sized = not draw(rarely)
    if draw(rarely):
        trainer["limit_train_batches"] = draw(st.sampled_from([1, 2, 0.5] if sized else [1, 2]))
    return Case(
        kind=kind,
        channels=draw(width),
        size=draw(st.sampled_from([1, 2, 4])),
        layers=tuple(
            draw(
                st.lists(
                    st.tuples(st.sampled_from(layers), width, how),
                    min_size=draw(st.sampled_from([0, 1, 2])),
                    max_size=4,
                )
            )
        ),
        outputs=draw(st.sampled_from([1, 2, 4])),
        last=draw(how),
        axes=axes,
        where=where,
        trainer=trainer,
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        batches=draw(st.integers(2, 4)),
        sized=sized,
        seed=draw(st.integers(0, 999)),
    )


def fuzz(examples: int, number: int | None) -> Counter[str]:
    """How often each came out."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=number is None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(cases())
    def each(case: Case) -> None:
        outcome = run(case)
        event(outcome)
        outcomes[outcome] += 1

    (each if number is None else seed(number)(each))()
    return outcomes


@pytest.mark.timeout(0)
def test_a_refusal_or_the_exact_target() -> None:
    number = os.environ.get("FUZZ_SEED")
    outcomes = fuzz(EXAMPLES, None if number is None else int(number))
    print(dict(outcomes))
    assert outcomes["trained"] > EXAMPLES / 5 and outcomes["refused"]
