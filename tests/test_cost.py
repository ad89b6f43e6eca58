from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pl_sparse.network.macs import MacCounter, macs


def positions(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    with MacCounter(model) as counter, torch.no_grad():
        model(*inputs)
    return counter.positions


def test_linear_counts_leading_dimensions() -> None:
    assert positions(nn.Linear(8, 4), torch.zeros(5, 3, 8)) == {"weight": 15}
    assert positions(nn.Linear(8, 4), torch.zeros(8)) == {"weight": 1}


def test_convolution_with_stride_padding_and_groups() -> None:
    model = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    with MacCounter(model) as counter:
        model(torch.zeros(2, 4, 9, 8))
    assert counter.positions == {"weight": 2 * 5 * 4}
    # 6 maps of 5x4 outputs, each from 2 of the 4 channels through 3x3
    assert macs(model, counter, batch_size=2).dense == 6 * 5 * 4 * 2 * 9
    assert positions(nn.Conv1d(2, 3, 3), torch.zeros(2, 10)) == {"weight": 8}  # unbatched


def test_transposed_convolution_counts_inputs() -> None:
    model = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    with MacCounter(model) as counter:
        model(torch.zeros(2, 4, 5, 7))
    assert counter.positions == {"weight": 2 * 5 * 7}
    assert macs(model, counter, batch_size=2).dense == 5 * 7 * 4 * 3 * 9


class Product(nn.Module):
    """A weight of two factors."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(outputs, 2))

    def forward(self, right: Tensor) -> Tensor:
        return self.left @ right


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_computed_counts() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2))
    old = nn.utils.weight_norm(nn.Linear(6, 5))  # type: ignore[no-untyped-call]
    low = nn.Linear(5, 7)
    low.weight = nn.Parameter(torch.randn(2, 5))
    nn.utils.parametrize.register_parametrization(low, "weight", Product(7, 5), unsafe=True)
    model = nn.Sequential(normed, nn.Flatten(0, 1), nn.LazyLinear(6), old, low)
    model(torch.zeros(1, 4, 12))
    with MacCounter(model) as counter, torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(torch.zeros(1, 4, 12))
    positions = {"0.parametrizations.weight.original1": 10, "2.weight": 6, "3.weight_v": 6}
    assert counter.positions == positions and counter.other == 6 * 7 * 5
    assert macs(model, counter).dense == flops.get_total_flops() / 2 - 7 * 2 * 5  # of the factors


@pytest.mark.parametrize("batch_first", [True, False])
def test_lstm_counts_every_step(batch_first: bool) -> None:
    model = nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=batch_first)
    counts = positions(model, torch.zeros(3, 11, 5))
    assert set(counts) == {name for name, _ in model.named_parameters() if "weight" in name}
    assert set(counts.values()) == {33}


def test_packed_sequence_counts_real_steps() -> None:
    model = nn.GRU(5, 7)
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(4, 2, 5), torch.tensor([4, 1]))
    with MacCounter(model) as counter:
        model(packed)
    assert counter.positions == {"weight_ih_l0": 5, "weight_hh_l0": 5}


def test_cell() -> None:
    assert positions(nn.LSTMCell(5, 7), torch.zeros(3, 5)) == {"weight_ih": 3, "weight_hh": 3}


@pytest.mark.parametrize("training", [True, False])
def test_attention(training: bool) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    query, key = torch.zeros(3, 5, 8), torch.zeros(3, 7, 8)
    with MacCounter(model) as counter, torch.no_grad():
        model(query, key=key, value=key)
    assert counter.positions == {"in_proj_weight": (15 + 21 + 21) / 3, "out_proj.weight": 15}
    assert counter.other == 2 * 3 * 5 * 7 * 8
    expected = 15 * 64 + 2 * 21 * 64 + 15 * 64 + 2 * 3 * 5 * 7 * 8
    assert macs(model, counter).dense == pytest.approx(expected)


def test_attention_with_other_widths() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    counts = positions(model, torch.zeros(5, 3, 8), torch.zeros(7, 3, 4), torch.zeros(7, 3, 6))
    assert counts == {"q_proj_weight": 15, "k_proj_weight": 21, "v_proj_weight": 21, "out_proj.weight": 15}


def test_encoder_layer_in_eval() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    with MacCounter(model) as counter, torch.no_grad():
        model(torch.zeros(3, 5, 8), src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))
    assert torch.backends.mha.get_fastpath_enabled() is before
    assert len(counter.positions) == 8 and set(counter.positions.values()) == {15}
    a_layer = 15 * (3 * 64 + 64 + 2 * 8 * 16) + 2 * 3 * 5 * 5 * 8
    assert macs(model, counter, batch_size=3).dense == pytest.approx(2 * a_layer / 3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


def test_tied_weight_and_its_mask() -> None:
    model = Tied()
    tokens = torch.zeros(2, 3, dtype=torch.long)
    assert positions(model.embedding, tokens) == {"weight": 0}
    with MacCounter(model) as counter:
        model(tokens)
    assert counter.positions == {"embedding.weight": 6}
    mask = torch.zeros(10, 4)
    mask[0] = 1
    for name in ("embedding.weight", "head.weight"):
        assert macs(model, counter, {name: mask}, batch_size=2).sparse == 3 * 4


class Conv1D(nn.Module):
    """The layer of that name in transformers: a Linear whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_conv1d_of_transformers() -> None:
    assert positions(Conv1D(6, 4), torch.zeros(2, 3, 4)) == {"weight": 6}


def test_calls_add_up_and_hooks_go() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert positions(model, torch.zeros(2, 4)) == {"0.weight": 4}
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError), MacCounter(model) as counter:
        model(torch.zeros(2, 5))
    model(torch.zeros(2, 4))
    assert counter.positions == {}
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_masks() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with MacCounter(model) as counter:
        model(torch.zeros(5, 8))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, :3] = True
    result = macs(model, counter, {"0.weight": mask}, batch_size=5)
    assert result.layers == {"0.weight": (32, 3), "1.weight": (8, 8)}
    assert (result.dense, result.sparse) == (40, 11)


