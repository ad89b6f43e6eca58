"""The examples of other loops run, and what they promise holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pl_sparse import Pruner
from pl_sparse.schedule import OneShot
from pl_sparse.structure import Channel, Head

EXAMPLES = Path(__file__).parent.parent / "examples"
HEAD = "bert.pooler.dense"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zeros(tensors: dict[str, torch.Tensor], names: list[str]) -> float:
    count = sum(tensors[name].numel() for name in names)
    return sum(int((tensors[name] == 0).sum()) for name in names) / count


def test_a_plain_loop_resumes_exactly() -> None:
    whole, resumed, pruner = example("plain_loop").main()
    assert zeros(resumed.state_dict(), [param.name for param in pruner.params]) == pytest.approx(0.8, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("layer", [0, 2])
def test_nothing_passes_in_a_plain_loop(layer: int, begin: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    with torch.no_grad():
        model[layer].weight.mul_(1e-6)
    pruner = Pruner(schedule=OneShot(final=0.9, begin=f"{begin} steps"), allocation="global")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with pytest.raises(
        RuntimeError, match=rf"nothing passes .* after {begin + bool(begin)} .*: {layer}.weight kept no"
    ):
        train(model, optimizer, pruner, range(8), 8)
    assert pruner.step == begin + bool(begin)  # no step was taken with the masks, but the one that they came in
    before = model[1].running_mean.clone()
    model.eval()(torch.randn(4, 16))
    assert torch.equal(model[1].running_mean, before)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x + self.inner(x))


def test_a_layer_that_dies_beside_others_is_a_warning_in_a_plain_loop() -> None:
    model = Skip()
    with torch.no_grad():
        model.inner.weight.mul_(1e-6)
    pruner = Pruner(schedule="oneshot", sparsity=0.9, allocation="global")
    with pytest.warns(UserWarning, match="inner.weight kept no weight at a sparsity of 0.9000 and pass nothing on"):
        train(model, torch.optim.SGD(model.parameters(), 0.1), pruner, range(8), 8)
    assert pruner.step == 8 and not model._forward_hooks


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: range, total: int) -> None:
    example("plain_loop").train(model, optimizer, pruner, steps, total)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("begin", [0.0, 0.5])
def test_nothing_passes_in_hugging_face_s_trainer(tmp_path: Path, begin: float) -> None:
    pytest.importorskip("accelerate")
    hugging_face = example("bert_hugging_face")
    trainer, sparsity = hugging_face.make_trainer(str(tmp_path))
    sparsity.pruner = Pruner(schedule=OneShot(final=0.5, begin=begin), allocation="global")
    model = trainer.model
    with torch.no_grad():  # through which all goes
        model.get_submodule(HEAD).weight.mul_(1e-9)
    with pytest.raises(RuntimeError, match=rf"nothing passes through the network after .*{HEAD}.weight kept no"):
        trainer.train()
    assert sparsity.pruner.step < 16


@pytest.mark.filterwarnings("ignore")
def test_fabric_has_the_model_s_own_names(tmp_path: Path) -> None:
    pruner = example("fabric").main(tmp_path)
    state = torch.load(tmp_path / "state.ckpt", weights_only=True)
    names = [param.name for param in pruner.params]
    assert names == ["0.weight", "2.weight"] == list(state["pruner"]["params"])
    assert zeros(state["model"], names) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_s_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    hugging_face = example("bert_hugging_face")
    trainer, sparsity = hugging_face.make_trainer(str(tmp_path))
    trainer.train()
    names = [param.name for param in sparsity.pruner.params]
    whole = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert zeros(whole, names) == pytest.approx(0.8, abs=1e-3) and sparsity.pruner.step == 16
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert zeros(saved.state_dict(), names) == pytest.approx(0.8, abs=1e-3)
    resumed, again = hugging_face.make_trainer(str(tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.pruner.step == 16
    assert all(torch.equal(value, whole[name]) for name, value in resumed.model.state_dict().items())
    (tmp_path / "checkpoint-8" / "pl_sparse.pt").unlink()
    with pytest.raises(ValueError, match="SparsityCallback"):
        hugging_face.make_trainer(str(tmp_path))[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", [Head(), Channel(coupled=True)])
def test_hugging_face_s_trainer_has_a_batch_for_structures_that_look_at_joins(structure: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from pl_sparse.integrations.hugging_face import SparsityCallback

    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = transformers.T5ForTokenClassification(transformers.T5Config(**sizes))
    batch = {"input_ids": torch.randint(0, 20, (4, 5)), "labels": torch.randint(0, 2, (4, 5))}
    args = SimpleNamespace(gradient_accumulation_steps=1, output_dir="")
    state = SimpleNamespace(global_step=0, max_steps=4)
    callback, drawn = SparsityCallback(structure=structure, sparsity=0.5), torch.random.get_rng_state()
    loader = DataLoader([{key: value[i] for key, value in batch.items()} for i in range(4)], 4, shuffle=True)
    callback.on_train_begin(args, state, None, model=model, train_dataloader=loader)
    assert len(callback.pruner.groups) == (1 if structure == Head() else 2)  # heads through both layers; neurons
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    main = example("accelerate_loop").main
    whole, pruner = main(tmp_path / "whole")
    main(tmp_path / "half", 0, 10)
    resumed, _ = main(tmp_path / "half", 10)
    names = [param.name for param in pruner.params]
    assert zeros(resumed.state_dict(), names) == pytest.approx(0.8, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("yaml", [False, True])
def test_lightning_s_command_line(tmp_path: Path, yaml: bool) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    settings = ["--trainer.callbacks+=pl_sparse.Sparsity", "--trainer.callbacks.sparsity=0.8"]
    settings += ["--trainer.callbacks.include=['net.0']"]
    if yaml:
        callback = "{class_path: pl_sparse.Sparsity, init_args: {sparsity: 0.8, include: [net.0], structure: block4x4}}"
        (tmp_path / "settings.yaml").write_text(f"trainer:\n  callbacks: [{callback}]\n")
        settings = [f"--config={tmp_path}/settings.yaml"]
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    arguments = ["fit", *settings, *quiet, "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    arguments += [f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(example("lightning_cli").Net, args=arguments, save_config_callback=None)
    assert zeros(cli.model.state_dict(), ["net.0.weight"]) == pytest.approx(0.8, abs=0.01)
    assert zeros(cli.model.state_dict(), ["net.2.weight"]) == 0
