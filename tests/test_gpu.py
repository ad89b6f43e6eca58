"""What only a GPU shows, and that the benchmark for it runs: at tiny sizes, on the CPU too."""

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import test_contract
import test_methods
import torch
from lightning.pytorch import Trainer
from test_methods import Small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import gpu
from pl_sparse import Pruner, Sparsity
from pl_sparse.app.training import train
from pl_sparse.core.registry import build, catalogue
from pl_sparse.masking import Masking
from pl_sparse.results.summary import summarize
from pl_sparse.schedule import Constant, Cubic, Schedule
from pl_sparse.tasks.data import Digits

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[pytest.mark.slow] * (part.__name__ == "step"), id=part.__name__) for part in gpu.PARTS],
)
def test_the_benchmark_runs_at_tiny_sizes(part: Any, device: str) -> None:
    if part is gpu.fsdp and device == "cpu" and torch.__version__ < (2, 7):
        pytest.skip("FSDP2 runs on CPUs from torch 2.7 on")
    found = part(gpu.Bench(device, tiny=True))
    assert found
    if part is gpu.update:
        assert [row["kept"] for row in found.values()] == pytest.approx([0.1, 0.1, 0.5, 0.1, 0.1, 0.1], abs=3e-3)
    if part is gpu.fsdp:
        assert found["masks differ in"] == 0
    if part is gpu.compiled:
        assert all(row["graphs"] == row["graphs after an update"] == 1 for row in found.values())
    if part is gpu.syncs:  # a step that changes no mask reads nothing back that a dense one does not
        assert found["hard"]["step"] == found["ste"]["step"] == found["dense"]["step"]


def test_what_fails_is_in_the_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: gpu.Bench) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "PARTS", (broken, gpu.inference))
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--tiny", "--json", str(tmp_path / "x.json")])
    gpu.main()
    text = (tmp_path / "x.json").read_text()
    assert '"broken": "RuntimeError: out of memory"' in text and '"64x64, 64 rows"' in text


