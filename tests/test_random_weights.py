"""Random weights that are made while they are read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pl_sparse import Pruner
from pl_sparse.core.cut import Cut
from pl_sparse.surgery import trial
from pl_sparse.surgery.random_weights import RandomWeights


def test_a_random_weight_is_the_same_wherever_it_is_read_and_no_channel_is_another() -> None:
    layer = nn.Conv2d(6, 8, 3)
    with RandomWeights() as weights, torch.no_grad():
        weights.randomize(layer.weight)
        assert layer.weight.untyped_storage().nbytes() == 4 and layer.weight.shape == (8, 6, 3, 3)
        whole = layer.weight.clone()
        assert torch.equal(whole, layer.weight * 1) and whole.untyped_storage().nbytes() == 4 * 8 * 6 * 9
        for channels in (whole.flatten(1), whole.transpose(0, 1).flatten(1)):
            likeness = torch.corrcoef(channels) - torch.eye(len(channels))
            assert likeness.abs().max() < 0.9 and (channels.abs().sum(1) > 0).all()
        assert weights.silence(layer.weight, 0, [1, 3]) and not weights.silence(layer.bias, 0, [1])
        cut = Cut((8, 6, 3, 3), {1: (0, 5)})
        assert weights.cut(layer.weight, cut).shape == (8, 4, 3, 3)
        expected = whole.clone()
        expected[[1, 3]] = 0
        assert torch.equal(layer.weight * 1, expected[:, 1:5])


@pytest.mark.parametrize("shape", [(8, 16, 1, 1), (64, 32, 3, 3), (16, 1, 3, 3), (7, 300), (4, 4, 1, 5, 1)])
def test_no_more_random_numbers_are_drawn_than_a_weight_has(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes, **more: drawn.append(sizes[0]) or randn(*sizes, **more))
    weight, weights = nn.Parameter(torch.ones(shape)), RandomWeights()
    weights.randomize(weight)
    assert drawn[0] <= weight.numel()
    with weights, torch.no_grad():
        assert (torch.corrcoef((weight * 1).flatten(1)) - torch.eye(shape[0])).abs().max() < 0.99


def test_attaching_holds_no_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the model under trial has more memory than its largest; one is made at a time."""
    net = nn.Sequential(nn.Linear(64, 256), *[nn.Linear(256, 256) for _ in range(8)], nn.Linear(256, 5))
    held: list[int] = []
    called = trial.called

    def looking(model: nn.Module, inputs: object) -> list[torch.Tensor]:
        out = called(model, inputs)
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        held.append(sum(storages.values()))
        return out

    monkeypatch.setattr(trial, "called", looking)
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in net.named_parameters()}
    pruner = Pruner("magnitude", "oneshot", "coupled", "uniform", sparsity=0.5)
    pruner.attach(net, torch.randn(2, 64))
    assert len(pruner.groups) == 9 and held
    assert max(held) < 0.02 * sum(4 * parameter.numel() for parameter in net.parameters())
    for name, parameter in net.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])


WRAPPED = """
import sys, tempfile, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pl_sparse import Pruner

class Skips(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rare, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)

    def forward(self, x, rare=True):
        x = self.first(x).relu()
        return self.last(x + self.rare(x).relu() if rare else x)

def work(rank, file):
    dist.init_process_group("gloo", f"file://{{file}}", rank=rank, world_size=2)
    net = Skips()
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    node = lambda p: p.expand_as(p).grad_fn.next_functions[0][0]
    nodes = [node(p) for p in net.parameters()]
    pruner = Pruner("taylor", "cubic", "coupled", "global", sparsity=0.5)
    pruner.attach(wrapped, torch.randn(2, 8))
    assert all(node(p) is n for p, n in zip(net.parameters(), nodes))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(rank)
    for step in range(6):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 8), rare=rank == 0 or step % 2 == 0).square().mean().backward()
        pruner.before_step(step, 6, optimizer)
        optimizer.step()
        pruner.after_step()
    assert 0.4 < pruner.sparsity < 0.6 and any(not p.mask.all() for p in pruner.params)
    for param in pruner.masked:
        for tensor in (param.mask.float(), param.weight.detach()):
            both = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(both, tensor.contiguous())
            assert torch.equal(*both), param.name
    sys.stdout.write("equal\\n")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (tempfile.mktemp(),), nprocs=2)
"""


def test_attaching_after_ddp_leaves_autograd_nodes_alone_and_ranks_agree(tmp_path: Path) -> None:
    script = tmp_path / "wrapped.py"
    script.write_text(WRAPPED.replace("{{", "{").replace("}}", "}"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.count("equal") == 2, done.stdout + done.stderr[-3000:]
