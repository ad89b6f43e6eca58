"""Targets of cost: the least pruned network that is so much faster, smaller or cheaper."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from test_app import config
from torch import nn

from pl_sparse import Sparsity
from pl_sparse.allocation import LAMP, Budget
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.callbacks import CostTarget
from pl_sparse.export import Compressed, shrink
from pl_sparse.network.macs import MacCounter, macs
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits


def small() -> Classifier:
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, stride=2)
    return Classifier(
        nn.Sequential(conv1, nn.BatchNorm2d(32), nn.ReLU(), conv2, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)), 10
    )


def fit(target: CostTarget, module: Classifier, folder: Path, **options: Any) -> Sparsity:
    sparsity = Sparsity(**{"structure": "coupled", "sparsity": 0.9, "report": False, **options})
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[sparsity, target], default_root_dir=folder,
        enable_checkpointing=False, **quiet,
    )  # fmt: skip
    trainer.fit(module, Digits(limit=128))
    return sparsity


def counted(module: nn.Module) -> dict[str, float]:
    x = torch.zeros(2, 1, 8, 8)
    with MacCounter(module) as counter:
        module(x)
    tensors = module.state_dict().values()
    return {"macs": macs(module, counter).dense, "size": sum(t.numel() * t.element_size() for t in tensors)}


@pytest.mark.parametrize("what", ["macs", "size"])
def test_what_is_left_is_what_was_asked_for_and_hardly_less(what: str, tmp_path: Path) -> None:
    module, target = small(), CostTarget(**{what: 0.3})  # type: ignore[arg-type]
    before = counted(module)[what]
    sparsity = fit(target, module, tmp_path)
    assert sparsity.pruner.at_target and isinstance(sparsity.pruner.allocation, Budget)
    shrink(module, torch.zeros(2, 1, 8, 8))
    left = counted(module)[what] / before
    assert target.achieved == pytest.approx(left)
    assert 0.26 < left <= 0.3


def test_a_speed_up_is_that_of_the_network_without_its_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a runtime that takes a nanosecond a multiplication, and one more to be called."""

    def faster(self: CostTarget, dense: nn.Module, smaller: nn.Module, example: Any) -> float:
        return (counted(dense)["macs"] + 1) / (counted(smaller)["macs"] + 1)

    monkeypatch.setattr(CostTarget, "_faster", faster)
    target, module = CostTarget(speedup=2), small()
    before = counted(module)["macs"]
    fit(target, module, tmp_path)
    shrink(module, torch.zeros(2, 1, 8, 8))
    assert target.achieved == pytest.approx((before + 1) / (counted(module)["macs"] + 1))
    assert 1.9 < target.achieved < 2.6  # four of 32 channels at once


def test_milliseconds_are_those_of_the_network_without_its_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faster(self: CostTarget, dense: nn.Module, smaller: nn.Module, example: Any) -> float:
        self._ms = counted(dense)["macs"] / 1e5 + 0.1, counted(smaller)["macs"] / 1e5 + 0.1
        return self._ms[0] / self._ms[1]

    monkeypatch.setattr(CostTarget, "_faster", faster)
    module = small()
    dense = counted(module)["macs"] / 1e5 + 0.1
    target = CostTarget(ms=dense / 2)
    fit(target, module, tmp_path)
    shrink(module, torch.zeros(2, 1, 8, 8))
    assert target.achieved == pytest.approx(counted(module)["macs"] / 1e5 + 0.1)
    assert 0.37 * dense < target.achieved <= 0.5 * dense  # four of 32 channels at once
    with pytest.raises(ValueError, match=r"ms=9: the dense network takes .* ms in ONNX Runtime .*, which meets it"):
        fit(CostTarget(ms=9), small(), tmp_path)
    with pytest.raises(ValueError, match=r"ms=0\.05 cannot be met: .* ms is 0\.1"):
        fit(CostTarget(ms=0.05), small(), tmp_path)
    with pytest.raises(ValueError, match="ms=-1 must be above 0"):
        CostTarget(ms=-1)


