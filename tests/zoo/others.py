"""Graphs, tables, forecasting, complex numbers, and LightningModules that train themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.entry import Case, entry


def graph() -> dict[str, Tensor]:
    edges = torch.randint(20, (2, 60))
    return {"x": torch.randn(20, 16), "edge_index": torch.cat([edges, edges.flip(0)], 1)}


@entry("GCN", "torch-geometric")
def gcn() -> Case:
    from torch_geometric.nn import GCN

    return Case(GCN(16, 32, 2, 4, dropout=0.2), graph)


@entry("GAT", "torch-geometric")
def gat() -> Case:
    from torch_geometric.nn import GAT

    return Case(GAT(16, 32, 2, 4, heads=4, v2=True), graph)


@entry("GraphSAGE", "torch-geometric")
def sage() -> Case:
    from torch_geometric.nn import GraphSAGE

    return Case(GraphSAGE(16, 32, 2, 4), graph)


@entry("relational GCN", "torch-geometric", layouts={"weight": "in_out"})
def rgcn() -> Case:
    from torch_geometric.nn import FastRGCNConv, Sequential

    module = Sequential(
        "x, edge_index, edge_type",
        [
            (FastRGCNConv(16, 32, 3), "x, edge_index, edge_type -> x"),
            nn.ReLU(),
            (FastRGCNConv(32, 4, 3, num_bases=2), "x, edge_index, edge_type -> x"),
        ],
    )
    return Case(module, lambda: {**graph(), "edge_type": torch.randint(3, (120,))})


@entry("SchNet", "torch-geometric")
def schnet() -> Case:
    from torch_geometric.nn import SchNet

    def draw() -> dict[str, Tensor]:
        return {"z": torch.randint(1, 10, (12,)), "pos": torch.randn(12, 3), "batch": torch.arange(12) // 6}

    def connect(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ((batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().T
        return torch.stack([left, right]), (pos[left] - pos[right]).norm(dim=-1)

    module = SchNet(32, 32, 2, 16, interaction_graph=connect)
    return Case(module, draw)


@entry("FT-Transformer", "rtdl_revisiting_models")
def ft_transformer() -> Case:
    from rtdl_revisiting_models import FTTransformer

    sizes = FTTransformer.get_default_kwargs(n_blocks=1) | {"d_block": 32, "linformer_kv_compression_ratio": None}
    sizes = {key: value for key, value in sizes.items() if not key.startswith("linformer")}
    module = FTTransformer(n_cont_features=6, cat_cardinalities=[3, 5], d_out=2, **sizes)
    return Case(module, lambda: (torch.randn(8, 6), torch.randint(3, (8, 2))))


@entry("TabM, an ensemble in one", "tabm")
def tabm() -> Case:
    from tabm import TabM

    module = TabM.make(n_num_features=6, cat_cardinalities=[3], d_out=2, k=4, d_block=32, n_blocks=2)
    return Case(module, lambda: (torch.randn(8, 6), torch.randint(3, (8, 1))))


@entry("Linear layers in torchao's int8", "torchao", left_out=["cannot be set to zero"], structure="row", sparsity=0.75)
def torchao_int8() -> Case:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU()).requires_grad_(False)
    quantize_(backbone, Int8WeightOnlyConfig(version=2))
    why = "no: Lightning's map_location is a function, which tensors of torchao do not load with"
    return Case(nn.Sequential(backbone, nn.Linear(32, 16)), lambda: torch.randn(8, 16), unresumed=why)


def windows(module: Any) -> dict[str, Tensor | None]:
    """A batch of what models of neuralforecast look at."""
    return {
        "insample_y": torch.randn(4, 24, 1),
        "insample_mask": torch.ones(4, 24, 1),
        "outsample_y": None,
        "hist_exog": None,
        "futr_exog": None,
        "stat_exog": None,
    }


def forecaster(name: str, **settings: Any) -> Case:
    """A forecaster of neuralforecast as a network; it makes windows of data frames in its own training step."""
    from neuralforecast import models

    module = getattr(models, name)(h=6, input_size=24, max_steps=8, **settings)
    return Case(Network(module), lambda: windows(module), call=lambda net, batch: net(batch))


class Network(nn.Module):
    """A LightningModule of another as a part of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> Any:
        return self.inner(batch)


