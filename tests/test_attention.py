"""Heads of attention layers, against models whose heads are silenced by a hook."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse import Pruner
from pl_sparse.core.group import Group
from pl_sparse.core.targets import find
from pl_sparse.export import (
    load_shrunk,
    save_shrunk,
    shrink,
)
from pl_sparse.network.attention import Attention, Unknown, attentions, feed_forwards
from pl_sparse.schedule import OneShot
from pl_sparse.scorer import Movement, Taylor
from pl_sparse.structure import Head
from pl_sparse.surgery.trial import changed_by
from pl_sparse.tasks.models import vit_tiny

# transformers imports torchao where it is installed, which has such strings in its source.
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence")

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


class Fused(nn.Module):
    """A block as in timm: one layer for query, key and value; with `shared` key/value heads."""

    def __init__(self, shared: int = 4, interleaved: bool = False, last: str = "proj") -> None:
        super().__init__()
        self.num_heads, self.shared, self.interleaved, self.last = 4, shared, interleaved, last
        layer = nn.Linear(16, 16 + 8 * shared)
        self.add_module("query_key_value" if interleaved else "qkv", layer)
        self.add_module(last, nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        if self.interleaved:
            each = self.query_key_value(x).reshape(batch, length, 4, 3, 4).transpose(1, 2)
            q, k, v = each[..., 0, :], each[..., 1, :], each[..., 2, :]
        else:
            parts = self.qkv(x).split([16, 4 * self.shared, 4 * self.shared], dim=-1)
            q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)
            k, v = (part.repeat_interleave(4 // self.shared, dim=1) for part in (k, v))
        return self.get_submodule(self.last)(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def tokens() -> torch.Tensor:
    return torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))


def hugging(name: str, family: str | None = None, /, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{family or name}Config")(**config)
    return getattr(transformers, f"{name}Model")(made)


def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    out = model(inputs)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


# how a model is made, an input, the layers that take the heads' outputs, heads that can be removed, their width
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], str, int, int]] = {
    "BERT": (lambda: hugging("Bert", vocab_size=20, **SMALL), tokens, "attention.output.dense", 4, 4),
    "RoBERTa": (lambda: hugging("Roberta", vocab_size=20, **SMALL), tokens, "attention.output.dense", 4, 4),
    "DistilBERT": (
        lambda: hugging("DistilBert", vocab_size=20, dim=16, hidden_dim=24, n_layers=2, n_heads=4),
        tokens,
        "out_lin",
        4,
        4,
    ),
    "ViT": (
        lambda: hugging("ViT", image_size=8, patch_size=4, **SMALL),
        lambda: torch.randn(2, 3, 8, 8),
        "attention.o_proj",
        4,
        4,
    ),
    "GPT-2": (
        lambda: hugging("GPT2", vocab_size=20, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
        tokens,
        "attn.c_proj",
        4,
        4,
    ),
    "Llama": (
        lambda: hugging("Llama", vocab_size=20, num_key_value_heads=2, pad_token_id=0, **SMALL),
        tokens,
        "o_proj",
        2,
        8,
    ),
    "Mistral": (
        lambda: hugging("Mistral", vocab_size=20, num_key_value_heads=2, pad_token_id=0, **SMALL),
        tokens,
        "o_proj",
        2,
        8,
    ),
    "Qwen3, heads wider than the model": (
        lambda: hugging("Qwen3", vocab_size=20, num_key_value_heads=2, head_dim=6, pad_token_id=0, **SMALL),
        tokens,
        "o_proj",
        2,
        12,
    ),
    "Phi-3, fused and grouped": (
        lambda: hugging("Phi3", vocab_size=20, num_key_value_heads=2, pad_token_id=0, eos_token_id=0, **SMALL),
        tokens,
        "o_proj",
        2,
        8,
    ),
    "GPT-NeoX": (
        lambda: hugging("GPTNeoX", vocab_size=20, bos_token_id=0, eos_token_id=0, **SMALL),
        tokens,
        "attention.dense",
        4,
        4,
    ),
    "T5": (
        lambda: hugging("T5Encoder", "T5", vocab_size=20, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4),
        tokens,
        "SelfAttention.o",
        4,
        6,
    ),
    "DeBERTa, fused by head": (
        lambda: hugging("Deberta", vocab_size=20, relative_attention=True, pos_att_type=["c2p", "p2c"], **SMALL),
        tokens,
        "attention.output.dense",
        4,
        4,
    ),
    "fused": (Fused, lambda: torch.randn(2, 5, 16), "proj", 4, 4),
    "fused, as in ModernBERT": (lambda: Fused(last="Wo"), lambda: torch.randn(2, 5, 16), "Wo", 4, 4),
    "fused, as in BLIP": (lambda: Fused(last="projection"), lambda: torch.randn(2, 5, 16), "projection", 4, 4),
    "fused and grouped": (lambda: Fused(2), lambda: torch.randn(2, 5, 16), "proj", 2, 8),
    "fused, head after head": (lambda: Fused(interleaved=True), lambda: torch.randn(2, 5, 16), "proj", 4, 4),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_pruned_head_adds_nothing(case: str) -> None:
    make, inputs, last, heads, width = CASES[case]
    model = make().eval()
    for name, value in model.named_parameters():  # biases that a head could leak
        if name.endswith("bias"):
            value.normal_()
    x = inputs()
    dense = output(model, x)
    outputs = [layer for name, layer in model.named_modules() if name.endswith(last)]
    groups = Head().groups(find(model), model)
    assert len(groups) == len(outputs) == (1 if isinstance(model, Fused) else 2)
    chosen = [torch.arange(heads) % 2 == index for index in range(len(outputs))]

    def silence(kept: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
        return lambda module, args: (args[0] * kept.repeat_interleave(width),)

    handles = [layer.register_forward_pre_hook(silence(kept)) for layer, kept in zip(outputs, chosen, strict=True)]
    expected = output(model, x)
    for handle in handles:
        handle.remove()
    for group, kept in zip(groups, chosen, strict=True):
        prune(group, kept)
    pruned = output(model, x)
    assert not torch.allclose(pruned, dense, atol=1e-3)
    torch.testing.assert_close(pruned, expected, atol=1e-5, rtol=1e-5)


def prune(group: Group, kept: torch.Tensor) -> None:
    removed = 0
    for param, layout in group.members:
        shape = layout.view(param.weight).shape
        assert shape[0] == len(kept)
        mask = layout.restore(Head().expand(kept, shape), param.shape)
        removed += int((~mask).sum())
        param.weight.mul_(mask)
    assert removed == group.numel * int((~kept).sum()) // len(kept)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}])
def test_heads_of_multihead_attention_against_loops(sizes: dict[str, int]) -> None:
    layer = nn.MultiheadAttention(8, 4, batch_first=True, **sizes).double()
    layer.in_proj_bias.normal_()
    x, key, value = (torch.randn(5, size).double() for size in (8, sizes.get("kdim", 8), sizes.get("vdim", 8)))
    weights = (
        [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight] if sizes else layer.in_proj_weight.chunk(3)
    )
    (q, k, v) = (t @ w.t() + b for t, w, b in zip((x, key, value), weights, layer.in_proj_bias.chunk(3), strict=True))
    expected = layer.out_proj.bias.repeat(5, 1)
    for head in (0, 3):
        run = slice(2 * head, 2 * head + 2)
        expected += torch.softmax(q[:, run] @ k[:, run].t() / 2**0.5, 1) @ v[:, run] @ layer.out_proj.weight[:, run].t()
    (group,) = Head().groups(find(layer), layer)
    assert group.numel == sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    prune(group, torch.tensor([True, False, False, True]))
    torch.testing.assert_close(layer(x, key, value)[0], expected)


def test_each_layer_keeps_a_head_unless_asked() -> None:
    def heads(empty: bool, sparsity: float, allocation: str = "global") -> list[int]:
        torch.manual_seed(0)
        model = vit_tiny(shape=(1, 8, 8), classes=5, dim=16, depth=3, heads=4)
        with torch.no_grad():
            model.get_parameter("blocks.1.self_attn.in_proj_weight").mul_(1e-3)
        pruner = Pruner("magnitude", OneShot(final=sparsity), Head(empty=empty), allocation)
        pruner.attach(model)
        pruner.prepare(1)
        return [int(kept.sum()) for kept in (group.members[1][0].mask[0].view(4, 4).any(1) for group in pruner.groups)]

    assert heads(True, 0.5)[1] == 0 and sum(heads(True, 0.5)) == 6
    assert heads(False, 0.5)[1] == 1 and sum(heads(False, 0.5)) == 6
    assert heads(False, 0.9) == heads(False, 0.9, "uniform") == [1, 1, 1]  # denser than asked for
    assert sum(heads(True, 0.9)) == 1 and heads(False, 1.0) == [0, 0, 0]


def test_taylor_bounds_the_gradient_of_a_gate() -> None:
    layer = Fused()
    x = torch.randn(2, 5, 16)
    gate = torch.ones(4, requires_grad=True)
    handle = layer.proj.register_forward_pre_hook(lambda m, args: (args[0] * gate.repeat_interleave(4),))
    layer(x).square().sum().backward()
    handle.remove()
    product = (layer.proj.weight * layer.proj.weight.grad).detach()
    torch.testing.assert_close(product.view(16, 4, 4).sum((0, 2)), gate.grad)
    (group,) = Head().groups(find(layer), layer)
    (param, layout) = group.members[1]
    scorer = Taylor(decay=0)
    scorer.observe(param)
    assert bool((Head().pool(layout.view(scorer.score(param))) * 64 >= gate.grad.abs() - 1e-5).all())


class Wrong(nn.Module):
    def __init__(self, **given: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.o_proj = nn.Linear(16, 16)
        vars(self).update(given)


def test_what_is_not_understood_is_named() -> None:
    (found,) = attentions(Wrong(n_heads=8))
    assert isinstance(found, Attention) and found.heads == 8
    for layer, reason in (
        (Wrong(), "number of heads"),
        (Wrong(num_heads=5), "not made of whole heads"),
        (Wrong(head_dim=6), "not made of whole heads"),
    ):
        (found,) = attentions(layer)
        assert isinstance(found, Unknown) and reason in found.reason
    for outputs, reason in ((nn.Linear(8, 16), "no layer"), (nn.ModuleList([nn.Linear(16, 16)] * 2), None)):
        layer = Wrong(num_heads=4)
        layer.o_proj = outputs  # type: ignore[assignment]
        (found,) = attentions(layer)
        assert isinstance(found, Attention) if reason is None else reason in found.reason  # type: ignore[union-attr]
    layer = Wrong(num_heads=4)
    layer.proj = nn.Linear(16, 16)
    (found,) = attentions(layer)
    assert isinstance(found, Unknown) and "more than one layer" in found.reason
    model = nn.ModuleDict({"first": Wrong(num_heads=4), "second": Wrong()})
    with pytest.raises(ValueError, match=r"cannot find the heads of second: .*exclude=\['second'\]"):
        Head().groups(find(model), model)
    assert [g.name for g in Head().groups(find(model, exclude=["second"]), model)] == ["first"]
    with pytest.raises(ValueError, match="1 of the 4 weights of first dense"):
        Head().groups(find(model, exclude=["second", "o_proj"]), model)
    with pytest.raises(ValueError, match=r"no attention layer to prune in Linear\. It looks for nn\.M.*query/key"):
        Head().groups(find(nn.Linear(2, 2)), nn.Linear(2, 2))


NETWORKS = {  # the layer that takes a feed-forward network's neurons
    "BERT": "0.output.dense",
    "DistilBERT": "lin2",
    "ViT": "fc2",
    "GPT-2": "mlp.c_proj",
    "Llama": "down_proj",
    "GPT-NeoX": "dense_4h_to_h",
}


@torch.no_grad()
@pytest.mark.parametrize("case", NETWORKS)
def test_a_pruned_neuron_adds_nothing(case: str) -> None:
    make, inputs, *_ = CASES[case]
    model = make().eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.normal_()
    x = inputs()
    dense = output(model, x)
    network, *_ = feed_forwards(model)
    *_, (last, _, _) = network.weights
    assert next(n for n, m in model.named_modules() if m is last).endswith(NETWORKS[case])
    neurons = network.weights[0][2].heads
    kept = torch.arange(neurons) % 3 > 0
    handle = last.register_forward_pre_hook(lambda module, args: (args[0] * kept,))
    expected = output(model, x)
    handle.remove()
    params = {id(param.weight): param for param in find(model)}
    prune(Group(network.name, tuple((params[id(m.weight)], layout) for m, _, layout in network.weights)), kept)
    pruned = output(model, x)
    assert not torch.allclose(pruned, dense, atol=1e-3)
    torch.testing.assert_close(pruned, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["BERT", "GPT-2", "Llama", "fused"])
def test_block_movement_against_loops(case: str) -> None:
    make, inputs, *_ = CASES[case]
    model = make().train()
    pruner = Pruner(Movement(rule="sum"), OneShot(final=0.5, begin="3 steps"), "hybrid8x4", "uniform")
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    scores = {param.name: torch.zeros(param.shape) for param in pruner.params}
    for step in range(4):
        optimizer.zero_grad()
        output(model, inputs()).square().sum().backward()
        for param in pruner.params:
            scores[param.name] -= param.weight.grad * param.weight.detach()
        pruner.before_step(step, 4, optimizer)
        if step < 3:
            optimizer.step()
        pruner.after_step()

    found, expected = [], []
    for group in pruner.groups:
        units: dict[tuple[int, ...], list[tuple[str, int, int]]] = {}
        for param, _ in group.members:
            gpt = type(param.module).__name__ == "Conv1D"
            last = any(word in param.name for word in ("attention.output", "attn.c_proj", "o_proj", "proj.weight"))
            last &= "qkv" not in param.name and not any(w in param.name for w in ("q_proj", "k_proj", "v_proj"))
            into = len(group.members) > 1 and param is group.members[-1][0]
            for row, column in itertools.product(range(param.shape[0]), range(param.shape[1])):
                out, inner = (column, row) if gpt else (row, column)
                if len(group.members) > 1:
                    unit: tuple[int, ...] = (inner if into else out,)
                else:
                    unit = (out // 4, inner // 8) if last else (out // 8, inner // 4)
                units.setdefault(unit, []).append((param.name, row, column))
        masks = {param.name: param.mask for param, _ in group.members}
        mean = {u: sum(float(scores[n][r, c]) for n, r, c in where) / len(where) for u, where in units.items()}
        kept = {u for u, where in units.items() if all(bool(masks[n][r, c]) for n, r, c in where)}
        assert all(u in kept or not any(bool(masks[n][r, c]) for n, r, c in where) for u, where in units.items())
        assert len(kept) == len(units) // 2
        best = set(sorted(units, key=lambda u: -mean[u])[: len(kept)])
        found.append(kept)
        expected.append(best)
    assert found == expected
    assert len(found) == {"BERT": 10, "GPT-2": 6, "Llama": 10, "fused": 2}[case]


def test_hybrid_needs_transformers_and_whole_blocks() -> None:
    with pytest.raises(ValueError, match="neither attention nor feed-forward layers to prune in Linear"):
        Pruner("magnitude", "oneshot", "hybrid", sparsity=0.5).attach(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"qkv.weight of shape 48x16 is not made of blocks of 5x4: .*exclude"):
        Pruner("magnitude", "oneshot", "hybrid5x4", sparsity=0.5).attach(Fused())


class Cut(nn.Module):
    """Grouped attention whose queries are the first rows of one layer, at places that are written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).tensor_split((8, 12), -1)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_a_trial_never_computes_attention_without_heads() -> None:
    """A torch before 2.13 divides by their number: the process ended, without an error."""

    def fewer(model: nn.Module) -> None:
        model.get_submodule("qkv").weight = nn.Parameter(torch.randn(8, 8))
        model.get_submodule("qkv").bias = nn.Parameter(torch.randn(8))

    errors: list[Exception] = []
    assert changed_by(Cut(), torch.randn(2, 3, 8), fewer, errors) == float("inf")
    assert [str(error) for error in errors] == ["attention gets a tensor of shape (2, 0, 3, 2)"]