@on_gpu
@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
def test_masks_on_a_gpu_are_those_of_the_cpu(masking: str) -> None:
    """Weights are too, but for the order that sums are taken in."""

    def trained(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
        x = torch.randn(32, 64)
        net, x = net.to(device), x.to(device)
        pruner = Pruner(schedule=Constant(final=0.9, every=10**6), masking=masking)
        pruner.attach(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            pruner.before_step(step, 5, optimizer)
            optimizer.step()
            pruner.after_step()
        return [t.cpu() for param in pruner.params for t in (param.mask, param.weight.detach())]

    for ours, theirs in zip(trained("cuda"), trained("cpu"), strict=True):
        assert torch.equal(ours, theirs) if ours.dtype == torch.bool else torch.allclose(ours, theirs, atol=1e-5)


# The contract, on a GPU


def contract(scorer: str, structure: str, device: str) -> Pruner:
    (x, y), _, _ = Digits().load()
    timed = build(Schedule, "cubic", final=0.5, every=2, end=0.75)
    pruner = Pruner(test_contract.scoring(scorer, structure), timed, structure, "uniform", misfit="dense")
    *_, model = test_contract.train(pruner, (x.to(device), y.to(device)), False, structure)
    assert {weight.device.type for weight in model.parameters()} == {device}
    return pruner


PAIRS = [
    (scorer, structure)
    for scorer in test_contract.SCORERS
    for structure in test_contract.STRUCTURES
    if not (scorer == "reap" and structure != "expert")
    and not (structure in ("expert", "layer") and scorer in ("hardconcrete", "softthreshold"))
]


@on_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("scorer", "structure"), PAIRS)
def test_every_scorer_and_structure_on_a_gpu(scorer: str, structure: str) -> None:
    """As many weights are kept as on the CPU, and almost the same ones: sums are taken in another order."""
    ours, theirs = (contract(scorer, structure, device) for device in ("cuda", "cpu"))
    assert ours.at_target and ours.kept == theirs.kept
    for param in ours.params:
        assert param.mask.device.type == "cuda" and not param.weight[~param.mask].any()
    same = sum(int((a.mask.cpu() == b.mask).sum()) for a, b in zip(ours.params, theirs.params, strict=True))
    # gates are sampled, by another generator; the scores of queries and keys are what rounding leaves of zeros
    drawn = scorer in ("hardconcrete", "synflow")
    assert same >= (0.6 if drawn else 0.9 if structure != "feature" else 0.75) * ours.numel


@on_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", test_methods.METHODS)
def test_every_method_is_deterministic_on_a_gpu(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, and resumes bit for bit, where every operation has to be deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = [*test_methods.QUICK, "trainer.accelerator=gpu", "+trainer.deterministic=true"]
    monkeypatch.setattr(test_methods, "QUICK", settings)
    try:
        test_methods.test_every_method(method, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["magnitude_oneshot", "movement", "rigl", "srste", "l0"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_on_a_gpu(method: str, precision: str, tmp_path: Path) -> None:
    cfg = test_methods.config(
        tmp_path, f"method={method}", *test_methods.QUICK, "trainer.accelerator=gpu", f"trainer.precision={precision}"
    )
    metrics = train(cfg)
    assert metrics["at_target"] and metrics["device"].startswith("cuda")


@on_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        ["quantization=int8", "export=[onnx_int8]"],
        ["quantization=int4_weight"],
        ["structure=channel", "export=[onnx,safetensors,csr,torch_export]"],
        ["model=resnet20", "model.width=8", "structure=coupled", "trainer.limit_train_batches=2"],
        ["model=resnet20", "model.width=8", "target=macs", "target.macs=0.5", "trainer.limit_train_batches=2"],
        ["model=vit_tiny", "structure=head", "sparsity=0.5", "shrink_every=2"],
        ["model=vit_tiny", "structure=nm24", "misfit=dense", "hardware=hopper", "export=[semi_structured]"],
        ["callbacks=ema", "front=true", "schedule=staircase", "levels=[0.5,0.8]"],
        ["regularizer=latency"],
        ["scorer=movement", "structure=nm24"],
    ],
    ids="-".join,
)
def test_a_run_on_a_gpu(settings: list[str], tmp_path: Path) -> None:
    cfg = test_methods.config(tmp_path, *test_methods.QUICK, "trainer.accelerator=gpu", *settings)
    metrics = train(cfg)
    assert metrics["device"].startswith("cuda") and 0 < metrics["sparsity"] < 1


@on_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"masking": "ste"}, {"scorer": "movement"}, {"scorer": "hardconcrete"}], ids=str
)
def test_after_training_masks_are_where_the_model_is(options: dict[str, Any], tmp_path: Path) -> None:
    """The strategy moves the model to the GPU and back: masks, gates and values follow, and training goes on."""
    data = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 4), 4)
    module = Small()
    for _ in range(2):
        sparsity = Sparsity(sparsity=0.5, **options)
        Trainer(
            max_epochs=3, accelerator="gpu", callbacks=[sparsity], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, default_root_dir=tmp_path,
        ).fit(module, data)  # fmt: skip
        pruner = sparsity.pruner
        assert {param.weight.device.type for param in pruner.params} == {"cpu"}
        assert devices(pruner) == {"cpu"}
        assert not any(param.weight[~param.mask].any() for param in pruner.params)
        assert 0 < summarize(pruner, module).sparsity < 1 and pruner.state_dict()
        module(torch.randn(2, 1, 8, 8))


def devices(pruner: Pruner) -> set[str]:
    """Of all that belongs to weights and gates."""
    held = [t for p in pruner.masked for t in (p.mask, p.latent, p._factor, p._bits, *p.state.values())]
    for group in pruner.groups:
        if group.gate is not None:
            memory = group.gate.optimizer.state[group.gate.value]
            held += [group.gate.value, group.gate.multipliers, *(t for key, t in memory.items() if key != "step")]
    return {tensor.device.type for tensor in held if tensor is not None}


