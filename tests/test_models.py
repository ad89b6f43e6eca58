"""Models, the classifier and learning rates."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from pl_sparse.tasks import models
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.lr import ConstantLR, CosineLR, LinearLR, StepLR


@pytest.mark.parametrize("name", models.__all__)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_every_model_takes_every_image(name: str, shape: tuple[int, ...]) -> None:
    model = getattr(models, name)(shape=shape, classes=7)
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def weights(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_published_sizes() -> None:
    assert weights(models.lenet300(shape=(1, 28, 28), classes=10)) == 266_200
    assert weights(models.lenet5(shape=(1, 28, 28), classes=10)) == 430_500
    assert weights(models.conv4(shape=(3, 32, 32), classes=10)) == 2_425_024
    assert weights(models.mlp1d(shape=(40,), classes=10)) == 40 * 500 + 500 * 500 + 5000
    resnet = models.resnet20(shape=(3, 32, 32), classes=10)
    assert 270_000 < weights(resnet) < 273_000
    assert weights(models.resnet20(shape=(3, 32, 32), classes=10, width=32)) > 3.9 * weights(resnet)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"model=lenet5 needs images.*\(40,\)"):
        models.lenet5(shape=(40,), classes=10)
    with pytest.raises(ValueError, match="patch=3 does not divide"):
        models.vit_tiny(shape=(1, 8, 8), classes=10, patch=3)
    with pytest.raises(ValueError, match="dim=10 is not divisible by heads=4"):
        models.vit_tiny(shape=(1, 8, 8), classes=10, dim=10)
    for name, options in (
        ("resnet20", "width"),
        ("mlp1d", "hidden"),
        *(("vit_tiny", n) for n in ("dim", "heads", "patch")),
    ):
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"^{options}={size} must be 1 or more"):
                getattr(models, name)(shape=(1, 8, 8), classes=10, **{options: size})
    for model in (models.conv4, models.lenet5):
        with pytest.raises(ValueError, match="at least 4 x 4"):
            model(shape=(1, 3, 3), classes=10)


def test_learning_rates() -> None:
    assert [ConstantLR().factor(step, 10) for step in (0, 9)] == [1, 1]
    assert [CosineLR().factor(step, 10) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert CosineLR(final=0.1).factor(10, 10) == pytest.approx(0.1)
    assert [LinearLR(warmup=0.5).factor(step, 8) for step in range(8)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    )
    assert [StepLR(milestones=[0.5]).factor(step, 4) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.1])
    assert StepLR().factor(80, 100) == pytest.approx(0.01) and math.isclose(
        CosineLR().factor(25, 100), 0.853553, abs_tol=1e-6
    )
    with pytest.raises(ValueError, match="warmup=1"):
        CosineLR(warmup=1.0)
    with pytest.raises(ValueError, match="milestones"):
        StepLR(milestones=[30])


def test_norms_and_biases_have_no_weight_decay() -> None:
    module = Classifier(models.resnet20(shape=(1, 8, 8), classes=10, width=4), 10)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, limit_train_batches=1, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits())
    decayed, others = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] > 0 and others["weight_decay"] == 0
    assert all(p.dim() > 1 for p in decayed["params"]) and all(p.dim() <= 1 for p in others["params"])
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= set(trainer.callback_metrics)
