"""Latencies in the runtime that hardware names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_app import config
from torch import nn

from pl_sparse.allocation import Budget
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.sweep.identity import settings
from pl_sparse.app.training import train
from pl_sparse.callbacks import CostTarget, cost_target
from pl_sparse.core import optional
from pl_sparse.core.targets import find
from pl_sparse.export.hardware import Hardware
from pl_sparse.network import runtimes
from pl_sparse.network.cost import Network
from pl_sparse.network.latency import LatencyTable
from pl_sparse.network.runtimes import Runtime, openvino_request
from pl_sparse.regularizer import Latency
from pl_sparse.structure import Channel
from pl_sparse.tasks.models import lenet5

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (2, 6)),
    "linear of tokens, no bias": (nn.Linear(6, 4, bias=False), (2, 5, 6)),
    "grouped, strided": (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 9, 8)),
    "depthwise, no bias": (nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4, bias=False), (2, 4, 9, 8)),
    "dilated, same": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 9, 8)),
    "valid": (nn.Conv1d(4, 6, 3, padding="valid"), (2, 4, 9)),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=(1, 2)),
        (2, 4, 5, 6),
    ),
    "transposed, depthwise, no bias": (nn.ConvTranspose1d(4, 4, 3, groups=4, bias=False), (2, 4, 9)),
    "volumes": (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_in_a_runtime_what_it_does_in_torch(name: str, runtime: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip(runtime)
    layer, shape = LAYERS[name]
    layers, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(shape)
    if runtime == "onnxruntime":
        (out,) = Runtime(runtime).opened(layers, x)()
    else:
        out = openvino_request(runtimes._graph(layers, x)).infer({0: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), layers(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_norm_is_a_bias_of_the_convolution_before_it(kind: Any) -> None:
    pytest.importorskip("onnxruntime")
    layers = nn.Sequential(kind(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()).eval()
    x = torch.randn(2, 2, 5, 5)
    (out,) = Runtime("onnxruntime").opened(layers, x)()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), layers(x), rtol=1e-3, atol=1e-5)


def test_a_table_is_that_of_its_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is read by tables of the same runtime alone, and the default files differ."""
    pytest.importorskip("onnxruntime")
    net, x = lenet5(shape=(1, 28, 28), classes=2), torch.randn(2, 1, 28, 28)
    groups = [group for group in Channel(coupled=True).groups(find(net, last=False), net, x) if not group.reason]
    network, path = Network(groups, net, x), tmp_path / "table.json"
    opened: list[str] = []
    real = Runtime.opened
    monkeypatch.setattr(Runtime, "opened", lambda self, *args: opened.append(self.name) or real(self, *args))
    tables = [LatencyTable(path, 1, runtime) for runtime in ("torch", "onnxruntime", "onnxruntime")]
    for table in tables:
        table.measure(network.layers)
    torch_rows, rows = (list(table._rows.values()) for table in tables[:2])
    variants = [len(row["outs"]) * len(row["ins"]) for row in torch_rows]
    graphs = [2 * len(row["outs"]) * len(row["ins"]) * (2 if row["blocks"] else 1) for row in rows]
    assert opened == ["torch"] * sum(variants) + ["onnxruntime"] * sum(graphs)
    assert json.loads(path.read_text())["fingerprint"]["runtime"].startswith("onnxruntime 1.")
    assert network.cost(network.units, "ms", tables[1]) == network.cost(network.units, "ms", tables[2])
    assert LatencyTable(runtime="torch").file != LatencyTable(runtime="onnxruntime").file


