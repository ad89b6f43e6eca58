"""Files for Core ML, OpenVINO, ExecuTorch and TensorRT hold the model, and say what becomes of its zeros."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pl_sparse import Pruner
from pl_sparse.app import main
from pl_sparse.export import ONNX, CoreML, ExecuTorch, Export, OpenVINO, OpenVINOInt8, TensorRT, two_four
from pl_sparse.export.coreml import _checked, read_coreml
from pl_sparse.export.hardware import Hardware
from pl_sparse.quantize import post_training
from pl_sparse.schedule import OneShot
from pl_sparse.structure import NM, Block, Channel, Unstructured, structure
from pl_sparse.tasks.models import lenet5, vit_tiny

SHORT = ["data.limit=64", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # coremltools and executorch on a newer torch
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def pruned(net: nn.Module, pattern: str, sparsity: float = 0.9) -> nn.Module:
    """A network with values in its norms, whose weights have zeros of a structure."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    pruner = Pruner("magnitude", OneShot(final=sparsity), structure=pattern, allocation="uniform", misfit="dense")
    pruner.attach(net)
    pruner.prepare(1)
    pruner.before_step(0)
    return net.eval()


class Small(nn.Module):
    """A convolution with a norm, one without a bias, a linear layer: sizes that all patterns divide."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 32, 3)
        self.c = nn.Linear(32, 64)
        self.d = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3))).relu())


X = (4, 16, 6, 6)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.9), ("block4x4", 0.75), ("1:16", 0.9), ("2:4", 0.5)]
)
def test_core_ml_stores_a_mask_and_the_values_that_are_not_zero(pattern: str, sparsity: float, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    net, x = pruned(Small(), pattern, sparsity), torch.randn(X)
    export = CoreML()
    assert export.refusal(net, x, structure(pattern), sparsity) is None
    notes = export.write(net, x, tmp_path / export.file)
    operations, read = read_coreml(tmp_path / export.file)
    assert operations == ["constexpr_sparse_to_dense"] * 4
    assert notes[0] == "4 weights are sparse in the program (constexpr_sparse_to_dense)"
    assert notes[2].startswith("4 of 4 weights, read back, are the model's to float16's rounding; all 4 matrices")
    for weight in (net.b.weight, net.c.weight, net.d.weight):
        half = weight.detach().half().numpy()
        assert any(value.shape == half.shape and (value == half).all() for value in read.values())
    zeros = {tuple(value.shape): int((value == 0).sum()) for value in read.values()}
    assert zeros[32, 16, 3, 3] == int((net.a.weight == 0).sum())  # the norm is folded into it
    dense = float(notes[1].split(": ")[1].split(" kB")[0]) * 1e3
    smaller = dense / export.size(tmp_path / export.file)
    assert smaller > {"unstructured": 2.5, "block4x4": 2.0, "1:16": 2.5, "2:4": 1.4}[pattern]


def test_another_weight_in_the_package_is_found() -> None:
    net = nn.Linear(4, 3)
    weight = net.weight.detach().half().numpy()
    assert _checked({"w": weight}, {"w_sparsified": weight}, net)[0].startswith("1 of 1 weights")
    other = weight.copy()
    other[0, 0] += 0.01
    with pytest.raises(ValueError, match="the weight w read back"):
        _checked({"w": weight}, {"w_sparsified": other}, net)
    with pytest.raises(ValueError, match="none of the model's 1 weights"):
        _checked({"w": other}, {"w_sparsified": other}, net)
    two = nn.Sequential(nn.Linear(4, 3), net)
    assert "joined or transposed 0.weight" in _checked({"w": weight}, {"w": weight}, two)[1]


def test_core_ml_is_measured_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("coremltools")
    options = [
        "hardware=apple_ne",
        "export=[coreml]",
        "export_measure=true",
        "sparsity=0.9",
        f"hydra.run.dir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *options])
    main()
    said = capsys.readouterr().out
    assert "coreml: not measured: Core ML runs on Apple's systems" in said and "are sparse in the program" in said
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["size_bytes"]["exported"] == (tmp_path / CoreML.file).stat().st_size
    assert "latency_ms" not in metrics and "exports_failed" not in metrics


@pytest.mark.parametrize(("export", "package"), [(OpenVINO(), "openvino"), (ExecuTorch(), "executorch")])
def test_the_file_computes_what_the_model_computes(export: Export, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    net = pruned(lenet5(shape=(1, 8, 8), classes=10), "unstructured")
    x = torch.randn(4, 1, 8, 8)
    assert export.refusal(net, x, Unstructured(), 0.9) is None
    before = copy.deepcopy(net.state_dict())
    notes = export.write(net, x, tmp_path / export.file)
    assert "differ from torch's by at most" in notes[0]
    run, dense = export.open(tmp_path / export.file, net), export.dense(net, x, tmp_path)
    with torch.no_grad():
        for batch in (x, torch.randn(1, 1, 8, 8), torch.randn(40, 1, 8, 8)):
            torch.testing.assert_close(run(batch), net(batch), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(dense(batch), net(batch), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    files = [path for path in tmp_path.iterdir() if path.stem == (tmp_path / export.file).stem]
    assert export.size(tmp_path / export.file) == sum(path.stat().st_size for path in files)
    with pytest.raises(ValueError, match="differ from torch's by"):
        type(export)(tolerance=-1.0).write(net, x, tmp_path / export.file)


def test_openvino_in_8_bits_says_whether_zeros_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    net, x = pruned(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), "unstructured"), torch.randn(8, 64)
    integers, export = post_training(net, [x]), OpenVINOInt8()
    for flags, said in (("amx_int8", False), ("avx512_vnni", True)):
        (tmp_path / "cpuinfo").write_text(f"flags: {flags}")
        monkeypatch.setattr("pl_sparse.export.openvino._CPUINFO", tmp_path / "cpuinfo")
        notes = export.write(integers, x, tmp_path / export.file)
        assert any("no AMX" in note for note in notes) == said
    with torch.no_grad():
        run = export.open(tmp_path / export.file, integers)
        assert (run(x) - integers(x)).abs().max() < 0.02 * integers(x).abs().max()
        assert (run(x) - net(x)).abs().max() < 0.2 * net(x).abs().max()
    core = pytest.importorskip("openvino").Core()
    kinds = [op.get_element_type().get_type_name() for op in core.read_model(tmp_path / export.file).get_ops()]
    assert kinds.count("i8") >= 2


def test_openvino_is_measured_beside_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    options = ["export=[openvino]", "export_measure=true", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *options])
    main()
    row = json.loads((tmp_path / "bench.json").read_text())["rows"][0]
    both = sum((tmp_path / name).stat().st_size for name in ("model_openvino.xml", "model_openvino.bin"))
    assert row["runtime"] == "OpenVINO" and row["exported/bytes"] == both and row["test/acc_exported"] >= 0
    assert "openvino:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("export", "package"), [("coreml", "coremltools"), ("openvino", "openvino"), ("executorch",) * 2]
)
def test_what_is_missing_is_named_with_its_extra(
    export: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pl_sparse.core.optional.find_spec", lambda name: None if name == package else True)
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, f"export=[{export}]", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"pip install 'pl_sparse[{export}]'" in said and len(said.strip().splitlines()) <= 2
    with pytest.raises(ImportError, match=rf"pl_sparse\[{export}\]"):
        kinds: dict[str, Any] = {"coreml": CoreML, "openvino": OpenVINO, "executorch": ExecuTorch}
        kinds[export]().write(nn.Linear(2, 2), torch.zeros(2, 2), tmp_path / "m")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pl_sparse\[{export}\]"):
        read_coreml(tmp_path / "m") if export == "coreml" else kinds[export]().open(tmp_path / "m", nn.Linear(2, 2))


def test_weights_that_are_not_two_of_four_are_named(tmp_path: Path) -> None:
    net, x = pruned(Small(), "2:4", 0.5), torch.randn(X)
    export = TensorRT()
    assert export.refusal(net, x, NM(2, 4), 0.5) is None
    assert "structure=nm24" in str(export.refusal(net, x, NM(1, 8), 0.5))
    notes = export.write(net, x, tmp_path / export.file)
    assert notes[1:] == ["4 of 4 weights are 2:4 along their inputs"]
    with torch.no_grad():
        net.c.weight[3, 4:7] = 1.0  # three of four inputs of one output
        net.b.weight.copy_(net.b.weight.transpose(0, 1).clone())  # 2:4 along outputs
    notes = export.write(net, x, tmp_path / export.file)
    assert notes[1] == "2 of 4 weights are 2:4 along their inputs"
    assert [note.split(" stays dense: ")[0] for note in notes[2:]] == ["b.weight", "c.weight"]
    assert "1 of 512 groups of 4 inputs have more than 2 weights" in notes[3]
    with torch.no_grad():
        for weight in net.parameters():
            weight.fill_(1.0)
    with pytest.raises(ValueError, match=r"no weight is 2:4 along its inputs: a\.weight stays dense"):
        export.write(net, x, tmp_path / export.file)


def test_two_of_four_in_integers_and_in_products(tmp_path: Path) -> None:
    net = pruned(nn.Sequential(nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)), "2:4", 0.5)
    x = torch.randn(4, 8, 2, 2)
    ONNX(tolerance=1.0).write(post_training(net, [x]), x, tmp_path / "int8.onnx")
    fit, unfit = two_four(tmp_path / "int8.onnx")
    assert len(fit) == 3 and not unfit
    vit = pruned(vit_tiny(shape=(1, 8, 8), classes=10, dim=16, depth=1), "2:4", 0.5)
    ONNX().write(vit, torch.randn(2, 1, 8, 8), tmp_path / "vit.onnx")
    fit, unfit = two_four(tmp_path / "vit.onnx")
    assert len(fit) >= 4 and all("inputs are not multiples of 4" in reason for reason in unfit.values()), unfit


def test_what_the_neural_engine_gains_from() -> None:
    from omegaconf import OmegaConf

    from pl_sparse.app.settings import CONF

    options: Any = OmegaConf.to_container(OmegaConf.load(CONF / "hardware" / "apple_ne.yaml"))
    options.pop("_target_")
    device = Hardware(**options)
    for fine, level in (
        (Unstructured(), 0.75),
        (Block(2, 8), 0.5),
        (NM(2, 4), 0.5),
        (NM(1, 16), 0.9),
        (Channel(), 0.1),
    ):
        assert device.objection(fine, level) is None, fine
    assert "a sparsity of 0.75 or more, and this will be 0.7" in str(device.objection(Unstructured(), 0.7))
    assert "n:8, n:16" in str(device.objection(NM(2, 5), 0.6))
    assert "a sparsity of 0.5 or more" in str(device.objection(NM(3, 4), 0.25))
    with pytest.raises(ValueError, match="unstructred"):
        Hardware(name="x", least_sparsity={"unstructred": 0.5})
