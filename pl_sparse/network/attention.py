"""The units of transformers: which rows and columns of which weights belong to an attention head, or to a neuron.

Layers are recognised by what they consist of, not by their class: three linear layers side by side that are named as
query, key and value, or one that holds all three; an output layer; and a number of heads. A feed-forward network is two
linear layers, the first perhaps with a gate, that are named as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from pl_sparse.core.layouts import Heads
from pl_sparse.core.parametrized import behind

__all__ = [
    "HEAD_COUNTS",
    "LOOKED_FOR",
    "Attention",
    "FeedForward",
    "Unknown",
    "attentions",
    "feed_forwards",
    "keeps_inputs_first",
]

_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_head", "k_head", "v_head"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
_STACKED = ("qkv", "in_proj", "c_attn", "Wqkv", "qkv_proj")
_INTERLEAVED = ("query_key_value",)
_OUTPUT = {
    *("out_proj", "o_proj", "proj", "projection", "dense", "c_proj", "out_lin", "to_out", "wo", "Wo", "o", "out"),
    *("fc_out", "linear_out", "post_proj"),
}
_COUNTS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "heads", "nhead")
HEAD_COUNTS = (*_COUNTS, "num_key_value_heads", "num_kv_heads", "n_kv_heads")
"""Names of the numbers of heads, those that queries share included."""
_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_head", "key_value_proj_dim", "d_kv")
_FEED_FORWARD = (
    (("intermediate.dense",), "output.dense"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("lin1",), "lin2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("linear1",), "linear2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
LOOKED_FOR = (
    "nn.MultiheadAttention, or modules that hold linear layers named like query, key and value "
    f"({'; '.join('/'.join(names) for names in _SEPARATE[:3])}; ...) or one for all three "
    f"({', '.join(_STACKED + _INTERLEAVED)}), an output layer (out_proj, o_proj, proj, dense, c_proj, out_lin, ...), "
    "and a number of heads (num_heads, num_attention_heads, head_dim, ... of the module or its config)"
)


@dataclass(frozen=True)
class Attention:
    """An attention layer whose heads are known.

    Attributes:
        name: its path in the model, or "attention" for the model itself.
        heads: how many can be removed on their own: with grouped queries, the key/value heads.
        weights: module and name of each of its weights, and how it is seen as (heads, weights of a head); the output
            projection comes last.
        path: its path in the model.
    """

    name: str
    heads: int
    weights: tuple[tuple[nn.Module, str, Heads], ...]
    path: str = ""

    def numbers(self, module: nn.Module, left: int, widths: bool) -> dict[str, dict[str, tuple[int, int]]]:
        """The attributes within the layer that say how many heads there are, or how wide they are together.

        Args:
            module: the attention layer's, or the one that holds its layers.
            left: how many heads are left.
            widths: whether attributes as large as the width count too; others may have that size by chance.

        Returns:
            For each module within it by its path, and each attribute, what it is, and what it is with the heads that
            are left.
        """
        width = _sizes(self.weights[-1][0])[1]
        weighted = {layer for layer, _, _ in self.weights}
        changes: dict[str, dict[str, tuple[int, int]]] = {}
        for path, part in module.named_modules():
            for key, value in vars(part).items() if part not in weighted else ():
                if type(value) is int and (key in HEAD_COUNTS or (widths and value == width)):
                    changes.setdefault(path, {})[key] = (value, value * left // self.heads)
        return changes


@dataclass(frozen=True)
class Unknown:
    """A module that looks like an attention layer, and why its heads are not known."""

    name: str
    weights: tuple[tuple[nn.Module, str], ...]
    reason: str


def attentions(model: nn.Module) -> Iterator[Attention | Unknown]:
    """The attention layers of a model, in its order.

    Sizes follow from the shapes and one number, of heads or of a head's dimension. Fewer key/value heads than query
    heads are grouped queries (Ainslie et al., GQA, 2023, arXiv:2305.13245): consecutive query heads share a
    key/value head and form one unit with it, as none of them could be removed without the others.

    Query, key and value in one layer are read as stacked one after the other, but `query_key_value` as head after head,
    as GPT-NeoX, BLOOM and Falcon have it, and `in_proj` beside biases of queries and values, as DeBERTa has it.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            yield _of_torch(path, module)
            continue
        children = {name: child for name, child in module.named_children() if _linear(child)}
        names: tuple[str, ...] | None = next((names for names in _SEPARATE if children.keys() >= set(names)), None)
        if names is None:
            names = next(((name,) for name in _STACKED + _INTERLEAVED if name in children), None)
        if names is not None:
            yield _read(path, module, modules, {name: children[name] for name in names})


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network: its path, and its weights, each seen as (neurons, weights of a neuron)."""

    name: str
    weights: tuple[tuple[nn.Module, str, Heads], ...]


def feed_forwards(model: nn.Module) -> Iterator[FeedForward]:
    """The feed-forward networks of a model: a neuron is a row of the first layer(s) and a column of the last."""
    modules = dict(model.named_modules())
    for path in modules:
        prefix = f"{path}." if path else ""
        for firsts, last in _FEED_FORWARD:
            candidates = [modules.get(prefix + name) for name in (*firsts, last)]
            layers = [layer for layer in candidates if layer is not None and _linear(layer)]
            if len(layers) < len(candidates):
                continue
            sizes = {_sizes(layer)[0] for layer in layers[:-1]} | {_sizes(layers[-1])[1]}
            if len(sizes) == 1:
                neurons = sizes.pop()
                columns = [keeps_inputs_first(layer) != (layer is layers[-1]) for layer in layers]
                layouts = [Heads(neurons, columns=each) for each in columns]
                names = ["weight"] * len(layers)
                yield FeedForward(path or "feed_forward", tuple(zip(layers, names, layouts, strict=True)))
                break


def _of_torch(path: str, module: nn.MultiheadAttention) -> Attention:
    """Torch's attention layer."""
    heads = module.num_heads
    if behind(module, "in_proj_weight") is not None:
        inputs = [("in_proj_weight", Heads(heads, parts=(1, 1, 1)))]
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        inputs = [(name, Heads(heads)) for name in names]
    output = (module.out_proj, "weight", Heads(heads, columns=True))
    weights = (*((module, name, layout) for name, layout in inputs), output)
    return Attention(path or "attention", heads, weights, path)