def test_blocks_of_channels_cost_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs take a second per output, twice as long where inputs are no multiple of four, and ten per call."""
    pytest.importorskip("onnxruntime")
    now = [0.0]

    def opened(self: Runtime, layers: nn.Sequential, x: torch.Tensor, copies: int = 1) -> Any:
        conv: Any = layers[0]
        work = -(-conv.out_channels // 16) * 16 * (2 if conv.in_channels >= 16 and conv.in_channels % 4 else 1)

        def run() -> None:
            now[0] += 10 + copies * work

        return run

    monkeypatch.setattr(Runtime, "opened", opened)
    monkeypatch.setattr(Runtime, "clock", property(lambda self: lambda: now[0]))
    monkeypatch.setattr(Runtime, "blocks", property(lambda self: 16))
    net, x = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3)), torch.randn(1, 1, 8, 8)
    groups = [group for group in Channel(coupled=True).groups(find(net, last=False), net, x) if not group.reason]
    network, table = Network(groups, net, x), LatencyTable(Path("nowhere"), 1, "onnxruntime")
    table._rows, table._loaded = {table._name(layer): table._measured(layer) for layer in network.layers}, True
    for width, first, second in ((64, 64, 32), (52, 64, 32), (48, 48, 32), (51, 64, 64), (17, 32, 64), (4, 16, 32)):
        assert network.cost([width], "ms", table) == pytest.approx(1e3 * (first + second))


@pytest.mark.parametrize("name", ["convolution", "linear", "transposed"])
def test_copies_of_a_layer_are_added(name: str) -> None:
    pytest.importorskip("onnxruntime")
    layers: dict[str, nn.Module] = {
        "convolution": nn.Conv2d(2, 3, 3, bias=False),
        "linear": nn.Linear(4, 3),
        "transposed": nn.ConvTranspose2d(2, 3, 2),
    }
    layer: Any = layers[name]
    x = torch.randn(2, 4) if name == "linear" else torch.randn(1, 2, 5, 5)
    with torch.no_grad():
        once, bias = layer(x), 0.0 if layer.bias is None else layer.bias
        if name == "transposed":
            bias = bias[:, None, None]
        expected = (6 * (once - bias) + (3 * bias + 3 if layer.bias is not None else 0)).relu()
    (out,) = Runtime("onnxruntime").opened(nn.Sequential(layer, nn.ReLU()), x, 3)()
    torch.testing.assert_close(torch.from_numpy(out), expected)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_a_network_computes_in_a_runtime_what_it_does_in_torch(runtime: str) -> None:
    pytest.importorskip(runtime)
    net, x = lenet5(shape=(1, 28, 28), classes=2).eval(), torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        out = Runtime(runtime).network(net, x)()
        torch.testing.assert_close(torch.as_tensor(out[0]), net(x), rtol=1e-4, atol=1e-5)


def test_a_network_of_several_tensors_runs_in_torch_alone() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    pytest.importorskip("onnxruntime")
    (out,) = Runtime("torch").network(Sum(), {"x": torch.ones(2), "y": torch.ones(2)})()
    assert out.tolist() == [2, 2]
    with pytest.raises(ValueError, match="runtime=onnxruntime takes networks with one input tensor, not a dict"):
        Runtime("onnxruntime").network(Sum(), {"x": torch.ones(2), "y": torch.ones(2)})


def test_calls_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls that do not count, then the median of three; each call takes longer than the one before."""
    now, called = [0.0], []

    def call(name: str) -> Any:
        def run() -> None:
            called.append(name)
            now[0] += len(called)

        return run

    monkeypatch.setattr(Runtime, "clock", property(lambda self: lambda: now[0]))
    assert Runtime().timed([call("a"), call("b")], 3) == [7e3, 8e3]
    assert "".join(called) == "ab" * 5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"runtime": "onnxruntme"}, "runtime='onnxruntme' is unknown. Did you mean 'onnxruntime'"),
        ({"runtime": "elsewhere"}, "cannot be measured on this machine. Give a budget in macs or kb"),
        ({"runtime": "onnxruntime", "device": "cuda"}, "runtime=onnxruntime is measured on the CPU"),
        (
            {"runtime": "openvino"},
            r"measured in openvino: it needs onnx, onnxscript and openvino: pip install 'pl_sparse\[openvino\]'",
        ),
        ({"device": "cuda"}, "device=cuda: this machine has no such device"),
    ],
)
def test_a_runtime_that_is_not_here_is_refused_by_name(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = optional.find_spec
    monkeypatch.setattr(optional, "find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(ValueError, match=reason):
        Budget(ms=1.0, **options)
    with pytest.raises(ValueError, match=reason):
        Latency(**options)
    Budget(kb=1.0, **options)  # nothing is timed
    if "device" not in options:
        with pytest.raises(ValueError, match=reason):
            CostTarget(speedup=2.0, **options)


def test_hardware_names_the_runtime_of_all_that_is_measured(tmp_path: Path) -> None:
    budget = ["structure=coupled", "allocation=budget", "allocation.ms=1"]
    cfg = config(tmp_path, "hardware=cpu", *budget, "regularizer=latency")
    assert cfg.allocation.runtime == cfg.regularizer.regularizer.runtime == "onnxruntime"
    assert config(tmp_path, "hardware=cpu", "target=latency", "hardware.runtime=torch").target.runtime == "torch"
    cfg = config(tmp_path, "hardware=ampere", *budget)
    assert (cfg.allocation.runtime, cfg.allocation.device) == ("torch", "cuda")
    with pytest.raises(ValueError, match=r"hardware\.runtime=onnx is unknown"):
        Hardware(name="mine", runtime="onnx")


@pytest.mark.parametrize("hardware", ["mcu", "apple_ne"])
def test_milliseconds_of_another_machine_are_refused_before_training(hardware: str, tmp_path: Path) -> None:
    chosen = [f"hardware={hardware}", "structure=coupled", "model=lenet5", "quantization=none", "hardware.strict=false"]
    chosen += ["hardware.dtypes=[float32]", "hardware.budget_kb=null"]
    for asked in (["allocation=budget", "hardware.budget_ms=1"], ["target=latency"]):
        with pytest.raises(ConfigError, match="runtime=elsewhere: milliseconds of that device cannot be measured"):
            train(config(tmp_path, *chosen, *asked))


def test_a_run_of_earlier_keeps_its_hash(tmp_path: Path) -> None:
    """Keys that change nothing are not in it; what is measured in another runtime is another run."""
    budget = ["structure=coupled", "allocation=budget", "allocation.ms=1"]
    for options in (["hardware=cpu"], ["hardware=generic", *budget], ["regularizer=latency"]):
        assert not {"runtime", "device"} & set(_keys(settings(config(tmp_path, *options))))
    assert settings(config(tmp_path, "hardware=cpu", *budget))["allocation"]["runtime"] == "onnxruntime"


def _keys(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [key for name, value in node.items() for key in (name, *_keys(value))]
    return []


@pytest.mark.parametrize("runtime", [None, "torch"])
def test_a_speed_up_is_measured_in_the_runtime_on_one_thread(
    runtime: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    seen: list[int] = []
    real = cost_target.latencies

    def timed(runs: Any, *args: Any, **options: Any) -> Any:
        seen.append(torch.get_num_threads())
        assert all(isinstance(run, nn.Module) == (runtime == "torch") for run in runs.values())
        return real(runs, *args, **options)

    monkeypatch.setattr(cost_target, "latencies", timed)
    threads = torch.get_num_threads()
    dense, smaller = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 2)).eval() for n in (512, 8))
    target = CostTarget(speedup=2.0, seconds=0.01, runtime=runtime)
    assert target._faster(dense, smaller, torch.randn(2, 8)) > 0
    assert seen == [1] and torch.get_num_threads() == threads