@pytest.mark.parametrize(
    "scorer", ["magnitude", "movement", "hardconcrete", "softmovement", "softthreshold", "momentum"]
)
def test_all_that_belongs_to_weights_moves_with_them(scorer: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    pruner = Pruner(scorer, schedule=Cubic(final=0.5, every=1, end=1.0))
    pruner.attach(net)
    pruner.prepare(6)
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(4):
        pruner.before_forward()
        optimizer.zero_grad()
        net(torch.randn(4, 8)).square().mean().backward()
        pruner.before_step(step, 6, optimizer)
        optimizer.step()
        pruner.after_step()
    assert devices(pruner) == {"cpu"}
    for param in pruner.params:
        param.weight = nn.Parameter(param.weight.detach().to("meta"))
    pruner.to_weights()
    assert devices(pruner) == {"meta"}


@on_gpu
def test_a_model_on_two_devices() -> None:
    def masks(allocation: str, *devices: str, tied: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(64, 64).to(device) for device in devices))
        for layer in net if tied else ():
            layer.weight.data.mul_(50).round_()
        pruner = Pruner(sparsity=0.9, schedule="constant", allocation=allocation)
        pruner.attach(net)
        pruner.prepare(10)
        pruner.advance()
        return [param.mask.cpu() for param in pruner.params]

    for allocation, tied in product(("global", "uniform", "erk", "lamp"), (False, True)):
        apart, together = (masks(allocation, "cpu", device, "cpu", tied=tied) for device in ("cuda", "cpu"))
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@on_gpu
@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
def test_a_cuda_graph_of_the_masked_step(masking: str) -> None:
    """Captured once, optimizer included; masks that are set between replays are those that it computes with."""
    inputs = torch.randn(12, 8, 32, generator=torch.Generator().manual_seed(1)).cuda()

    def trained(graphed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2, capturable=True)
        pruner = Pruner(schedule=Cubic(final=0.9, begin=0, end=1.0, every=4), masking=masking)
        pruner.attach(net)
        pruner.prepare(12)
        x = inputs[0].clone()

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            net(x).square().mean().backward()
            pruner.before_step(None, None, optimizer)
            optimizer.step()
            pruner.after_step()

        pruner.step = 4
        pruner.advance()  # masks are there before the capture
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                step()
        for number in range(5, 12):
            x.copy_(inputs[number])
            pruner.step = number
            pruner.advance()
            graph.replay() if graphed else step()
        return [tensor.detach().cpu() for param in pruner.params for tensor in (param.mask, param.weight)]

    captured, plain = trained(True), trained(False)
    assert all(
        torch.equal(a, b) if a.dtype == torch.bool else torch.allclose(a, b, atol=1e-6)
        for a, b in zip(captured, plain, strict=True)
    )


@on_gpu
@pytest.mark.parametrize("structure", ["unstructured", "nm24", "nm24t", "row", "block4x4", "channel", "kernel"])
@pytest.mark.parametrize("masking", sorted(set(catalogue(Masking)) - {"gated", "softthresholded"}))
def test_no_step_waits_for_a_gpu(structure: str, masking: str) -> None:
    """A step without new masks does not; an update does once per tensor at most."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.Tanh()))).cuda()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    pruner = Pruner(schedule=Cubic(final=0.5, every=2, end=1.0), structure=structure, masking=masking, last=True)
    x = torch.randn(16, 64, device="cuda")
    pruner.attach(net, x)
    pruner.prepare(20)
    for number in range(12):
        optimizer.zero_grad()
        before = pruner.num_updates
        with Waits() as waits:
            pruner.before_forward()
            net(x).square().mean().backward()
            pruner.before_step(number, 20, optimizer)
            optimizer.step()
            pruner.after_step()
        if number > 5:
            most = 0 if pruner.num_updates == before else len(pruner.params)
            assert waits.count <= most, (number, waits.count)


class Waits:
    """How often the host waits for the GPU within the block."""

    def __enter__(self) -> "Waits":
        self.caught = warnings.catch_warnings(record=True)
        self.found = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(*error)  # type: ignore[arg-type]

    @property
    def count(self) -> int:
        return sum("synchroniz" in str(warning.message) for warning in self.found or [])
