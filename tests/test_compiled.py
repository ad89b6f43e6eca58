"""A compiled step, optimizer included, under masks that change."""

from typing import Any

import pytest
import torch
from torch import nn

from pl_sparse import Pruner
from pl_sparse.schedule import Cubic


def trained(masking: str, backend: Any, begun: Any = lambda: None) -> list[torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    pruner = Pruner(schedule=Cubic(final=0.9, begin=0.0, end=1.0, every=2), masking=masking)
    pruner.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    call, step = net, optimizer.step
    if backend is not None:
        call, step = torch.compile(net, backend=backend), torch.compile(optimizer.step, backend=backend)
    for number, x in enumerate(torch.randn(12, 8, 16)):
        optimizer.zero_grad(set_to_none=False)
        call(x).square().mean().backward()
        pruner.before_step(number, 12, optimizer)
        step()
        pruner.after_step()
        if number == 1:  # from here on the optimizer has its momentum
            begun()
    assert pruner.num_updates >= 6
    return [tensor for param in pruner.params for tensor in (param.weight.detach().clone(), param.mask.clone())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch compiles parts of itself that are deprecated
@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
def test_a_compiled_step_is_not_compiled_again_at_updates(masking: str) -> None:
    """Neither the model nor the optimizer; and weights are those of a step that is not compiled."""
    graphs, early = list[Any](), list[int]()

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = trained(masking, counting, lambda: early.append(len(graphs)))
    assert early[0] >= 2 and len(graphs) == early[0]
    assert all(torch.equal(a, b) for a, b in zip(compiled, trained(masking, None), strict=True))
