"""What only a GPU shows, and that the benchmark for it runs: at tiny sizes, on the CPU too."""

from typing import Any

import pytest
import torch

from benchmarks import gpu
from pl_sparse import Pruner
from pl_sparse.schedule import Constant

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[pytest.mark.slow] * (part.__name__ == "step"), id=part.__name__) for part in gpu.PARTS],
)
def test_the_benchmark_runs_at_tiny_sizes(part: Any, device: str) -> None:
    found = part(gpu.Bench(device, tiny=True))
    assert found
    if part is gpu.update:
        assert [row["kept"] for row in found.values()] == pytest.approx([0.1, 0.1, 0.5], abs=1e-3)
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