def test_channels_go_in_the_numbers_that_the_runtime_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution of 31 channels takes twice as long as one of 32: widths are multiples, after a resume too."""

    def cost(net: nn.Module) -> float:
        odd = any(layer.out_channels % 4 for layer in net.modules() if isinstance(layer, nn.Conv2d))
        return (counted(net)["macs"] + 1) * (1 + odd)

    monkeypatch.setattr(CostTarget, "_faster", lambda self, dense, smaller, x: cost(dense) / cost(smaller))
    target, module = CostTarget(speedup=1.5), small()
    fit(target, module, tmp_path)
    state = target.state_dict()
    shrink(module, torch.zeros(2, 1, 8, 8))
    widths = [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert state["multiple"] in (4, 16) and min(widths) < 32 and all(width % state["multiple"] == 0 for width in widths)
    resumed = CostTarget(speedup=1.5)
    resumed.load_state_dict(state)
    sparsity = fit(resumed, small(), tmp_path)
    assert sparsity.pruner.allocation.multiple == state["multiple"]  # type: ignore[attr-defined]


def test_time_that_is_not_that_of_channels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that costs a third of the dense network's time, as in networks of 0.05 ms: a target just below is met by
    cutting nearly all, and is not a target."""

    def faster(self: CostTarget, dense: nn.Module, smaller: nn.Module, example: Any) -> float:
        fixed = counted(dense)["macs"] / 2
        return (counted(dense)["macs"] + fixed) / (counted(smaller)["macs"] + fixed)

    monkeypatch.setattr(CostTarget, "_faster", faster)
    with pytest.raises(ValueError, match=r"speedup=2.75 would remove 9\d\.\d% .* hardly depends on its channels"):
        fit(CostTarget(speedup=2.75), small(), tmp_path)
    target = CostTarget(speedup=1.5)
    fit(target, small(), tmp_path)
    assert target.achieved is not None and 1.45 < target.achieved < 1.8


def test_a_resumed_training_goes_by_the_budget_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CostTarget(macs=0.3)
    fit(first, small(), tmp_path)
    second = CostTarget(macs=0.3)
    second.load_state_dict(first.state_dict())
    monkeypatch.setattr(CostTarget, "_search", lambda *args: pytest.fail("it is measured again"))
    sparsity = fit(second, small(), tmp_path)
    assert second.achieved == first.achieved and sparsity.pruner.allocation.limit(1.0) == first.state_dict()["limit"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"structure": "channel"}, "macs=0.3 is met by channels that can be removed, and structure=channel"),
        ({"structure": "unstructured"}, "use structure=coupled"),
        ({"allocation": LAMP()}, "allocation=lamp does so otherwise"),
        ({"allocation": Budget(kb=3)}, "allocation=budget does so otherwise"),
    ],
)
def test_what_cannot_meet_a_target_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        fit(CostTarget(macs=0.3), small(), tmp_path, **options)


def test_the_size_of_a_file_of_single_weights_is_a_sparsity_that_the_refusal_names(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    with pytest.raises(ValueError, match=r"a compressed file of that size sparsity=0\.781 export=\[safetensors\]"):
        fit(CostTarget(size=0.25), small(), tmp_path, structure="unstructured")
    net = nn.Sequential(nn.Linear(256, 256, bias=False))
    torch.manual_seed(0)
    weight = net[0].weight.detach()
    net[0].weight = nn.Parameter(weight * (torch.rand_like(weight) > 0.781))
    Compressed().write(net, torch.zeros(2, 256), tmp_path / "file")
    assert 0.8 * 0.25 < (tmp_path / "file").stat().st_size / (4 * 256**2) < 0.25


def test_a_target_out_of_reach_is_refused_with_what_is_possible(tmp_path: Path) -> None:
    module = small()
    with pytest.raises(ValueError, match=r"macs=1e-06 cannot be met: with 1 channel in each group .* macs is 0\.0"):
        fit(CostTarget(macs=1e-6), module, tmp_path)
    assert all(bool((weight != 0).all()) for weight in module.net.parameters() if weight.dim() > 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "got none of them"),
        ({"speedup": 2.0, "size": 0.5}, "got speedup, size"),
        ({"speedup": 1.0}, "speedup=1.0 must be above 1"),
        ({"macs": 2.0}, r"macs=2.0 must be in \(0, 1\)"),
        ({"speedup": 2.0, "seconds": 0.0}, "seconds=0.0"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(options: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CostTarget(**options)


def test_the_figure_is_in_the_metrics(tmp_path: Path) -> None:
    metrics = train(config(tmp_path, "model=lenet5", "target=macs", "target.macs=0.4", "data.limit=128"))
    assert json.loads((tmp_path / "metrics.json").read_text())["target"] == metrics["target"]
    assert metrics["target"]["macs"] == 0.4 and 0.3 < metrics["target"]["achieved"] <= 0.4
    assert metrics["allocation"] == "budget" and metrics["structure"] == "channel"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["target=latency", "target.speedup=0.5"], "speedup=0.5 must be above 1"),
        (["target=latency", "quantization=int8"], "target.speedup=2 is measured on the network in floating point"),
        (["target=latency", "hardware.macs=0.5"], "are two budgets"),
        (["target=macs", "hardware.budget_ms=2"], "got ms, macs"),
        (["target=macs", "allocation.kb=20"], "got kb, macs"),
        (["target=size", "shrink_every=1"], "neither quantization nor target"),
        (["target=size", "structure=channel"], "structure=coupled"),
    ],
)
def test_settings_that_contradict_a_target_are_refused(settings: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        train(config(tmp_path, "model=lenet5", *settings))
