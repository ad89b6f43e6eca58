"""Each architecture of the zoo trains for integers and is exported with them, or is refused before training."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.training import quiet_trainer
from pl_sparse import Sparsity
from pl_sparse.callbacks import Quantize
from pl_sparse.export import ONNX, ONNXInt8
from pl_sparse.quantize import Int8, integers
from zoo import architectures as _architectures  # noqa: F401  each adds its rows
from zoo import hugging_face, others, packages  # noqa: F401
from zoo.integers import Lit, of_noise, of_one_tensor, stored
from zoo.removal import Architecture, architectures, everything

BATCHES = 4
QUICK = ("GPT-2", "GRU", "LSTM with projections")
REFUSALS = (
    r"torch\.export cannot trace \w+ for batches of any size \((?P<why>.*)\)\. What",
    r"(?P<why>quantization traces networks with one input tensor, and a training batch is a \w+ that does not begin "
    r"with a tensor)",
    r"\w+ (?P<why>cannot be called with one tensor), a batch's first",
    r"\w+ (?P<why>returns other things in training than in evaluation)",
    r"\w+ (?P<why>has no layer that is quantized)",
    r"\w+ (?P<why>writes to its weight) ",
)


def same(batch: Any) -> Any:
    return batch


def train(net: nn.Module, batches: list[Any], folder: Path) -> tuple[Sparsity, Quantize, list[str], str | None]:
    """Half of the weights masked, then integers; with what was warned of, and what refused it before training."""
    sparsity = Sparsity(sparsity=0.5, schedule="oneshot", allocation="uniform", misfit="dense", report=False)
    quantize = Quantize(Int8(), begin=0.5, freeze=0.75)
    trainer = quiet_trainer(max_epochs=1, default_root_dir=folder, callbacks=[sparsity, quantize])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(Lit(net.train()), DataLoader(batches, batch_size=None, collate_fn=same))
        except ValueError as error:
            if trainer.global_step:
                raise
            return sparsity, quantize, [], str(error)
    return sparsity, quantize, [str(warning.message) for warning in caught], None


def left(told: list[str]) -> dict[str, str]:
    """The parameters that stay in floating point, as it was said, with what reads them."""
    listed = {}
    for message in told:
        if match := re.match(r"in floating point stay (.*): quantization=int8 finds", message):
            for names, operation in re.findall(r"([^;]*) \(read by (\w+)\)(?:; )?", match[1]):
                listed.update(dict.fromkeys(names.split(", "), operation))
    return listed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", architectures(QUICK))
def test_it_trains_for_integers(one: Architecture, tmp_path: Path, record_property: Any) -> None:
    pytest.importorskip(one.imported, exc_type=ImportError)
    torch.manual_seed(0)
    case = one.make()
    if case.made is not None:
        case.made(case.module)
    net, draw = of_one_tensor(case)
    batches = [draw() for _ in range(BATCHES)]
    row = {"index": everything().index(one), "of": len(everything()), "module": one.name}
    row["package"] = f"{one.package} {version(one.package)}"
    sparsity, quantize, told, refused = train(net, batches, tmp_path)
    if refused is not None:
        known = next((match for pattern in REFUSALS if (match := re.match(pattern, refused))), None)
        assert known is not None, refused
        record_property("int8", {**row, "refused": known["why"]})
        return

    net.eval()
    x, floats = batches[0], left(told)
    with torch.no_grad():
        simulated, converted = net(x), quantize.quantization.convert()
        plain = type(net).forward(net, x)
        largest = simulated.abs().max()
        rounded = float((converted(x) - simulated).abs().max() / largest)
    assert rounded < max(0.15, 4 * of_noise(net, x))
    found = integers(converted, net)
    masks = {param.name.removeprefix("net."): param.mask for param in sparsity.pruner.params}
    for name, values in found.items():
        assert values.dtype == torch.int8 and not (name in masks and values[~masks[name]].any())
    matrices = {name: weight for name, weight in net.named_parameters() if weight.dim() > 1}
    parts = set(matrices) - set(found) - set(floats)  # scales of a computed matrix, which are in its integers
    assert found and not set(found) & set(floats)
    assert all(matrices[name].numel() < max(values.numel() for values in found.values()) for name in parts)

    row |= {
        "matrices": len(found),
        "floats": floats,
        "error": (rounded, float((plain - simulated).abs().max() / largest)),
    }
    file, export = tmp_path / ONNXInt8.file, ONNXInt8(tolerance=max(0.1, 4 * of_noise(net, x)))
    try:
        row["note"] = re.search(r"by at most (\S+) of", export.write(converted, x, file)[0])[1]  # type: ignore[index]
    except Exception as error:  # of the exporter or the runtime, which fail in floating point too
        if isinstance(error, ValueError):
            raise
        quantize.quantization.release()
        with pytest.raises(type(error)):
            ONNX().write(net, x, tmp_path / "float.onnx")
        row["note"] = f"{type(error).__name__}, in floating point too"
    else:
        held, size = stored(file)
        zeros = Counter(int((values == 0).sum()) for values in found.values())
        stand = Counter(int((matrix == 0).sum()) for matrix in held)  # one that is read twice stands there twice
        assert stand >= zeros and stand.keys() == zeros.keys()
        row["bytes"] = sum(4 * value.numel() for value in [*net.parameters(), *net.buffers()]), size
    record_property("int8", row)