REMOVABLE = ("BERT", "RoBERTa", "DistilBERT", "ViT", "Llama", "Mistral", "Qwen3, heads wider than the model", "T5")
NOT_REMOVABLE = ("Phi-3, fused and grouped", "fused")  # sizes written into the code


@pytest.mark.parametrize("case", REMOVABLE + NOT_REMOVABLE)
def test_silent_heads_are_removed_where_the_code_allows_it_and_named_where_not(case: str, tmp_path: Path) -> None:
    make, inputs, *_ = CASES[case]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    layers = [each for each in attentions(model) if isinstance(each, Attention)]
    gone = 0
    with torch.no_grad():
        for layer in layers:
            module, name, layout = layer.weights[-1]
            weight = module.get_parameter(name)
            view = layout.view(weight.clone())
            view[1] = 0
            weight.copy_(layout.restore(view, weight.shape))
            biases = [getattr(each, "bias", None) for each, _, _ in layer.weights[:-1]]
            gone += sum(each.get_parameter(key).numel() // layer.heads for each, key, _ in layer.weights)
            gone += sum(bias.numel() // layer.heads for bias in biases if bias is not None)
            if case == "T5":  # biases by relative position, which all layers take from the first
                part = model.get_submodule(layer.path)
                gone += sum(each.num_embeddings for each in part.modules() if isinstance(each, nn.Embedding))
        masked = output(model, x)
        result = shrink(model, x)
        assert torch.allclose(output(model, x), masked, rtol=0, atol=1e-5)
        if case in NOT_REMOVABLE:
            assert set(result.left) == {layer.path for layer in layers} and result.before == result.after
            return
        assert not result.left and result.before - result.after == gone
        save_shrunk(model, result.plan, tmp_path)
        fresh = make().eval()
        load_shrunk(fresh, tmp_path)
        assert torch.equal(output(fresh, x), output(model, x))
        result.plan.undo(model)
        assert torch.allclose(output(model, x), masked, rtol=0, atol=1e-5)


class Sinks(nn.Module):
    """Query heads in groups, each with a score beside those of the keys, as in GPT-OSS."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12)
        self.o_proj, self.sinks = nn.Linear(24, 16), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        sinks = self.sinks.view(1, -1, 1, 1).expand(len(x), -1, x.shape[1], 1)
        scores = torch.cat([q @ k.transpose(-2, -1) / 2, sinks], -1).softmax(-1)[..., :-1]
        return self.o_proj((scores @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_table_of_query_heads_leaves_with_the_groups() -> None:
    torch.manual_seed(0)
    net, x = Sinks().eval(), torch.randn(2, 5, 16)
    (group,) = Head().groups(find(net), net)
    prune(group, torch.tensor([True, False, True]))
    before, kept = net(x), net.sinks[[0, 1, 4, 5]].clone()
    result = shrink(net, x)
    assert not result.left and net.q_proj.out_features == 16 and torch.equal(net.sinks, kept)
    torch.testing.assert_close(net(x), before)
