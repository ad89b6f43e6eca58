"""Each architecture of the zoo loses half of its channels, and of its heads, and computes what the masked one did."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_sparse import Pruner
from pl_sparse.export import shrink
from pl_sparse.structure import Channel, Head
from pl_sparse.surgery.trial import couplings
from zoo import architectures as _architectures  # noqa: F401  each adds its rows
from zoo import hugging_face, others, packages  # noqa: F401
from zoo.entry import loss_of, tensor_of
from zoo.removal import (
    Architecture,
    Called,
    architectures,
    everything,
    heads_of,
    macs,
    milliseconds,
    one_of,
    share,
    why,
    without_labels,
)

STEPS = 5


def trained(model: Called, structure: Any, batches: list[Any]) -> Pruner:
    """Half of the units masked while the model trains."""
    pruner = Pruner("magnitude", "oneshot", structure, "uniform", sparsity=0.5, misfit="dense")
    pruner.attach(model, (batches[0],))
    pruner.prepare(STEPS)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1e-3, momentum=0.9)
    model.train()
    for step, batch in enumerate(batches[1:]):
        optimizer.zero_grad()
        loss_of(model(batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pruner.before_step(step, STEPS, optimizer)
        optimizer.step()
        pruner.after_step()
    model.eval()
    return pruner


def new(one: Architecture) -> Called:
    """The architecture with random weights, always the same ones."""
    torch.manual_seed(0)
    case = one.make()
    if case.made is not None:
        case.made(case.module)
    return Called(case)


def outputs(model: nn.Module, batch: Any) -> Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return tensor_of(model(batch)).clone()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", architectures())
def test_half_of_it_leaves_and_outputs_stay(one: Architecture, record_property: Any, request: Any) -> None:
    pytest.importorskip(one.imported, exc_type=ImportError)
    first = new(one)
    batches = [without_labels(first.net, first.case.draw()) for _ in range(STEPS + 1)]
    first.eval()(batches[0])  # what is lazy is made
    removable, stay = share(couplings(first, (batches[0],)), first)
    structures: list[Any] = [Channel(coupled=True)] if removable else []
    if heads_of(first):
        structures.append(Head())
    rows = []
    for structure in structures:
        model, masked = new(one), new(one)
        model(batches[0]), masked(batches[0])
        trained(model, structure, batches)
        single, sample = one_of(model, batches[0])
        masked.eval().load_state_dict(model.state_dict())
        wanted = outputs(model, batches[0])
        removal = shrink(model, (batches[0],))
        error = float((outputs(model, batches[0]) - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-4
        counts = macs(masked, single), macs(model, single)
        if isinstance(structure, Channel):
            assert not removal.left
        if len(removal.left) < heads_of(masked) or isinstance(structure, Channel):
            assert removal.after < removal.before and counts[1] < counts[0]
        row = {
            "structure": "coupled" if isinstance(structure, Channel) else "head",
            "left": Counter(map(why, removal.left.values())).most_common(),
            "parameters": (removal.before, removal.after),
            "macs": counts,
            "sample": sample,
            "error": error,
        }
        if request.config.getoption("--removal-table", None):
            row["ms"], row["runtime"] = milliseconds([masked, model], single)
        rows.append(row)
    assert removable or stay or rows  # what cannot lose any is said to
    record_property(
        "removal",
        {
            "index": everything().index(one),
            "of": len(everything()),
            "module": one.name,
            "package": f"{one.package} {version(one.package)}",
            "removable": removable,
            "stay": stay.most_common(),
            "rows": rows,
        },
    )


def test_the_zoo_of_removal_is_large() -> None:
    names = [(one.package, one.name) for one in everything()]
    assert len(names) == len(set(names)) >= 60
    assert sum(one.quick for one in everything()) >= 12
