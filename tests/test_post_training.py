"""Wanda and SparseGPT against loops in float64."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from references.dsnot import exchanged
from torch import nn
from torch.nn import functional as F

from pl_sparse import Pruner
from pl_sparse.core.targets import find
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import Linear, OneShot
from pl_sparse.tasks.models import vit_tiny
from pl_sparse.updater import DSnoT, Reconstruct

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "tokens": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(0, 2), dilation=(1, 2), groups=2), (2, 4, 6, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, padding="same", groups=4, padding_mode="circular"), (3, 4, 9)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
}


def correlated(*shape: int) -> torch.Tensor:
    """Inputs whose features are strongly correlated, as those of trained layers are."""
    mixed = torch.randn(*shape).double()
    return mixed + 2 * mixed.mean(1, keepdim=True) + 0.5 * mixed.roll(1, 1)


def pruned(model: nn.Module, batches: list[torch.Tensor], final: float, *axes: Any, **options: Any) -> Pruner:
    pruner = Pruner(axes[0], OneShot(final=final), axes[1], "uniform", axes[2], **options)
    pruner.attach(model)
    pruner.prepare(10, probe=Probe(model, batches, lambda batch: model(batch).sum()))
    return pruner


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_weight_times_the_unfolded_inputs(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape).double()
    layer.bias.data.zero_()
    seen: list[torch.Tensor] = []
    Probe(layer, [x], lambda batch: layer(batch).sum()).activations(find(layer), lambda param, x: seen.append(x))
    (inputs,) = seen
    rows = layer.weight.unflatten(0, (len(inputs), -1)).flatten(2)  # (groups, out / groups, columns)
    out = torch.einsum("gok,gpk->pgo", rows, inputs.flatten(2)).flatten(1)
    expected = layer(x)
    expected = expected.movedim(1, -1) if name not in ("linear", "tokens") else expected
    assert torch.allclose(out, expected.flatten(0, -2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["tokens", "conv", "groups"])
def test_wanda_against_loops(name: str) -> None:
    """Per output row the smallest |w_ij| |x_j| go, with inputs of two batches together."""
    make, shape = LAYERS[name]
    layer, batches = make().double(), [correlated(*shape), correlated(*shape)]
    before = layer.weight.detach().clone()
    pruner = pruned(layer, batches, 0.5, "wanda", "row", "prune")
    groups = getattr(layer, "groups", 1)
    outputs = len(before)
    for o in range(outputs):
        scores = []
        for index in range(before[o].numel()):
            if name == "tokens":
                values = torch.cat([b[..., index].reshape(-1) for b in batches])
            else:  # one weight alone in a convolution multiplies exactly the inputs that belong to it
                probe = torch.zeros_like(before[:1])
                probe.view(-1)[index] = 1
                part = before.shape[1]
                group = o // (outputs // groups)
                values = torch.cat(
                    [
                        F.conv2d(
                            b[:, group * part : (group + 1) * part], probe, None, layer.stride, layer.padding,
                            layer.dilation,
                        ).reshape(-1)
                        for b in batches
                    ]
                )  # fmt: skip
            scores.append(abs(float(before[o].view(-1)[index])) * sum(float(v) ** 2 for v in values) ** 0.5)
        kept = sorted(range(len(scores)), key=lambda i: -scores[i])[: len(scores) // 2]
        assert pruner.params[0].mask[o].view(-1).nonzero().flatten().tolist() == sorted(kept)
    assert torch.equal(layer.weight, before * pruner.params[0].mask)  # nothing else changes


def obs(weight: torch.Tensor, x: torch.Tensor, keep: int, block: int, n: int = 0) -> torch.Tensor:
    """Optimal brain surgeon, column by column, with the inverse of what is right of each computed anew.

    Args:
        weight: (rows, columns).
        x: inputs, (positions, columns).
        keep: how many weights stay in all; ignored for n:m.
        n: kept in each block of a row, for n:m; else the best of a block in all rows.
    """
    rows, columns = weight.shape
    w = weight.clone()
    hessian = 2 * x.t() @ x / len(x)
    live = [j for j in range(columns) if hessian[j, j] > 0]
    damping = 0.01 * sum(float(hessian[j, j]) for j in live) / len(live)
    for j in set(range(columns)) - set(live):
        hessian[j, j], w[:, j] = 1, 0
    hessian += damping * torch.eye(columns).double()
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for start in range(0, columns, block):
        inside = range(start, min(start + block, columns))
        places = [(r, j) for r in range(rows) for j in inside]
        places.sort(key=lambda place: -float(w[place] ** 2 / inverses[place[1]][0, 0]))
        if n:
            stay = {p for r in range(rows) for p in [q for q in places if q[0] == r][:n]}
        else:
            share = [round(keep * c / columns + 1e-9) for c in (inside[0], inside[-1] + 1)]
            stay = set(places[: share[1] - share[0]])
        for j in inside:
            for r in range(rows):
                if (r, j) not in stay:
                    error = float(w[r, j]) / float(inverses[j][0, 0])
                    for k in range(j, columns):
                        w[r, k] -= error * inverses[j][0, k - j]
                    w[r, j] = 0
    return w


@pytest.mark.parametrize("block", [1, 3, 4, 128])
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(block: int) -> None:
    layer, batches = nn.Linear(8, 5, bias=False).double(), [correlated(9, 8), correlated(4, 8)]
    batches[0][:, 3] = batches[1][:, 3] = 0  # a dead input
    expected = obs(layer.weight.detach(), torch.cat(batches), 20, block)
    pruner = pruned(layer, batches, 0.5, "magnitude", "unstructured", Reconstruct(block=block))
    assert torch.allclose(layer.weight, expected, rtol=1e-8, atol=1e-10)
    assert pruner.kept == 20 and not layer.weight[~pruner.params[0].mask].any()
    assert torch.isfinite(layer.weight).all() and not layer.weight[:, 3].any()


def test_sparsegpt_depends_neither_on_the_number_of_batches_nor_on_their_scale() -> None:
    """Where an input is dead, the sum over batches and a 1 for it would damp by how many there are."""

    def made(times: int, scale: float) -> torch.Tensor:
        torch.manual_seed(0)
        layer, x = nn.Linear(8, 5, bias=False).double(), correlated(30, 8) * scale
        x[:, 3] = 0
        pruned(layer, [x] * times, 0.5, "magnitude", "unstructured", "reconstruct")
        return layer.weight.detach()

    for other in (made(7, 1.0), made(1, 0.01)):
        torch.testing.assert_close(made(1, 1.0), other, rtol=1e-9, atol=1e-12)


def test_what_is_summed_of_inputs_is_exact_where_losses_are_in_bfloat16() -> None:
    layer, x = (
        nn.Linear(8, 4),
        torch.randn(64, 2) @ torch.randn(2, 8),
    )  # of rank 2: rounded, it has negative eigenvalues

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(batch).float().sum()

    (total,) = Probe(layer, [x], loss).sums(find(layer), lambda x: x.mT @ x, lambda size: (*size, size[-1]))
    assert total is not None and torch.allclose(total[0], x.T @ x, rtol=1e-5, atol=1e-4)
    pruner = Pruner("magnitude", OneShot(final=0.5), updater=Reconstruct(damping=1e-4))
    pruner.attach(layer)
    pruner.prepare(1, probe=Probe(layer, [x], loss))
    assert pruner.kept == 16


def test_sparsegpt_chooses_n_of_m_as_it_goes() -> None:
    layer, x = nn.Linear(12, 5, bias=False).double(), correlated(30, 12)
    expected = obs(layer.weight.detach(), x, 0, 4, n=2)
    pruner = pruned(layer, [x], 0.5, "magnitude", "nm24", "reconstruct")
    assert torch.allclose(layer.weight, expected, rtol=1e-8, atol=1e-10)
    assert bool((pruner.params[0].mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_sparsegpt_prunes_a_layer_on_the_outputs_of_those_pruned_before() -> None:
    class Late(nn.Module):
        """Calls its layers in another order than it registers them."""

        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(8, 4), nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    model, x = Late().double(), correlated(20, 6)
    dense = copy.deepcopy(model)
    first = obs(dense.first.weight.detach(), x, 24, 128)
    hidden = (x @ first.t() + dense.first.bias).relu().detach()
    second = obs(dense.second.weight.detach(), hidden, 16, 128)
    pruned(model, [x], 0.5, "magnitude", "unstructured", "reconstruct")
    assert torch.allclose(model.first.weight, first, rtol=1e-8, atol=1e-10)
    assert torch.allclose(model.second.weight, second, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", ["unstructured", "nm24"])
@pytest.mark.parametrize("name", ["tokens", "conv", "groups", "3d"])
def test_sparsegpt_changes_outputs_less_than_magnitude(name: str, structure: str) -> None:
    make, shape = LAYERS[name]
    if structure == "nm24":
        make, shape = (lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2)), (4, 8, 5, 5)
    layer, x = make().double(), correlated(*shape)
    out = layer(x)
    errors, counts = [], []
    for updater in ("reconstruct", "prune"):
        twin = copy.deepcopy(layer)
        counts.append(pruned(twin, [x], 0.5, "magnitude", structure, updater).kept)
        errors.append((twin(x) - out).square().sum().item())
    assert errors[0] < 0.7 * errors[1] and counts[0] == counts[1]


@pytest.mark.parametrize("structure", ["unstructured", "nm24"])
def test_layers_whose_inputs_are_not_seen_are_pruned_by_magnitude(structure: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)
            self.up = nn.ConvTranspose1d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.used(input=x).unsqueeze(2))

    model = Odd().double()
    plain = copy.deepcopy(model)
    batches = [correlated(20, 8)]
    pruned(plain, batches, 0.5, "magnitude", structure, "prune")
    for axes in (("magnitude", structure, "reconstruct"), ("wanda", structure, "prune")):
        twin = copy.deepcopy(model)
        pruned(twin, batches, 0.5, *axes)
        for a, b in ((twin.idle, plain.idle), (twin.up, plain.up)):
            assert torch.equal(a.weight, b.weight)
        assert not torch.equal(twin.used.weight, plain.used.weight)


@pytest.mark.parametrize("axes", [("wanda", "row", "prune"), ("magnitude", "unstructured", "reconstruct")])
def test_transformers_are_calibrated_and_left_in_their_mode(axes: Any) -> None:
    """The projections of attention see its input; the model's own forward pass takes its fast path as before."""
    model = vit_tiny(shape=(1, 8, 8), classes=4, dim=16, depth=1, heads=2, patch=4, dropout=0.3).train()
    x = torch.randn(6, 1, 8, 8)
    seen: dict[str, tuple[int, ...]] = {}
    probe = Probe(model, [x], lambda batch: model(batch).sum())
    probe.activations(find(model), lambda param, x: seen.update({param.name: tuple(x.shape)}))
    names = [param.name for param in find(model)]
    assert [name for name in names if name not in seen] == ["blocks.0.self_attn.out_proj.weight"]
    assert seen["blocks.0.self_attn.in_proj_weight"] == (1, 6 * 5, 16)
    state = torch.get_rng_state()
    pruner = pruned(model, [x], 0.5, *axes)
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_rounds_only_remove_and_a_fine_tune_keeps_the_masks() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    pruner = Pruner("magnitude", Linear(final=0.8, end=0.6, every=2), allocation="uniform", updater="reconstruct")
    pruner.attach(model)
    x = correlated(32, 8).float()
    pruner.prepare(10, probe=Probe(model, [x], lambda batch: model(batch).sum()))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before = [param.mask.clone() for param in pruner.params]
    for step in range(10):
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        pruner.before_step(step, 10, optimizer)
        optimizer.step()
        pruner.after_step()
        for param, old in zip(pruner.params, before, strict=True):
            assert not bool((param.mask & ~old).any()) and not param.weight[~param.mask].any()
        before = [param.mask.clone() for param in pruner.params]
    assert pruner.kept == round(0.2 * pruner.numel)


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"structure": "channel"}, "column by column, which structure=channel"),
        ({"masking": "ste"}, "works on sparse weights alone"),
    ):
        with pytest.raises(ValueError, match=message):
            Pruner(schedule=OneShot(final=0.5), updater="reconstruct", **options)
    with pytest.raises(ValueError, match="block=0"):
        Reconstruct(block=0)
    with pytest.raises(ValueError, match="damping=0"):
        Reconstruct(damping=0.0)
    pruner = Pruner(schedule=OneShot(final=0.5), updater="reconstruct")
    pruner.attach(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="updater=reconstruct is calibrated on batches"):
        pruner.prepare(10)


