"""The callback that trains a module to imitate a teacher."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pl_sparse.callbacks.strategies import refuse_parts
from pl_sparse.core.compact import expand_weights
from pl_sparse.core.upstream import override, plain_name, restore

__all__ = ["Distill", "distillation"]


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_teacher || p_student) with p = softmax(logits / T), in float32: the mean over all but the classes.

    T^2 keeps its gradient as large as that of the cross-entropy at any temperature.

    Source: Hinton, Vinyals, Dean, Distilling the knowledge in a neural network, 2015, arXiv:1503.02531, section 2.

    Args:
        student: logits, (batch, ..., classes).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T, above 0.

    >>> teacher = torch.tensor([[0.75, 0.25]]).log()  # against 1/2, 1/2: log 2 less the teacher's entropy
    >>> round(distillation(torch.zeros(1, 2), teacher, temperature=1.0).item(), 4)
    0.1308
    """
    p = F.log_softmax(teacher.detach().float().flatten(0, -2) / temperature, dim=-1)  # (samples, classes)
    q = F.log_softmax(student.float().flatten(0, -2) / temperature, dim=-1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


class Distill(Callback):
    """Adds the imitation of a trained, dense teacher to the loss of any LightningModule.

    (1 - hardness) loss + hardness T^2 KL(p_teacher || p_student)

    loss is what `training_step` returns, label smoothing included. Each time the student network is called in it, the
    teacher gets the same inputs, in evaluation mode and without gradients. It is not part of the module: optimizers,
    checkpoints and pruning do not contain it. The divergence is logged as "train/distillation".

    Source: Sanh, Wolf, Rush, Movement pruning, 2020, arXiv:2005.07683, section 6, with hardness 0.5 and temperature 2.

    Args:
        teacher: the folder of a run, a Lightning checkpoint or a safetensors file of the student's own architecture; in
            Python also any network with the student's inputs and outputs.
        hardness: the weight of the teacher's term, in [0, 1].
        temperature: softens both distributions, above 0.
        student: the name of the submodule whose output are logits (or has them as `.logits`); "" for the module itself.

    Raises:
        FileNotFoundError: there is no such file, or no model in the folder.
        ValueError: a number is out of range; at the start of training, the teacher has other weights or outputs.
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module,
        hardness: float = 0.5,
        temperature: float = 2.0,
        student: str = "net",
    ) -> None:
        if not 0 <= hardness <= 1:
            raise ValueError(f"hardness={hardness!r} must be in [0, 1]: the share of the teacher")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r} must be positive")
        self.teacher = teacher if isinstance(teacher, nn.Module) else _file(Path(teacher))
        self.hardness = hardness
        self.temperature = temperature
        self.student = student
        self._net: nn.Module | None = None
        self._divergences: list[Tensor] | None = None
        self._handle: RemovableHandle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parts(pl_module, type(self).__name__)
        try:
            student = pl_module.get_submodule(self.student)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"distillation takes the logits of {self.student!r}, which {type(pl_module).__name__} does not have. "
                f"Give student=..., one of: {names}"
            ) from error
        if isinstance(self.teacher, nn.Module):
            net = self.teacher
        else:
            net = copy.deepcopy(student)
            _load(net, self.teacher, self.student)
        self._net = net.requires_grad_(False).eval().to(pl_module.device)
        self._handle = student.register_forward_hook(self._compare, with_kwargs=True)
        self._wrap(pl_module)

    def _wrap(self, pl_module: LightningModule) -> None:
        """Let `training_step` return the loss with the teacher's part, until the end of training."""
        step = pl_module.training_step

        @functools.wraps(step)
        def distilled(*args: Any, **kwargs: Any) -> Any:
            self._divergences = []
            try:
                out = step(*args, **kwargs)
                divergences = self._divergences
            finally:
                self._divergences = None
            loss = out["loss"] if isinstance(out, Mapping) else out
            if loss is None:
                return out
            if not divergences:
                raise ValueError(
                    f"training_step did not call {self.student!r}, whose logits distillation compares: give student=..."
                )
            divergence = torch.stack(divergences).mean()
            pl_module.log("train/distillation", divergence.detach(), on_step=False, on_epoch=True)
            loss = (1 - self.hardness) * loss + self.hardness * divergence
            return {**out, "loss": loss} if isinstance(out, Mapping) else loss

        override(pl_module, "training_step", distilled)

    def _compare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the student's forward: the teacher's on the same inputs, and how far the two are apart."""
        if self._divergences is None:  # not within training_step
            return
        assert self._net is not None
        with torch.no_grad():
            target = _logits(self._net(*args, **kwargs))
        logits = _logits(output)
        if target.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(target.shape)}, the student's {tuple(logits.shape)}: it must "
                "be trained on the same classes"
            )
        self._divergences.append(distillation(logits, target, self.temperature))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            restore(pl_module, "training_step")


def _logits(output: Any) -> Tensor:
    """The logits in what a network returns."""
    return output if isinstance(output, Tensor) else output.logits


def _file(path: Path) -> Path:
    """The file of weights that a path stands for."""
    if path.is_dir():
        if (path / "model.safetensors").is_file():
            return path / "model.safetensors"
        raise FileNotFoundError(f"teacher={path} has no model.safetensors: it is the folder of no finished run")
    if not path.is_file():
        raise FileNotFoundError(
            f"teacher={path} is not a file: give the folder of a run, or a .ckpt or .safetensors file"
        )
    return path


def _load(net: nn.Module, path: Path, name: str) -> None:
    """Load the weights of a checkpoint, those of its submodule `name`, or of a safetensors file."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(path)
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        tensors = checkpoint.get("state_dict", checkpoint)
        expand_weights(tensors)
    prefix = f"{name}." if name else ""
    if prefix and any(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        net.load_state_dict({plain_name(key): value for key, value in tensors.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[1:4]
        raise ValueError(
            f"teacher={path} has another model or other classes than the student: {' '.join(map(str.strip, reason))}"
        ) from error