def test_wrong_masks_are_refused() -> None:
    model = nn.Linear(8, 4)
    counter = MacCounter(model)
    with pytest.raises(ValueError, match="names no parameter"):
        macs(model, counter, {"nothing": torch.ones(1)})
    with pytest.raises(ValueError, match="shape"):
        macs(model, counter, {"weight": torch.ones(8, 4)})
    with pytest.raises(ValueError, match="batch_size"):
        macs(model, counter, batch_size=0)


def test_counters_that_overlap_give_the_fused_path_back() -> None:
    model = torch.nn.Linear(2, 2)
    first, second = MacCounter(model), MacCounter(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


class Products(nn.Module):
    """Attention by hand, by torch's function and by einsum, and a product with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(12, 6))
        self.experts = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)
        x = x + nn.functional.scaled_dot_product_attention(q, k, value=v)
        x = x + torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)
        x = x.transpose(1, 2).flatten(2) @ self.weight
        return x[:, :2] @ self.experts[0]


def test_all_that_flop_counter_mode_counts_is_counted_within_calls_alone() -> None:
    net, x = Products(), torch.randn(2, 5, 12)
    with FlopCounterMode(display=False) as flops, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(x)
    with MacCounter(net) as counter, torch.no_grad():
        (net(x) @ torch.ones(6, 50)).sum()  # a loss is not part of the network
    assert macs(net, counter).dense == flops.get_total_flops() / 2
    assert counter.other == 3 * 2 * (2 * 3 * 5 * 5 * 4)
    assert counter.positions["weight"] == 2 * 5 and counter.positions["experts"] == 2 * 2 / 2
    failing = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
    with MacCounter(failing) as counter, pytest.raises(RuntimeError):
        failing(torch.ones(2, 2))
    _ = torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.other == 0
