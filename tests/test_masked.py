"""Which weights are found."""

import pytest
import torch
from torch import nn

from pl_sparse.core.targets import find, select


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def names(model: nn.Module, **options: object) -> list[str]:
    return [param.name for param in find(model, **options)]  # type: ignore[arg-type]


def convnet() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))


def test_kinds_of_layers() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "conv1": nn.Conv1d(2, 2, 1),
            "conv3": nn.Conv3d(2, 2, 1),
            "up": nn.ConvTranspose2d(2, 2, 1),
            "norm": nn.LayerNorm(2),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(2, 3, bidirectional=True),
            "embed": nn.Embedding(4, 2),
        }
    )
    recurrent = [f"lstm.weight_{kind}_l0{side}" for side in ("", "_reverse") for kind in ("ih", "hh")]
    assert names(model) == [
        "linear.weight",
        "conv1.weight",
        "conv3.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        *recurrent,
    ]
    assert names(model, include=["Embedding"]) == ["embed.weight"]
    assert names(model, include=[nn.GRU, nn.LSTM][1:]) == recurrent


def test_patterns() -> None:
    model = nn.ModuleDict({"encoder": convnet(), "decoder": convnet()})
    assert names(model, include=["encoder.*"]) == ["encoder.0.weight", "encoder.2.weight", "encoder.4.weight"]
    assert names(model, include=["encoder"]) == names(model, include=["encoder.*"])
    assert names(model, exclude=["Conv2d"]) == ["encoder.4.weight", "decoder.4.weight"]
    assert names(model, include=["4"], exclude=["decoder.4.weight"]) == ["encoder.4.weight"]
    assert select(model, ["decoder.4", "*.0.weight"]) == ["encoder.0.weight", "decoder.0.weight", "decoder.4.weight"]


def test_first_and_last() -> None:
    assert names(convnet(), first=False) == ["2.weight", "4.weight"]
    assert names(convnet(), last=False) == ["0.weight", "2.weight"]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), first=False) == ["0.weight", "1.weight"]


def test_tied_weights_are_one() -> None:
    assert names(Tied()) == ["body.weight"] or names(Tied()) == ["body.weight", "head.weight"]
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    assert names(tied) == ["0.weight"]


def test_compiled_models_keep_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert names(nn.Sequential(torch.compile(model, backend="eager"))) == ["0.0.weight"]


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"include 'convv' matches no prunable weight.*The prunable weights are: 0.weight"
    ):
        find(convnet(), include=["convv"])
    with pytest.raises(ValueError, match="Did you mean 'Conv2d'"):
        find(convnet(), exclude=["Conv2D"])
    with pytest.raises(ValueError, match=r"write \['0'\]"):
        find(convnet(), include="0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no Linear, convolution"):
        find(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="leave none of"):
        find(nn.Linear(2, 2), last=False)
    with pytest.raises(ValueError, match="lazy parameter"):
        find(nn.LazyLinear(3))