SKIPPED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from lightning.pytorch import LightningModule, Trainer
from pl_sparse import Sparsity
from pl_sparse.core.topk import top_k
from pl_sparse.schedule import OneShot
from pl_sparse.tasks.data import Batches

class Skips(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rare, self.last = (torch.nn.Linear(8, 8) for _ in range(3))

    def training_step(self, batch, index):
        x = batch[0] * torch.tensor([0.01, 0.1, 1, 10, 0.01, 0.1, 1, 10])
        x = x + self.rare(x) if self.global_rank == 0 else x
        x = self.first(x) if self.global_rank == 0 or index else self.last(self.first(x))
        return torch.nn.functional.cross_entropy(self.last(x), batch[1] % 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

if __name__ == "__main__":
    for options in (dict(scorer="wanda"), dict(updater="reconstruct")):
        module = Skips()
        magnitude = top_k(module.rare.weight.detach().abs(), 32)
        callback = Sparsity(schedule=OneShot(final=0.5), allocation="uniform", report=False, **options)
        Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", logger=False,
                callbacks=[callback], enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False).fit(module, Batches(torch.randn(32, 8), torch.arange(32), 8))
        for param in callback.pruner.params:
            gathered = [torch.empty_like(param.weight) for _ in range(2)]
            torch.distributed.all_gather(gathered, param.weight.detach().contiguous())
            assert torch.equal(*gathered), param.name
        assert callback.sparsity == 0.5 and not torch.equal(module.rare.weight != 0, magnitude)
    sys.stdout.write("both agree\\n")
    torch.distributed.destroy_process_group()
"""


def test_a_layer_that_one_process_does_not_call(tmp_path: Path) -> None:
    """Two processes reduce over all layers in one order; the layer is judged by the process that calls it."""
    script = tmp_path / "skips.py"
    script.write_text(SKIPPED.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.count("both agree") == 2, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(("structure", "cycles", "threshold", "power"), [
    ("row", 50, 0.0, 1.0), ("unstructured", 50, 0.05, 1.0), ("row", 2, 0.0, 0.0),
])  # fmt: skip
def test_dsnot_exchanges_as_loops_do(structure: str, cycles: int, threshold: float, power: float) -> None:
    torch.manual_seed(1)
    layer, batches = nn.Linear(24, 16, bias=False).double(), [correlated(9, 24) + 0.5, correlated(4, 24) + 0.5]
    before, x = layer.weight.detach().clone(), torch.cat(batches)
    start = pruned(copy.deepcopy(layer), batches, 0.5, "wanda", structure, "prune")
    pruner = pruned(layer, batches, 0.5, "wanda", structure, DSnoT(cycles, threshold, power))
    first, mask = start.params[0].mask, pruner.params[0].mask
    for i in range(16):
        inputs = x.t().tolist()
        expected = exchanged(before[i].tolist(), inputs, first[i].tolist(), cycles, threshold, power)
        assert mask[i].tolist() == expected
    assert torch.equal(layer.weight, before * mask) and torch.equal(mask.sum(1), first.sum(1))
    error, at_first = ((before * ~m @ x.mean(0)).abs() for m in (mask, first))
    assert (
        int((mask != first).sum()) >= 8 and (error <= at_first + 1e-12).all() and error.mean() < 0.9 * at_first.mean()
    )


@pytest.mark.parametrize("name", ["conv", "groups"])
def test_dsnot_of_a_convolution_is_that_of_its_unfolded_inputs(name: str) -> None:
    make, shape = LAYERS[name]
    layer, batches = make().double(), [correlated(*shape) + 0.5]
    before = layer.weight.detach().clone()
    first = pruned(copy.deepcopy(layer), batches, 0.5, "wanda", "row", "prune").params[0].mask
    seen: list[torch.Tensor] = []
    Probe(layer, batches, lambda b: layer(b).sum()).activations(find(layer), lambda param, x: seen.append(x))
    mask = pruned(layer, batches, 0.5, "wanda", "row", DSnoT(threshold=0.0)).params[0].mask
    for i in range(len(before)):
        inputs = seen[0][i * len(seen[0]) // len(before)].flatten(1).t().tolist()
        expected = exchanged(before[i].flatten().tolist(), inputs, first[i].flatten().tolist(), 50, 0.0, 1.0)
        assert mask[i].flatten().tolist() == expected
    assert not torch.equal(mask, first)


def test_dsnot_refuses_patterns() -> None:
    with pytest.raises(ValueError, match="structure=2:4 does not allow: use structure=row or unstructured"):
        Pruner("wanda", "oneshot", "nm24", "uniform", "dsnot", sparsity=0.5)
