"""Whole experts and whole blocks: masked is removed, against loops."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from loops import loop
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse import Pruner, Sparsity
from pl_sparse.app import load_run
from pl_sparse.app.formats import refuse
from pl_sparse.app.settings import ConfigError
from pl_sparse.callbacks import Shrink
from pl_sparse.export import CSR, Compressed, TorchExport, load_shrunk, save_shrunk, shrink
from pl_sparse.network.blocks import residual_blocks
from pl_sparse.network.experts import expert_layers
from pl_sparse.network.probe import Probe
from pl_sparse.structure import Channel
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.models import resnet20, vit_tiny


class Mixture(nn.Module):
    """A mixture of experts in a list, as one writes it by hand."""

    def __init__(self, dim: int = 6, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 5), nn.ReLU(), nn.Linear(5, dim)) for _ in range(experts)
        )
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out = out.index_add(0, token, expert(tokens[token]) * weights[token, place].unsqueeze(1))
        return out.reshape(x.shape)


class Tokens(nn.Module):
    """Two mixtures between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.layers = nn.ModuleList([Mixture(), Mixture(experts=8)])
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def hugging_face(kind: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        sizes: dict[str, Any] = {
            "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
        } | more  # fmt: skip
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))

    return make


MIXTURES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "own": (Tokens, torch.randn(2, 5, 8)),
    "mixtral": (hugging_face("mixtral", num_local_experts=4), torch.randint(32, (2, 6))),
    "qwen2_moe": (
        hugging_face(
            "qwen2_moe",
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        torch.randint(32, (2, 6)),
    ),
    "qwen3_moe": (
        hugging_face("qwen3_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
        torch.randint(32, (2, 6)),
    ),
    "gpt_oss": (
        hugging_face("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        torch.randint(32, (2, 6)),
    ),
}


def out_of(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        out = model.eval()(x)
    return out if isinstance(out, Tensor) else out.logits


def pruned(
    net: nn.Module, x: Any, structure: Any, sparsity: float, allocation: str = "uniform", **where: Any
) -> Pruner:
    pruner = Pruner("magnitude", "oneshot", structure, allocation, sparsity=sparsity, **where)
    pruner.attach(net, x)
    pruner.prepare(1)
    return pruner


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_masked_are_those_that_are_not_there(name: str, tmp_path: Path) -> None:
    make, x = MIXTURES[name]
    torch.manual_seed(0)
    net = make()
    pruner = pruned(net, x, "expert", 0.5)
    layers = list(expert_layers(net))
    assert layers and len(pruner.groups) == len(layers)
    for layer in layers:
        scores = torch.zeros(layer.count)  # the mean |w| of an expert, before any of it was masked
        sizes = torch.zeros(layer.count)
        before = dict(make_same(make).named_parameters())
        for full, *_, parameter, unit in layer.tensors(net):
            if parameter.dim() == (2 if layer.parts else 3):
                for i in range(layer.count):
                    if unit in (None, i):
                        weight = before[full] if unit is not None else before[full][i]
                        scores[i] += weight.abs().sum().item()
                        sizes[i] += weight.numel()
        best = sorted(range(layer.count), key=lambda i: -float(scores[i] / sizes[i]))[: layer.count // 2]
        for full, *_, parameter, unit in layer.tensors(net):
            for i in range(layer.count):
                if unit in (None, i):
                    part = parameter if unit is not None else parameter[i]
                    assert bool(part.any()) == (i in best and bool(before[full].any())), (full, i)
        router = next(p for *_, p in layer.rows(net) if p.dim() == 2)
        assert router.any(1).nonzero().flatten().tolist() == sorted(best)

    masked = out_of(net, x)
    assert torch.equal(out_of(copy.deepcopy(net), x), masked)
    result = shrink(net, x)
    assert not result.left and result.after < result.before
    torch.testing.assert_close(out_of(net, x), masked, rtol=1e-4, atol=1e-6)
    assert [layer.count for layer in expert_layers(net)] == [layer.count // 2 for layer in layers]
    config = getattr(net, "config", None)
    if config is not None:
        counts = {vars(config).get(key) for key in ("num_experts", "num_local_experts")} - {None}
        assert counts == {layers[0].count // 2}
        again = type(net)(config)
        again.load_state_dict(net.state_dict())
        torch.testing.assert_close(out_of(again, x), masked, rtol=1e-4, atol=1e-6)
    save_shrunk(net, result.plan, tmp_path)
    fresh = make()
    load_shrunk(fresh, tmp_path)
    torch.testing.assert_close(out_of(fresh, x), masked, rtol=1e-4, atol=1e-6)


def make_same(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def test_what_cannot_be_done_to_experts_is_refused_by_name() -> None:
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"layers\.1\.experts must keep \d+: there is no network with fewer"):
        pruned(Tokens(), x, "expert", 0.8)
    with pytest.raises(ValueError, match="found no experts to prune in Sequential"):
        pruned(nn.Sequential(nn.Linear(8, 8)), x, "expert", 0.5)
    with pytest.raises(ValueError, match=r"leave layers\.0\.experts\.1\.0\.weight dense"):
        pruned(Tokens(), x, "expert", 0.5, exclude=["layers.0.experts.1.0"])

    net = Tokens()
    net.layers[0].gate = nn.Linear(6, 5)
    with pytest.raises(ValueError, match=r"layers\.0\.experts: no module beside its experts has a weight of 4 rows"):
        pruned(net, x, "expert", 0.5)
    net = Tokens()
    del net.layers[1].top_k
    net.layers[1].count = 2
    with pytest.raises(ValueError, match="how many experts its router chooses is not known"):
        pruned(net, x, "expert", 0.5)

    class Summed(Mixture):  # a router that knows its experts by more than their rows
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.gate(x).mean(-1, keepdim=True).clamp(-1, 1)

    net = Tokens()
    net.layers[0] = Summed()
    with pytest.raises(ValueError, match="other outputs than with them masked"):
        pruned(net, x, "expert", 0.5)


def test_experts_train_resume_and_keep_what_the_router_chooses() -> None:
    torch.manual_seed(0)
    net, x = Tokens(), torch.randn(16, 5, 8)
    pruner = Pruner("magnitude", "oneshot", "expert", "global", sparsity=0.5)
    pruner.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    loop(pruner, optimizer, lambda: (net(x) - 1).square().mean(), 4)
    for layer in expert_layers(net):
        router = next(p for *_, p in layer.rows(net) if p.dim() == 2)
        alive = router.any(1)
        assert int(alive.sum()) >= layer.chosen
        for *_, parameter, unit in layer.tensors(net):
            assert bool(parameter.any()) == bool(alive[unit])
    twin, other = Tokens(), Pruner("magnitude", "oneshot", "expert", "global", sparsity=0.5)
    twin.load_state_dict(net.state_dict(), strict=True)
    other.load_state_dict(pruner.state_dict())
    other.attach(twin)
    assert torch.equal(out_of(twin, x), out_of(net, x)) and other.kept == pruner.kept


def test_single_weights_within_experts() -> None:
    torch.manual_seed(0)
    net = hugging_face("mixtral", num_local_experts=4)()
    pruned(net, None, "row", 0.5, include=["*experts*"], layouts={"*experts*": "out_in"})
    for layer in net.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            kept = (weight != 0).sum(-1)  # (experts, out)
            assert kept.min() >= weight.shape[-1] // 2 and kept.max() <= weight.shape[-1] // 2 + 1
        assert bool(layer.mlp.gate.weight.all())


@pytest.mark.parametrize("name", ["own", "mixtral"])
def test_reap_against_a_loop_over_tokens(name: str) -> None:
    make, x = MIXTURES[name]
    torch.manual_seed(0)
    net = make().eval()
    pruner = Pruner("reap", "oneshot", "expert", "uniform", sparsity=0.5)
    pruner.attach(net)
    layer = next(iter(expert_layers(net)))
    seen: list[Tensor] = []
    hook = net.get_submodule(layer.path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    out_of(net, x)
    hook.remove()
    block: Any = net.get_submodule(layer.path)
    total, count = [0.0] * layer.count, [0] * layer.count
    with torch.no_grad():
        for token in seen[0].reshape(-1, seen[0].shape[-1]):
            gates = F.linear(token, block.gate.weight, getattr(block.gate, "bias", None)).softmax(-1)
            best = gates.topk(block.top_k)
            for gate, i in zip((best.values / best.values.sum()).tolist(), best.indices.tolist(), strict=True):
                if layer.parts:
                    out = block.experts[i](token)
                else:
                    a, b = F.linear(token, block.experts.gate_up_proj[i]).chunk(2)
                    out = F.linear(F.silu(a) * b, block.experts.down_proj[i])
                total[i] += gate * float(out.norm())
                count[i] += 1
    expected = [t / max(c, 1) for t, c in zip(total, count, strict=True)]
    pruner.prepare(2, probe=Probe(net, [x], lambda batch: out_of(net, batch).sum()))
    best = sorted(range(layer.count), key=lambda i: -expected[i])[: layer.count // 2]
    alive = next(p for *_, p in layer.rows(net) if p.dim() == 2).any(1)
    assert alive.nonzero().flatten().tolist() == sorted(best)


class Plain(nn.Module):
    """A block without a residual connection between two with one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=i != 1) for i in range(3)),
            nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU())),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "resnet20": (lambda: resnet20(shape=(1, 8, 8), classes=5, width=4), torch.randn(2, 1, 8, 8), 7),
    "vit": (lambda: vit_tiny(shape=(1, 8, 8), classes=5, dim=16, depth=4, heads=4), torch.randn(2, 1, 8, 8), 4),
    "torch": (Plain, torch.randn(2, 5, 8), 3),
    "llama": (hugging_face("llama", num_hidden_layers=4), torch.randint(32, (2, 6)), 4),
    "bert": (hugging_face("bert", num_hidden_layers=4, pad_token_id=None), torch.randint(32, (2, 6)), 4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_are_masked_are_those_that_are_not_there(name: str, tmp_path: Path) -> None:
    make, x, blocks = BLOCKS[name]
    torch.manual_seed(0)
    net = make()
    for module in net.modules():  # running statistics and shifts that are none of them zero
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    dense = copy.deepcopy(net)
    found = {block.path: block.module for block in residual_blocks(net, x) if block.reason is None}
    assert len(found) == blocks
    pruner = pruned(net, x, "layer", 0.5, "global")
    sizes = {path: sum(p.weight.numel() for p in pruner.params if p.name.startswith(path)) for path in found}
    scores = {
        path: sum(float(w.detach().abs().sum()) for w in dense.get_submodule(path).parameters() if w.dim() > 1)
        / sizes[path]
        for path in found
    }
    gone = [path for path, block in found.items() if not any(p.any() for p in block.parameters())]
    assert gone and max(scores[path] for path in gone) <= min(scores[path] for path in found if path not in gone)
    masked = out_of(net, x)
    for path in gone:  # the loop: blocks that hand on what they get
        dense.get_submodule(path).forward = lambda x, *args, **kwargs: x
    torch.testing.assert_close(out_of(dense, x), masked, rtol=1e-4, atol=1e-5)

    result = shrink(net, x)
    assert not result.left and result.after < result.before
    assert sum(len(places) for places in result.plan.lists.values()) == len(gone)
    torch.testing.assert_close(out_of(net, x), masked, rtol=1e-4, atol=1e-5)
    fresh = make()
    save_shrunk(net, result.plan, tmp_path)
    load_shrunk(fresh, tmp_path)
    torch.testing.assert_close(out_of(fresh, x), masked, rtol=1e-4, atol=1e-5)
    if config := getattr(net, "config", None):
        assert config.num_hidden_layers == blocks - len(gone)
        again = type(net)(config)
        again.load_state_dict(net.state_dict())
        torch.testing.assert_close(out_of(again, x), masked, rtol=1e-4, atol=1e-5)


def test_a_block_that_cannot_go_is_named_with_the_reason() -> None:
    net, x = resnet20(shape=(1, 8, 8), classes=5, width=4), torch.randn(2, 1, 8, 8)
    pruner = pruned(net, x, "layer", 0.5)
    assert "its output is 2x8x4x4, its input 2x4x8x8" in pruner.misfits["stage2.0.conv1.weight"]
    assert "its output is 2x4x8x8, its input 2x1x8x8" in pruner.misfits["conv1.weight"]
    vit = vit_tiny(shape=(1, 8, 8), classes=5, dim=16, depth=2, heads=4)
    assert "in no module of a ModuleList" in pruned(vit, x, "layer", 0.5).misfits["head.weight"]
    pruner = pruned(Plain(), torch.randn(2, 5, 8), "layer", 0.5, "global")
    assert "no residual connection" in pruner.misfits["body.3.0.0.weight"]
    with pytest.raises(ValueError, match=r"nothing to prune: .*no residual connection"):
        pruned(nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Tanh()), x.flatten(1)[:, :8], "layer", 0.5)


def test_a_block_whose_list_must_stay_is_passed_by() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Plain().body

        def forward(self, x: Tensor) -> Tensor:
            return self.body[2](self.body[1](self.body[0](x)))

    torch.manual_seed(0)
    net, x = Indexed(), torch.randn(2, 5, 8)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(x).sum().backward()
    optimizer.step()
    pruned(net, x, "layer", 0.4)
    masked = out_of(net, x)
    result = shrink(net, x, optimizers=[optimizer])
    assert len(result.plan.skipped) == 1 and not result.plan.lists
    torch.testing.assert_close(out_of(net, x), masked)
    left = {id(p) for p in net.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left
    assert {id(p) for p in optimizer.state} <= left


class Joined(nn.Module):
    """Blocks whose norm comes after the join, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(4))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


@pytest.mark.parametrize("structure", ["expert", "layer"])
def test_an_export_without_shrinking_computes_what_the_masked_network_does(structure: str, tmp_path: Path) -> None:
    """In a graph; weights alone, loaded into the class, do so once the structure has adapted it."""
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = Tokens if structure == "expert" else Joined
    net, x = make(), torch.randn(2, 5, 8)
    for norm in net.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
    pruner = pruned(net, x, structure, 0.5)
    expected = out_of(net, x)
    plain = make()
    plain.load_state_dict(net.state_dict())
    assert not torch.allclose(out_of(plain, x), expected, atol=1e-3)
    pruner.structure.adapt(plain)
    assert torch.allclose(out_of(plain, x), expected, atol=1e-6)
    if structure == "layer":  # where tokens go is not a graph
        TorchExport().write(net, x, tmp_path / "model.pt2")
        assert torch.allclose(TorchExport().open(tmp_path / "model.pt2", net)(x), expected, atol=1e-5)
    for kind, named in ((Compressed, "safetensors"), (CSR, "csr")):
        with pytest.raises(
            ConfigError, match=f"export={named} writes weights alone.* units of structure={structure} are masked"
        ):
            refuse({named: kind()}, Classifier(net, 3), None, pruner.structure, 0.5)


def test_a_run_that_is_loaded_computes_with_masked_units_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted: list[nn.Module] = []
    monkeypatch.setattr(Channel, "adapt", lambda self, model: adapted.append(model))
    module, *_ = load_run(Path(__file__).parent / "data" / "run_0.1.0" / "coupled")
    assert adapted == [module]


@pytest.mark.parametrize("structure", ["expert", "layer"])
def test_shrinking_in_training_refuses_whole_modules_before_it(structure: str) -> None:
    sparsity = Sparsity(structure=structure, sparsity=0.5, report=False)
    trainer = Trainer(accelerator="cpu", callbacks=[sparsity, Shrink()], logger=False, enable_checkpointing=False)
    with pytest.raises(
        ValueError, match=f"structure={structure} removes whole modules, which is possible after training"
    ):
        Shrink()._check(trainer)
