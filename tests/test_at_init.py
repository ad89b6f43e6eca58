"""Scores at initialization against naive versions, and what calibration leaves behind."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from test_app import config
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from pl_sparse import Pruner, Sparsity
from pl_sparse.app.training import train
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import OneShot
from pl_sparse.scorer import SNIP, GraSP, SynFlow
from pl_sparse.structure import NM


def net(*sizes: int, seed: int = 0, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(count: int, size: int, inputs: int, classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, inputs, generator=generator).double(),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def probed(model: nn.Module, data: list[Any]) -> Probe:
    return Probe(model, data, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))


def scores(pruner: Pruner) -> list[torch.Tensor]:
    return [pruner.scorer.score(param) for param in pruner.params]


def calibrated(scorer: Any, model: nn.Module, data: list[Any]) -> list[torch.Tensor]:
    pruner = Pruner(scorer, OneShot(final=0.5))
    pruner.attach(model)
    scorer.calibrate(pruner.params, probed(model, data))
    return scores(pruner)


def test_snip_is_the_sensitivity_to_a_connections_strength() -> None:
    """|L(c + h) - L(c - h)| / 2h at c = 1, connection by connection, over two batches together."""
    model, data = net(4, 5, 3).double(), batches(2, 6, 4, 3)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(x), y)) for x, y in data)

    for layer, found in zip((model[0], model[2]), calibrated(SNIP(), model, data), strict=True):
        for i in range(layer.weight.shape[0]):
            for j in range(layer.weight.shape[1]):
                w = float(layer.weight.data[i, j])
                ends = []
                for c in (1 + 1e-5, 1 - 1e-5):
                    layer.weight.data[i, j] = c * w
                    ends.append(loss())
                layer.weight.data[i, j] = w
                assert float(found[i, j]) == pytest.approx(abs(ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_grasp_is_w_times_the_hessian_gradient_product() -> None:
    model, data = net(3, 4, 2).double(), batches(2, 5, 3, 2)
    shapes = [model[0].weight.shape, model[2].weight.shape]
    flat = torch.cat([model[0].weight.reshape(-1), model[2].weight.reshape(-1)]).detach()

    def loss(w: torch.Tensor, temperature: float = 3.0) -> torch.Tensor:
        a, b = w[: shapes[0].numel()].view(shapes[0]), w[shapes[0].numel() :].view(shapes[1])
        return sum((F.cross_entropy(F.relu(x @ a.t()) @ b.t() / temperature, y) for x, y in data), torch.zeros(()))

    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = flat * (hessian @ gradient)
    found = torch.cat([s.reshape(-1) for s in calibrated(GraSP(temperature=3.0), model, data)])
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)

    # the paper's sign: what scores high takes most from |g|^2 when it is removed a little
    for i in (int(found.argmax()), int(found.argmin())):
        less = flat.clone()
        less[i] *= 1 - 1e-6
        change = torch.autograd.functional.jacobian(loss, less).square().sum() - gradient.square().sum()
        assert float(change) == pytest.approx(-2e-6 * float(expected[i]), rel=1e-3)


def test_synflow_is_conserved_and_is_the_product_of_matrices() -> None:
    model = net(6, 5, 4, 3, bias=True)
    a, b, c = (model[i].weight.detach().abs().double() for i in (0, 2, 4))
    total = (c @ b @ a).sum()
    found = calibrated(SynFlow(), model, [(torch.randn(9, 6), None)])
    for i in range(4):
        for j in range(5):
            assert float(found[1][i, j]) == pytest.approx(float(c[:, i].sum() * b[i, j] * a[j].sum()), rel=1e-12)
    for layer in found:
        assert layer.dtype == torch.float64 and float((layer.sum() / total - 1).abs()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_synflow_of_activations_that_are_computed_again(dtype: torch.dtype) -> None:
    model = net(6, 5, 4, 3).to(dtype)

    class Checkpointed(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return checkpoint(super().forward, x, use_reentrant=False)

    again = Checkpointed(*model)
    batches = [(torch.randn(9, 6, dtype=dtype), None)]
    expected, found = (calibrated(SynFlow(), each, batches) for each in (model, again))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_synflow_needs_its_rounds() -> None:
    """At 0.1 % of a deep network one round cuts it through; a hundred leave a path from inputs to outputs."""

    def through(rounds: int) -> float:
        model = net(100, *[60] * 6, 10)
        pruner = Pruner("synflow", OneShot(final=0.999, rounds=rounds), allocation="global")
        pruner.attach(model)
        pruner.prepare(10, probe=probed(model, [(torch.randn(2, 100), None)]))
        total = sum(param.numel for param in pruner.params)
        assert pruner.kept == math.floor(total * 0.001 + 0.5)
        flow = torch.ones(100)
        for param in pruner.params:
            flow = param.mask.float() @ flow
        return float(flow.sum())

    assert through(1) == 0 and through(100) > 0


def test_rounds_score_the_masked_network_anew() -> None:
    """Two rounds by hand: score, cut to sqrt(density), score what is left, cut; what was cut stays cut."""
    model, data = net(6, 8, 3), [(torch.randn(20, 6), torch.randint(3, (20,)))]
    twin = copy.deepcopy(model)
    pruner = Pruner("snip", OneShot(final=0.75, rounds=2), allocation="global")
    pruner.attach(model)
    pruner.prepare(10, probe=probed(model, data))
    weights = [twin[0].weight, twin[2].weight]
    alive = torch.ones(72, dtype=torch.bool)
    for keep in (36, 18):
        grads = torch.autograd.grad(F.cross_entropy(twin(data[0][0]), data[0][1]), weights)
        flat = torch.cat([(g * w).abs().reshape(-1) for g, w in zip(grads, weights, strict=True)])
        order = torch.where(alive, flat, -1.0).sort(descending=True, stable=True).indices
        alive = torch.zeros(72, dtype=torch.bool)
        alive[order[:keep]] = True
        with torch.no_grad():
            weights[0].mul_(alive[:48].view(8, 6))
            weights[1].mul_(alive[48:].view(3, 8))
    assert torch.equal(torch.cat([p.mask.reshape(-1) for p in pruner.params]), alive)
    assert not any(param.state for param in pruner.params)


def test_force_lets_weights_return_between_rounds() -> None:
    model, data = net(20, 30, 3), [(torch.randn(40, 20), torch.randint(3, (40,)))]
    seen: list[torch.Tensor] = []
    pruner = Pruner("snip", OneShot(final=0.9, rounds=6), masking="frozen")
    pruner.attach(model)
    masking = pruner.masking

    class Watch(type(masking)):  # type: ignore[misc]
        def on_change(self, params: Any) -> None:
            seen.append(torch.cat([p.mask.reshape(-1).clone() for p in params]))

    pruner.masking = Watch()
    pruner.prepare(10, probe=probed(model, data))
    assert len(seen) == 6 and any(bool((new & ~old).any()) for old, new in itertools.pairwise(seen))


@pytest.mark.parametrize("structure", ["unstructured", "row", "nm24", "channel", "block2x2"])
def test_shuffling_keeps_counts_and_patterns(structure: str) -> None:
    def masks(ablation: str | None) -> list[torch.Tensor]:
        torch.manual_seed(3)
        pruner = Pruner("snip", OneShot(final=0.5), structure, "uniform", ablation=ablation)
        model = net(8, 16, 12, 4)
        pruner.attach(model)
        pruner.prepare(10, probe=probed(model, [(torch.randn(20, 8), torch.randint(4, (20,)))]))
        if structure == "nm24":
            assert all(int(NM().pool(p.mask.float()).sum(-1).max()) == 2 for p in pruner.params)
        for param in pruner.params:
            assert not param.weight[~param.mask].any() and param.weight[param.mask].all()
            assert structure != "row" or len(set(param.mask.sum(1).tolist())) == 1
        return [param.mask for param in pruner.params]

    plain, shuffled, inverted = masks(None), masks("shuffle"), masks("invert")
    for a, b, c in zip(plain, shuffled, inverted, strict=True):
        assert a.sum() == b.sum() == c.sum()
    assert any(not torch.equal(a, b) for a, b in zip(plain, shuffled, strict=True))
    if structure == "unstructured":
        assert all(torch.equal(a, ~c) for a, c in zip(plain, inverted, strict=True))


def test_reinit_draws_new_weights_under_the_same_masks() -> None:
    def made(ablation: str | None) -> Pruner:
        model = net(8, 16, 4, bias=True)
        pruner = Pruner("magnitude", OneShot(final=0.5), ablation=ablation)
        pruner.attach(model)
        pruner.prepare(10)
        return pruner

    for a, b in zip(made(None).params, made("reinit").params, strict=True):
        assert torch.equal(a.mask, b.mask)
        assert not (a.weight == b.weight)[a.mask].any() and not b.weight[~b.mask].any()
    with pytest.raises(ValueError, match="schedule=oneshot"):
        Pruner(sparsity=0.9, ablation="reinit")
    with pytest.raises(ValueError, match="must be one of shuffle, reinit, invert"):
        Pruner(sparsity=0.9, ablation="shufle")


def test_the_trained_model_can_be_pruned_after_its_last_step() -> None:
    model = net(8, 16, 4)
    pruner = Pruner("magnitude", OneShot(final=0.5, begin=1.0))
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(5):
        assert pruner.kept == pruner.numel and not pruner.at_target
        optimizer.zero_grad()
        model(torch.randn(3, 8)).square().sum().backward()
        pruner.before_step(step, 5, optimizer)
        optimizer.step()
        pruner.after_step()
    assert pruner.kept == pruner.numel // 2 and pruner.at_target
    assert all(not param.weight[~param.mask].any() for param in pruner.params)


class Foreign(LightningModule):
    """Somebody else's module: batch norm, dropout, metrics, logging, a loss in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.acc = MulticlassAccuracy(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> dict[str, torch.Tensor]:
        logits = self(batch[0])
        self.acc(logits, batch[1])
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.log_dict({"loss": F.cross_entropy(logits, batch[1])})
        return {"loss": F.cross_entropy(logits, batch[1])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: LightningModule, *callbacks: Any) -> Trainer:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    return trainer


