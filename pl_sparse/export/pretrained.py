"""Folders that hold a pruned model of Hugging Face: weights, configuration, the removed parts, and a page; no
pickle."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.files import replacing, write_text
from pl_sparse.core.optional import library, missing
from pl_sparse.export.card import CARD, Card, typed
from pl_sparse.export.format import Executable, Export
from pl_sparse.network.attention import HEAD_COUNTS
from pl_sparse.network.hooks import called, hooked, stand_ins
from pl_sparse.structure import Structure
from pl_sparse.surgery.plan import RemovalPlan
from pl_sparse.surgery.saved import load_shrunk, save_shrunk
from pl_sparse.surgery.shrink import shrink

__all__ = ["HuggingFace", "from_pretrained", "save_pretrained"]

_PLAN = "shrunk.json"
_TRIES = 64
"""Configurations that are tried."""
_TOLERANCE = 1e-4


def save_pretrained(
    model: Any, plan: RemovalPlan, folder: str | os.PathLike[str], example: Any, card: Card | None = None
) -> bool:
    """Write a shrunk model of transformers to a folder that can be pushed to the hub: weights, configuration, page.

    If the model's class can make the remaining sizes from a configuration (the same number of neurons in all layers,
    heads of Llama), the configuration has these sizes, and `from_pretrained` of transformers loads the folder.
    Otherwise the configuration is unchanged, shrunk.json lists the removed parts, and
    `pl_sparse.export.from_pretrained` loads the folder; transformers refuses its shapes. The tokenizer or image
    processor of the original model is copied, if it is found.

    Args:
        model: a PreTrainedModel from which the plan's parts were removed.
        plan: the removed parts, with names of this model (`shrink(model, ...).plan`).
        folder: the folder, which is made if it does not exist.
        example: inputs, as the model is called with: a tensor, a tuple of arguments or a dict of keywords. With them
            outputs are compared.
        card: the contents of the page.

    Returns:
        whether transformers alone loads the folder.

    Raises:
        ValueError: the model is not one of transformers, or the written model has other outputs.
    """
    if not _is_pretrained(model):
        raise ValueError(f"a {type(model).__name__} is not a PreTrainedModel of transformers: use save_shrunk")
    folder, training = Path(folder), model.training
    model.eval()
    try:
        plain = _resized(model, plan, example) if plan else model
        with tempfile.TemporaryDirectory() as temporary:
            (model if plain is None else plain).save_pretrained(temporary)
            if plain is None:
                save_shrunk(model, plan, temporary)
            _save_preprocessing(model, temporary)
            for name in () if plain is None else (_PLAN,):
                (folder / name).unlink(missing_ok=True)
            for file in sorted(Path(temporary).iterdir()):
                with replacing(folder / file.name) as path:
                    shutil.copyfile(file, path)
        error = _apart(from_pretrained(folder), model, example)
    finally:
        model.train(training)
    if not error <= _TOLERANCE:
        raise ValueError(f"the outputs of the model in {folder} differ by {error:.1e} of the largest")
    name = f'"{folder.resolve().name}"'
    load = f"from pl_sparse.export import from_pretrained\n\nmodel = from_pretrained({name})"
    if plain is not None:
        load = (
            f"from transformers import {type(model).__name__}\n\nmodel = {type(model).__name__}.from_pretrained({name})"
        )
    card = replace(card or Card(), load=load, library="transformers")
    card = card if card.base else replace(card, base=_hub_name(model))
    card.write(model, plan, folder)
    return plain is not None


def from_pretrained(name: str | os.PathLike[str]) -> Any:
    """The model that `save_pretrained` wrote, in evaluation mode.

    Args:
        name: the folder, or its name on the hub.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such folder, and the hub has none of this name.
        ValueError: the folder is damaged, or its class is not one of transformers.
    """
    transformers = library("transformers", "from_pretrained", "transformers")
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(str(name))
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = next(iter(config.architectures or ()), None)
    made = getattr(transformers, str(kind), None)
    if made is None:
        raise ValueError(f"{folder / 'config.json'} names {kind} under `architectures`: transformers has no such class")
    if not (folder / _PLAN).is_file():
        return made.from_pretrained(folder).eval()
    model = made(config)
    load_shrunk(model, folder)
    return model.eval()


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name} is neither a folder nor a model that the hub provides: {error}") from error


def _is_pretrained(module: object) -> bool:
    """Whether it is a model of transformers; that is not imported for others."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(module, library.PreTrainedModel)


# The configuration