def _linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, GPT-2's included."""
    return isinstance(module, nn.Linear) or keeps_inputs_first(module)


def keeps_inputs_first(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's linear layer (transformers' Conv1D), whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    weight = behind(layer, "weight")
    assert weight is not None
    outputs, inputs = weight.shape
    return (inputs, outputs) if keeps_inputs_first(layer) else (outputs, inputs)


def _read(
    path: str, module: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module]
) -> Attention | Unknown:
    """The attention layer of a module with linear layers for query, key and value, one each or one for all."""
    name = path or "attention"
    parent = modules.get(path.rpartition(".")[0]) if path else None

    def unknown(reason: str) -> Unknown:
        return Unknown(name, tuple((layer, "weight") for layer in inputs.values()), reason)

    owners = [module, getattr(module, "config", None), parent, getattr(parent, "config", None)]
    numbers = next((pair for owner in owners if (pair := _count_and_size(owner)) is not None), None)
    if numbers is None:
        return unknown(f"neither it nor its config has a number of heads ({', '.join(_COUNTS + _SIZES)})")
    count, size = numbers
    rows = [_sizes(layer)[0] for layer in inputs.values()]
    outputs = _outputs(module, list(inputs.values())) or _outputs(parent, list(module.modules()))
    if len(rows) == 3:
        size = size or max(rows[0] // count, 1)
        heads, shared = rows[0] // size, rows[1] // size
        fits = rows[0] == heads * size and rows[1] == shared * size > 0 and rows[2] % shared == heads % shared == 0
        width = heads * (rows[2] // shared) if fits else 0
        parts: tuple[int, ...] = (1,)
    else:
        if not size:  # the inputs of the output layer are the heads' outputs
            size = next((inner // count for inner in (_sizes(layer)[1] for layer in outputs) if inner % count == 0), 0)
        count = count or next((inner // size for inner in (_sizes(layer)[1] for layer in outputs)), 0)
        heads, shared = count, (rows[0] // size - count) // 2 if size else 0
        fits = shared > 0 and (heads + 2 * shared) * size == rows[0] and heads % shared == 0
        width = heads * size
        biased = all(isinstance(getattr(module, name, None), nn.Parameter) for name in ("q_bias", "v_bias"))
        by_head = inputs.keys() & set(_INTERLEAVED) or ("in_proj" in inputs and biased)
        parts = (heads // shared, 1, 1) if fits and not by_head else (1,)
    if not fits:
        return unknown(
            f"{' + '.join(map(str, rows))} rows of {', '.join(inputs)} are not made of whole heads of {size}"
        )
    outputs = [layer for layer in outputs if _sizes(layer)[1] == width]
    if len(outputs) != 1:
        number = "more than one layer" if outputs else "no layer"
        return unknown(
            f"it has {number} with {width} inputs that is named like an output ({', '.join(sorted(_OUTPUT))})"
        )
    layers = [(layer, parts, keeps_inputs_first(layer)) for layer in inputs.values()]
    layers.append((outputs[0], (1,), not keeps_inputs_first(outputs[0])))
    return Attention(
        name,
        shared,
        tuple((layer, "weight", Heads(shared, parts=p, columns=c)) for layer, p, c in layers),
        path,
    )


def _count_and_size(owner: object) -> tuple[int, int] | None:
    """The number of heads and the dimension of a head by an owner's attributes, 0 for the one that it lacks; None if
    it lacks both."""
    numbers = []
    for names in (_COUNTS, _SIZES):
        values = (getattr(owner, name, None) for name in names)
        numbers.append(next((value for value in values if isinstance(value, int) and value > 0), 0))
    return (numbers[0], numbers[1]) if any(numbers) else None


def _outputs(owner: nn.Module | None, others: list[nn.Module]) -> list[nn.Module]:
    """The linear layers within `owner`, but for `others`, that are named like an output."""
    named = owner.named_modules() if owner is not None else ()
    return [
        layer
        for name, layer in named
        if _linear(layer)
        and all(layer is not other for other in others)
        and (_OUTPUT & set(name.split(".")) or name.rpartition(".")[2] == "output")
    ]