@entry("N-HiTS", "neuralforecast")
def nhits() -> Case:
    return forecaster("NHITS", mlp_units=3 * [[32, 32]])


@entry("TiDE", "neuralforecast")
def tide() -> Case:
    return forecaster("TiDE", hidden_size=32, decoder_output_dim=8, temporal_decoder_dim=16)


@entry("TFT", "neuralforecast")
def tft() -> Case:
    return forecaster("TFT", hidden_size=16, n_head=2)


def unscaled(data: dict[str, Tensor]) -> Tensor:
    return data["prediction"]


@entry("N-BEATS, by its own training", "pytorch-forecasting")
def nbeats() -> Case:
    from pytorch_forecasting import NBeats

    sizes = {"widths": [16, 32], "num_blocks": [1, 1], "num_block_layers": [2, 2]}
    module = NBeats(**sizes, prediction_length=4, context_length=16, output_transformer=unscaled)

    def draw() -> tuple[dict[str, Tensor], tuple[Tensor, None]]:
        past, future = torch.randn(4, 16, 1), torch.randn(4, 4)
        x = {
            "encoder_cont": past,
            "encoder_target": past[..., 0],
            "decoder_target": future,
            "encoder_lengths": torch.full((4,), 16),
            "decoder_lengths": torch.full((4,), 4),
            "decoder_cont": future[..., None],
            "target_scale": torch.tensor([[0.0, 1.0]]).repeat(4, 1),
        }
        return x, (future, None)

    return Case(module, draw, call=lambda net, batch: net(batch[0]), plain=False)


class Modulus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


@entry("complex-valued CNN", "complextorch", left_out=["complex64"], structure="unstructured", sparsity=0.75)
def complex_cnn() -> Case:
    import complextorch.nn as cvnn

    module = nn.Sequential(cvnn.Conv2d(1, 8, 3), cvnn.CTanh(), nn.Flatten(), Modulus(), nn.Linear(8 * 36, 4))
    return Case(module, lambda: torch.randn(4, 1, 8, 8, dtype=torch.cfloat))


@entry("transformer of Lightning's demos", "lightning", quick=True)
def demo_transformer() -> Case:
    from lightning.pytorch.demos import Transformer

    module = Transformer(vocab_size=32, ninp=32, nhead=2, nhid=32, nlayers=1)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.nll_loss(net(*batch), batch[1].view(-1))

    return Case(module, lambda: (torch.randint(32, (4, 8)), torch.randint(32, (4, 8))), loss=loss)


@entry("LSTM of Lightning's demos, by its own training", "lightning")
def demo_lstm() -> Case:
    from lightning.pytorch.demos.lstm import LightningLSTM

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randint(32, (4, 8)), torch.randint(32, (4, 8))

    def run(net: Any, batch: Any) -> Any:
        return net.model(batch[0], net.model.init_hidden(4))[0]

    module = LightningLSTM(vocab_size=32)
    module.prepare_data = lambda: None  # it downloads a text  # type: ignore[method-assign]
    return Case(module, draw, call=run)


@entry("LightningTransformer, by its own training", "lightning")
def demo_lit() -> Case:
    from lightning.pytorch.demos import LightningTransformer

    module = LightningTransformer(vocab_size=32)
    module.prepare_data = lambda: None  # it downloads a text  # type: ignore[method-assign]
    return Case(module, lambda: (torch.randint(32, (4, 8)), torch.randint(32, (4, 8))))


@entry("BoringModel, by its own training", "lightning", structure="unstructured")
def boring() -> Case:
    from lightning.pytorch.demos.boring_classes import BoringModel

    return Case(BoringModel(), lambda: torch.randn(4, 32))


@entry("manual optimization of Lightning's demos", "lightning", structure="unstructured", scorer="gradient")
def manual() -> Case:
    from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel

    return Case(ManualOptimBoringModel(), lambda: torch.randn(4, 32))
