"""Files for a target hold the trained model, run, and say what they cannot."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse.export import (
    CSR,
    ONNX,
    Compressed,
    Export,
    SemiStructured,
    TorchExport,
    load_compressed,
    save_compressed,
)
from pl_sparse.export.csr import CSRConv2d, CSRLinear, to_csr
from pl_sparse.export.hardware import Hardware
from pl_sparse.export.measure import Comparison, Cost, compare, latencies, one_thread, percentile, ratio, verdict
from pl_sparse.export.onnx import open_onnx, save_onnx
from pl_sparse.export.semi_structured import unfit
from pl_sparse.structure import NM, Channel, Unstructured, structure
from pl_sparse.tasks.models import lenet5, vit_tiny


def sparse(net: nn.Module, sparsity: float = 0.9) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() > 1:
                weight.mul_(torch.rand(weight.shape, generator=generator) > sparsity)
    return net.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return sparse(lenet5(shape=(1, 8, 8), classes=10))


@pytest.mark.parametrize("export", [ONNX(), CSR("all"), CSR(), Compressed(), TorchExport()])
def test_the_file_computes_what_the_model_computes(export: Export, net: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(4, 1, 8, 8)
    assert export.refusal(net, x, Unstructured(), 0.9) is None
    before = copy.deepcopy(net.state_dict())
    export.write(net, x, tmp_path / export.file)
    other = lenet5(shape=(1, 8, 8), classes=10)
    run = export.open(tmp_path / export.file, other)
    with torch.no_grad():
        for batch in (x, torch.randn(1, 1, 8, 8), torch.randn(7, 1, 8, 8)):
            torch.testing.assert_close(run(batch), net(batch), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_transformer_in_sparse_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = sparse(vit_tiny(shape=(1, 8, 8), classes=10, dim=16, depth=2))
    x = torch.randn(5, 1, 8, 8)
    converted, replaced, notes = to_csr(net, x, "all")
    assert [name for name in replaced if "linear" in name] == [f"blocks.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    with torch.no_grad():
        torch.testing.assert_close(converted(x), net(x), atol=1e-5, rtol=1e-5)
    calls = []
    converted.get_submodule("blocks.0.linear1").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        converted(x)
    assert calls and not notes  # it runs, and no fused path goes around it


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"padding": 2, "dilation": 2}, {"padding": (1, 0), "bias": False}]
)
def test_sparse_convolutions(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = sparse(nn.Conv2d(3, 4, 3, **options), 0.5)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(CSRConv2d.of(layer)(x), layer(x), atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]


def test_sparse_rows_are_those_of_the_matrix() -> None:
    torch.manual_seed(0)
    layer = sparse(nn.Linear(7, 5), 0.6)
    converted = CSRLinear.of(layer)  # type: ignore[arg-type]
    rows, columns, values = (converted.get_buffer(name) for name in ("rows", "columns", "values"))
    for i in range(5):
        weight = layer.weight.detach()  # type: ignore[operator]
        row = {j: float(weight[i, j]) for j in range(7) if weight[i, j] != 0}
        span = slice(int(rows[i]), int(rows[i + 1]))
        assert dict(zip(columns[span].tolist(), values[span].tolist(), strict=True)) == row
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(converted(x), layer(x), atol=1e-6, rtol=1e-5)


def test_what_is_left_dense_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 4, 3, groups=2)
            self.b = nn.Conv2d(4, 4, 3, padding="same")
            self.c = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)).mean((2, 3)))

    net = sparse(Net(), 0.5)
    _, replaced, notes = to_csr(net, torch.randn(2, 2, 8, 8), "all")
    assert replaced == ["c"]
    assert [note.split(" stays")[0] for note in notes] == ["a", "b", "unused"]
    assert "grouped" in notes[0] and "padding" in notes[1] and "does not call" in notes[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_compressed_tensors_come_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 5, 3, generator=generator) * 3
    weight *= torch.rand(13, 5, 3, generator=generator) > 0.8
    tensors = {
        "w": weight.to(dtype),
        "dense": torch.randn(4, 4).to(dtype) + 9,
        "scalar": torch.tensor(0).to(dtype),
        "none": torch.zeros(0, 3).to(dtype),
        "zero": torch.zeros(9, 9).to(dtype),
    }
    if dtype.is_floating_point:
        tensors["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-7] + [0.0] * 20).to(dtype)
    save_compressed(tensors, tmp_path / "w.zst")
    loaded = load_compressed(tmp_path / "w.zst")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def test_a_compressed_file_is_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = sparse(nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 100)), 0.95)
    save_compressed(net.state_dict(), tmp_path / "w.zst")
    dense = sum(tensor.numel() * 4 for tensor in net.state_dict().values())
    assert (tmp_path / "w.zst").stat().st_size <= 0.09 * dense


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    save_compressed({"w": torch.randn(50, 50)}, tmp_path / "w.zst")
    (tmp_path / "half.zst").write_bytes((tmp_path / "w.zst").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"half.zst is not a file of compressed weights, or is incomplete"):
        load_compressed(tmp_path / "half.zst")
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "nowhere.zst")


def test_what_sparse_tensor_cores_take() -> None:
    layer = nn.Linear(64, 32)
    assert "more than two non-zeros" in str(unfit("fc", layer))
    with torch.no_grad():
        layer.weight.view(32, 16, 4)[..., 2:] = 0
    assert unfit("fc", layer) is None
    assert "not a multiple of 32x64" in str(unfit("fc", nn.Linear(64, 10)))
    net = nn.Sequential(layer)
    refusal = SemiStructured().refusal
    assert "use structure=nm24" in str(refusal(net, None, Unstructured(), 0.9))
    assert "no plain linear layer is a multiple" in str(refusal(nn.Linear(8, 8), None, NM(2, 4), 0.5))
    if not torch.cuda.is_available():
        assert "pl-sparse export RUN --to semi_structured" in str(refusal(net, None, NM(2, 4), 0.5))
        with pytest.raises(ValueError, match=r"compute capability 8\.0"):
            SemiStructured().write(net, torch.zeros(2, 64), Path("nowhere"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")
def test_sparse_tensor_cores_compute_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.unflatten(1, (-1, 4))[..., 2:] = 0  # type: ignore[operator]
    x = torch.randn(64, 128)
    export = SemiStructured()
    assert export.refusal(net, x, NM(2, 4), 0.5) is None
    export.write(net, x, tmp_path / export.file)
    with torch.no_grad():
        torch.testing.assert_close(export.open(tmp_path / export.file, net)(x), net(x), atol=1e-2, rtol=1e-2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x) + self.b(x))


def test_a_sum_and_its_norm_stay_two_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ONNX Runtime computes them faster so; its own default joins them."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    net, x, path = Residual().eval(), torch.randn(2, 3, 8), tmp_path / "net.onnx"
    save_onnx(net, x, path)
    made = runtime.InferenceSession

    def operations(**other: object) -> set[str]:
        def session(name: str, options: Any, **given: Any) -> Any:
            options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
            return made(name, options, **given, **other)

        monkeypatch.setattr(runtime, "InferenceSession", session)
        assert torch.allclose(open_onnx(path, threads=1)(x), net(x), atol=1e-5)
        return {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}

    assert "LayerNormalization" in operations() and "SkipLayerNormalization" not in operations()
    monkeypatch.setattr("pl_sparse.network.runtimes.SLOWER", ())
    assert "SkipLayerNormalization" in operations()


def test_a_model_that_cannot_be_traced_is_refused_with_a_way_out() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.expand(len(x), -1) if float(x.sum()) > 0 else -x

    for export in (ONNX(), TorchExport()):
        reason = export.refusal(Branching(), torch.zeros(2, 3), Unstructured(), 0.9)
        assert reason is not None and "cannot trace Branching" in reason and "x.shape[0]" in reason
    assert "no plain Linear or Conv2d" in str(CSR().refusal(Branching(), None, Unstructured(), 0.9))


# Hardware


def test_hardware_tells_what_it_cannot_use() -> None:
    ampere = Hardware(name="ampere", accelerates=["nm24", "nm24t", "channel"], dtypes=["float32"])
    assert ampere.objection(structure("nm24"), 0.5) is None and ampere.objection(structure("nm24t"), 0.5) is None
    assert ampere.objection(Channel(), 0.5) is None
    assert "structure=nm24, nm24t, channel" in str(ampere.objection(structure("nm14"), 0.75))
    assert "quantization=none" in str(ampere.refusal("int8")) and ampere.refusal("float32") is None
    csr = Hardware(name="cpu_csr", least_sparsity=0.85)
    assert csr.objection(Unstructured(), 0.9) is None
    assert "sparsity of 0.85 or more, and this will be 0.8" in str(csr.objection(Unstructured(), 0.8))
    assert "structure other than 2:4" in str(csr.objection(NM(2, 4), 0.9))
    with pytest.raises(ValueError, match="no structure is called"):
        Hardware(name="x", accelerates=["chanel"])


# Measuring


def test_times_are_taken_side_by_side() -> None:
    order: list[str] = []
    runs = {name: lambda x, name=name: order.append(name) for name in "abc"}
    taken = latencies(runs, torch.zeros(1), seconds=0.0)  # type: ignore[arg-type]
    assert {len(values) for values in taken.values()} == {10}
    rounds = ["".join(order[i : i + 3]) for i in range(9, len(order), 3)]
    assert rounds[:4] == ["abc", "bca", "cab", "abc"]


def test_the_time_of_the_processor_does_not_see_what_else_happens() -> None:
    """A model that waits costs nothing, and by the wall all of its waiting: a speed-up is looked for by the former."""
    runs = {"waits": lambda x: time.sleep(0.005)}
    by_wall = latencies(runs, torch.zeros(1), seconds=0.0)["waits"]
    by_processor = latencies(runs, torch.zeros(1), seconds=0.0, clock=time.process_time)["waits"]
    assert min(by_wall) >= 5 and percentile(by_processor, 0.5) < 2.5


def test_percentiles() -> None:
    values = [float(i) for i in range(1, 101)]
    assert percentile(values, 0.95) == 95 and percentile(values[::-1], 0.5) == 50 and percentile([3.0], 0.95) == 3


def test_the_verdict_does_not_flatter() -> None:
    def row(batch: int, dense: list[float], other: list[float], size: int) -> Comparison:
        cost = Cost(1.0, 1.0, 1.0, 1000, None)
        return Comparison("onnx", "ONNX Runtime", batch, cost, Cost(1.0, 1.0, 1.0, size, None), ratio(dense, other), {})

    same = row(1, [1.0] * 10, [0.98] * 10, 1000)
    assert "no speed-up at batch 1" in verdict([same], "a CPU", "channels")
    assert "what would give one: channels" in verdict([same], "a CPU", "channels")
    assert "no smaller" in verdict([same], "a CPU", "channels")
    mixed = row(1, [1.0] * 10, [0.5] * 6 + [1.5] * 4, 500)  # half the time, but four rounds in ten say otherwise
    assert "no speed-up" in verdict([mixed], "a CPU", "channels")
    fast, slow = row(32, [2.0] * 10, [1.0] * 10, 500), row(1, [1.0] * 10, [2.0] * 10, 500)
    line = verdict([slow, fast], "a CPU", "channels")
    assert "2.00x SLOWER at batch 1" in line and "2.00x faster at batch 32" in line and "2.0x smaller" in line
    assert "a CPU" in line and "No speed-up" not in line


def test_on_one_thread_a_machine_that_does_something_else_turns_no_verdict() -> None:
    """A model that waits as long as it computes, as one that is not let run, costs what another costs."""

    def computing(waits: bool) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            end = time.process_time() + 5e-3  # beside which the time of a call to sleep does not count
            while time.process_time() < end:
                pass
            if waits:
                time.sleep(5e-3)
            return x

        return run

    makers = {"dense": lambda: computing(True), "exported": lambda: computing(False)}
    sizes = {"dense": 1, "exported": 1}
    with one_thread():
        (row,) = compare("onnx", "ONNX Runtime", makers, torch.zeros(1, 1), [1], sizes, {}, seconds=0.05)
    assert not row.faster[1] and row.dense.median_ms == pytest.approx(5.0, rel=0.5)


def test_dense_and_sparse_models_differ_in_their_zeros_alone() -> None:
    from pl_sparse.app.deploy import filled

    net = sparse(nn.Sequential(nn.Linear(20, 20)))
    dense = filled(net)
    for name, weight in dense.named_parameters():
        kept = net.get_parameter(name) != 0
        assert torch.equal(weight[kept], net.get_parameter(name)[kept])
        assert weight.dim() < 2 or bool((weight != 0).all())
    assert F.linear(torch.ones(1, 20), dense[0].weight).abs().sum() > 0  # type: ignore[index]
