"""Classifiers of timm and of Hugging Face, with the preprocessing of images that they were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.optional import beginning, library
from pl_sparse.core.registry import near_misses, suggestion
from pl_sparse.tasks.hugging_face import pretrained_from, transformers_library
from pl_sparse.tasks.text import freeze_embeddings_of, sentences

__all__ = ["Preprocessing", "huggingface", "timm_model"]


@dataclass(frozen=True)
class Preprocessing:
    """What a model's images went through in its training.

    Args:
        shape: (channels, height, width).
        mean: of each channel, of images in [0, 1].
        std: of each channel.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def timm_model(
    *,
    name: str,
    classes: int,
    shape: Sequence[int] | None = None,
    pretrained: bool | str = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A classifier of timm. Its `preprocessing` goes to data that can be adapted to it.

    Args:
        name: the name of a model of timm, such as "resnet18".
        classes: outputs.
        shape: (channels, height, width) of an input; None for the model's own.
        pretrained: False for new weights, True for those of the hub or of its cache, or a file of weights.
        options: what timm.create_model takes besides, by name: `{"drop_rate": 0.1}`.

    Raises:
        ImportError: the extra `timm` is missing.
        FileNotFoundError: the weights are missing.
        ValueError: there is no such model, or it does not take the options.
    """
    timm = library("timm", "model=timm", "timm")
    known = timm.list_models()
    if not name.startswith("hf-hub:") and name.partition(".")[0] not in known:
        close = near_misses(name, known)
        raise ValueError(f"name={name} is not a model of timm. {suggestion(name, close) if close else ''}".strip())
    settings = {**(options or {}), "pretrained": bool(pretrained), "num_classes": classes}
    if isinstance(pretrained, str):
        path = Path(pretrained).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"pretrained={pretrained} is not a file of weights")
        settings["pretrained_cfg_overlay"] = {"file": str(path)}
    own = timm.get_pretrained_cfg(name.removeprefix("hf-hub:"), allow_unregistered=True)
    size = tuple(getattr(own, "input_size", None) or (3, 224, 224))
    if shape is not None:
        settings["in_chans"] = shape[0]
    try:
        if shape is not None and tuple(shape[1:]) != size[1:]:
            model = _of_size(timm, name, tuple(shape[1:]), settings)
        else:
            model = timm.create_model(name, **settings)
    except TypeError as error:
        raise ValueError(f"name={name} does not take options={dict(options or {})}: {beginning(error)}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ValueError(f"name={name}: {beginning(error)}") from error
        raise FileNotFoundError(
            f"name={name}: its pretrained weights are neither in the cache nor can they be loaded "
            f"({beginning(error)}): give pretrained=FILE, or pretrained=false for new ones"
        ) from error
    facts = timm.data.resolve_model_data_config(model)
    model.preprocessing = Preprocessing(tuple(shape or facts["input_size"]), tuple(facts["mean"]), tuple(facts["std"]))
    made: nn.Module = model
    return made


def _of_size(timm: Any, name: str, size: tuple[int, ...], options: dict[str, Any]) -> Any:
    """A model for images of another size; those that do not ask for it take any."""
    try:
        return timm.create_model(name, img_size=size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **options)


class _Images(nn.Module):
    """From images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def huggingface(*, name: str, classes: int, pretrained: bool = True, freeze_embeddings: bool = False) -> nn.Module:
    """A model of Hugging Face that classifies images or sentences, with a head for `classes`.

    Args:
        name: a folder, or a name on the hub (in the cache alone with HF_HUB_OFFLINE=1).
        classes: outputs.
        pretrained: whether its weights are loaded; False makes new ones of the same configuration.
        freeze_embeddings: whether embeddings of tokens are not trained.

    Raises:
        ImportError: the extra `transformers` is missing.
        FileNotFoundError: there is no such model.
        ValueError: the model classifies neither images nor sentences.
    """
    library = transformers_library()
    config = pretrained_from(library.AutoConfig, name, num_labels=classes)
    kinds = {
        "image": (library.AutoModelForImageClassification, library.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
        "text": (library.AutoModelForSequenceClassification, library.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    }
    kind = next((kind for kind, (_, mapping) in kinds.items() if type(config) in mapping), None)
    if kind is None:
        raise ValueError(
            f"name={name} is a {config.model_type}, which classifies neither images nor sentences: wrap it in a "
            "LightningModule whose training_step computes its loss, and give model._target_=package.Class"
        )
    auto = kinds[kind][0]
    if pretrained:
        options = {"config": config, "ignore_mismatched_sizes": True, "dtype": torch.float32}
        model = pretrained_from(auto, name, **options)
    else:
        model = auto.from_config(config)
    if freeze_embeddings:
        freeze_embeddings_of(model)
    if kind == "text":
        return sentences(model, name)
    made = _Images(model).train()
    size = getattr(config, "image_size", None) or 224
    shape = (getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else tuple(size)))
    try:
        facts, _ = library.image_processing_utils.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        facts = {}
    half = (0.5,) * shape[0]
    made.preprocessing = Preprocessing(  # type: ignore[assignment]
        shape, tuple(facts.get("image_mean", half)), tuple(facts.get("image_std", half))
    )
    return made