@pytest.mark.parametrize("scorer", ["snip", "grasp", "synflow"])
def test_any_module_is_calibrated_and_left_as_it_was(scorer: str) -> None:
    """With nothing to prune, training with the callback is training without it, dropout and batch norm included."""
    torch.manual_seed(0)
    plain = Foreign()
    watched = copy.deepcopy(plain)
    fit(plain)
    sparsity = Sparsity(scorer=scorer, schedule=OneShot(final=1e-9), calibration_batches=3, report=False)
    fit(watched, sparsity)
    assert sparsity.pruner.num_updates == 1
    for (name, a), (_, b) in zip(plain.state_dict().items(), watched.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert watched.acc._update_count == plain.acc._update_count

    module = Foreign()
    sparsity = Sparsity(scorer=scorer, schedule=OneShot(final=0.75), report=False)
    fit(module, sparsity)
    assert int((module.net[0].weight == 0).sum() + (module.net[4].weight == 0).sum()) == 132


class Manual(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Tokens(Foreign):
    def training_step(self, batch: Any) -> Any:
        return None


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="manual optimization"):
        fit(Manual(), Sparsity(scorer="snip", schedule="oneshot", sparsity=0.5))
    with pytest.raises(ValueError, match="no loss"):
        fit(Tokens(), Sparsity(scorer="snip", schedule="oneshot", sparsity=0.5))
    with pytest.raises(ValueError, match="calibration_batches"):
        Sparsity(sparsity=0.5, calibration_batches=0)
    pruner = Pruner("snip", OneShot(final=0.5))
    pruner.attach(net(4, 4))
    with pytest.raises(ValueError, match="probe=Probe"):
        pruner.prepare(10)
    with pytest.raises(ValueError, match="training data is empty"):
        pruner.prepare(10, probe=probed(net(4, 4), []))
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    pruner = Pruner("synflow", OneShot(final=0.5))
    pruner.attach(model)
    with pytest.raises(ValueError, match="models of tokens"):
        pruner.prepare(10, probe=Probe(model, [torch.zeros(2, 3, dtype=torch.long)], lambda b: model(b).sum()))


@pytest.mark.filterwarnings("ignore:.*kept no weight")  # what inverted scores leave is not meant to work
@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "random"])
def test_ablations_of_the_presets(method: str, tmp_path: Path) -> None:
    def weights(ablation: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / ablation
        more = ["schedule.rounds=10"] if method == "synflow" else []
        metrics = train(config(folder, f"method={method}", f"ablation={ablation}", "trainer.max_epochs=1", *more))
        assert metrics["sparsity"] == pytest.approx(0.9, abs=1e-3) and metrics["at_target"]
        return {name: w for name, w in load_file(folder / "model.safetensors").items() if name.endswith("weight")}

    plain, shuffled, drawn, inverted = map(weights, ("null", "shuffle", "reinit", "invert"))
    for name, weight in plain.items():
        kept = weight != 0
        assert abs(int((shuffled[name] != 0).sum()) - int(kept.sum())) <= 0.01 * weight.numel()
        assert not torch.equal(shuffled[name] != 0, kept)
        assert ((drawn[name] != 0) == kept).float().mean() > 0.999  # the same mask on other weights
        assert not (drawn[name] == weight)[kept].any()
    overlap = sum(int(((inverted[name] != 0) & (plain[name] != 0)).sum()) for name in plain)
    assert overlap < 0.02 * sum(int((weight != 0).sum()) for weight in plain.values())