def _resized(model: Any, plan: RemovalPlan, example: Any) -> Any | None:
    """The shrunk model as its class makes it of a configuration; None if no configuration has these sizes."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for config in islice(_configurations(model.config, plan), _TRIES):
        try:
            with torch.device("meta"):
                made = type(model)(config)
            if {name: tensor.shape for name, tensor in made.state_dict().items()} != shapes:
                continue
            made = type(model)(config)
            made.load_state_dict(model.state_dict())
            if _agree(made.eval(), model, example):
                return made
        except Exception:  # whatever a class does with sizes that it cannot have
            continue
    return None


def _agree(one: nn.Module, other: nn.Module, example: Any) -> bool:
    """Whether two models of one shape compute the same: with the weights that they have, and with random ones, which
    tell four heads from two as wide where attention has learned little."""
    if not _apart(one, other, example) <= _TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    with stand_ins(one), stand_ins(other):
        tensors = dict(other.named_parameters())
        for name, parameter in one.named_parameters():
            if parameter.dim() > 1:
                scale = parameter[0].numel() ** -0.5
                parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
                tensors[name].data = parameter.data
        return _apart(one, other, example) <= _TOLERANCE


def _configurations(config: Any, plan: RemovalPlan) -> Iterator[Any]:
    """Copies of a configuration in which numbers that layers have lost are what is left."""
    sizes = {(b, a) for cut in plan.tensors.values() for b, a in zip(cut.shape, cut.left, strict=True) if a != b}
    found: list[tuple[str, str, int]] = []
    parts = {"": config, **{key: value for key, value in vars(config).items() if hasattr(value, "to_dict")}}
    for part, values in parts.items():
        for key, value in vars(values).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 2:
                continue
            left = {a for b, a in sizes if b == value}
            if key in HEAD_COUNTS:
                left |= {value * a // b for b, a in sizes if b % value == 0 and value * a % b == 0}
            found += [(part, key, number) for number in sorted(left)]
    for count in range(1, len(found) + 1):
        for chosen in combinations(found, count):
            if len({(part, key) for part, key, _ in chosen}) < count:
                continue
            changed = copy.deepcopy(config)
            for part, key, number in chosen:
                setattr(getattr(changed, part) if part else changed, key, number)
            yield changed


@torch.no_grad()
def _apart(one: nn.Module, other: nn.Module, example: Any) -> float:
    """How far the outputs of two models are apart, as a part of the largest."""
    outputs = [called(model.eval(), example) for model in (one, other)]
    pairs = [(a.float(), b.float()) for a, b in zip(*outputs, strict=True) if a.is_floating_point()]
    largest = max((float(b.abs().max()) for _, b in pairs), default=0.0)
    return max((float((a - b).abs().max()) for a, b in pairs), default=float("inf")) / max(largest, 1e-12)


# What goes along


def _save_preprocessing(model: Any, folder: str) -> None:
    """Save the tokenizer or image processor that is found where a model came from, if there is one."""
    import transformers

    source = model.name_or_path
    for auto in (transformers.AutoTokenizer, transformers.AutoImageProcessor) if source else ():
        try:
            auto.from_pretrained(source, local_files_only=True).save_pretrained(folder)
        except Exception:  # there is none, or what it needs is missing
            continue


def _hub_name(model: Any) -> str:
    """The name on the hub of what a model was made of; "" for one of a folder."""
    name = str(model.name_or_path or "")
    return "" if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "~", "/")) else name


# A format of runs


class HuggingFace(Export):
    """A folder that `from_pretrained` loads and that can be pushed to the hub, for networks that hold a model of
    transformers: channels and heads that are all zero are removed. See `save_pretrained`."""

    file = "hugging_face"
    advice = "channels and heads that are gone (structure=coupled, structure=head)"

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        if (advice := missing("transformers", "transformers")) is not None:
            return advice
        if _within(net) is None:
            return f"it writes models of transformers, and in {type(net).__name__} there is none"
        return None

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        smaller = copy.deepcopy(net).eval()
        removal = shrink(smaller, example[:2])
        found = _within(smaller)
        if found is None:
            raise ValueError(f"{type(net).__name__} contains no model of transformers")
        prefix, model = found
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with hooked([model], pre=lambda _, args, kwargs: calls.append((args, kwargs))):
            smaller(example[:2])
        plan = removal.plan.below(f"{prefix}." if prefix else "")
        args, kwargs = calls[0]
        plain = save_pretrained(model, plan, path, kwargs if kwargs else args, Card(command=typed()))
        how = "transformers" if plain else "pl_sparse.export.from_pretrained"
        return [f"loaded by {how}", *(f"{layer} stays: {reason}" for layer, reason in removal.left.items())]

    def open(self, path: Path, net: nn.Module) -> Executable:
        opened = copy.deepcopy(net).eval()
        found = _within(opened)
        if found is None:
            raise ValueError(f"{type(net).__name__} contains no model of transformers")
        model = from_pretrained(path)
        if not found[0]:
            return model
        opened.set_submodule(found[0], model)
        return opened

    def size(self, path: Path) -> int:
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def conclude(self, path: Path, verdict: str) -> None:
        page = (path / CARD).read_text(encoding="utf-8")
        write_text(path / CARD, f"{page.partition('## Measured')[0].rstrip()}\n\n## Measured\n\n{verdict}\n")


def _within(net: nn.Module) -> tuple[str, Any] | None:
    """The first model of transformers in a network, with its path."""
    return next(((path, module) for path, module in net.named_modules() if _is_pretrained(module)), None)
