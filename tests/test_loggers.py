"""What loggers get: from the callback, and from a run with several of them, read back from what they stored."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from test_app import config

from pl_sparse import Sparsity
from pl_sparse.app import main
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.callbacks import Track
from pl_sparse.schedule import Linear
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300


class Masks(Callback):
    """Keeps the masks after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.after.append({p.name: p.mask.clone() for p in Sparsity.of(trainer).pruner.params})


def columns(path: Path) -> dict[str, dict[int, float]]:
    """step -> value, of each column."""
    found: dict[str, dict[int, float]] = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key != "step":
                    found.setdefault(key, {})[int(row["step"])] = float(value)
    return found


@pytest.mark.parametrize("every", [1, 4])
def test_overlap_and_density_are_those_of_the_masks(tmp_path: Path, every: int) -> None:
    masks = Masks()
    sparsity = Sparsity(schedule=Linear(final=0.8, begin=0.1, end=0.8, every=1), masking="ste", report=False)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[sparsity, Track(), masks], log_every_n_steps=every,
        logger=CSVLogger(tmp_path, name="", version=""), enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Classifier(lenet300(shape=(1, 8, 8), classes=10), 10), Digits(limit=320))
    found = columns(tmp_path / "metrics.csv")
    steps = sorted(found["mask/overlap"])
    assert len(steps) >= 3 and all(b - a >= every for a, b in pairwise(steps[:-1]))
    before = {name: torch.ones_like(mask) for name, mask in masks.after[0].items()}
    for step in steps:
        after = masks.after[step - 1]
        both = sum(int((before[name] & after[name]).sum()) for name in after)
        either = sum(int((before[name] | after[name]).sum()) for name in after)
        assert found["mask/overlap"][step] == pytest.approx(both / either)
        assert found["mask/stayed"][step] == pytest.approx(both / sum(int(m.sum()) for m in before.values()))
        for name, mask in after.items():
            assert found[f"density/{name}"][step] == pytest.approx(float(mask.float().mean()))
        before = after
    assert all(torch.equal(before[name], mask) for name, mask in masks.after[-1].items())  # the last update is logged
    assert len(found["train/loss_step"]) == trainer.global_step // every


def test_a_logger_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are in the folder that Hydra makes for the run."""
    monkeypatch.chdir(tmp_path)
    short = ["data.limit=64", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    monkeypatch.setattr("sys.argv", ["train.py", "logger=csv", *short])
    main()
    (table,) = tmp_path.glob("outputs/*/*/csv/metrics.csv")
    assert "final/test/acc" in columns(table)


@pytest.mark.parametrize("library", ["wandb", "mlflow", "tensorboard"])
def test_a_library_that_is_missing_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pl_sparse.core.optional.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=rf"^logger\.{library}: it needs {library}: pip install 'pl_sparse\[{library}\]'$"
    ):
        train(config(tmp_path, f"logger={library}"))


KEYS = {"sparsity", "mask/overlap", "density/net.fc1.weight", "train/loss", "train/loss_step", "val/acc", "test/acc"}


@pytest.mark.filterwarnings("ignore")  # three loggers and their stores, each with its own deprecations
def test_several_loggers_carry_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("tensorboard", "mlflow", "wandb"):
        pytest.importorskip(library)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = train(
        config(
            tmp_path,
            "logger=[csv,tensorboard,mlflow,wandb]",
            "trainer.log_every_n_steps=1",
            "logger.wandb.group=g",
            "logger.wandb.tags=[a,b]",
            "logger.wandb.notes=first",
            "logger.wandb.entity=team",
        )
    )
    final = metrics["test/acc"]

    found = columns(tmp_path / "csv/metrics.csv")
    assert set(found) >= KEYS and list(found["final/test/acc"].values()) == [final]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) >= KEYS and set(board.Tags()["images"]) == {"training", "layers"}
    assert [event.value for event in board.Scalars("final/test/acc")] == pytest.approx([final])

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("pl_sparse")
    (run,) = client.search_runs([experiment.experiment_id])
    assert set(run.data.metrics) >= KEYS and run.data.metrics["final/test/acc"] == final
    assert run.info.status == "FINISHED" and run.data.params["sparsity"] == "0.9"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"metrics.json", "training.png"}

    import wandb

    assert wandb.run is None  # the next training in this process has its own
    kinds, history, summary = read_offline(tmp_path)
    assert set(history) >= KEYS and json.loads(summary["final/test/acc"]) == final
    assert kinds["run"].run_group == "g" and kinds["run"].project == "pl_sparse"
    assert (kinds["run"].entity, list(kinds["run"].tags), kinds["run"].notes) == ("team", ["a", "b"], "first")
    assert kinds["run"].job_type == "train"
    model = kinds["artifact"]  # the last one
    assert model.type == "model" and set(model.aliases) == {"latest", "best", "sparse"}
    assert "model.safetensors" in {entry.path for entry in model.manifest.contents}


def read_offline(folder: Path) -> tuple[dict[str, Any], set[str], dict[str, str]]:
    """Records by kind, keys of the history, and the last value of each, of the only offline run of W&B in a folder."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    kinds: dict[str, Any] = {}
    last: dict[str, str] = {}
    until = time.monotonic() + 60
    while "exit" not in kinds and time.monotonic() < until:  # wandb writes in a process of its own, and may be late
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = str(record.WhichOneof("record_type"))
            kinds[kind] = getattr(record, kind)
            for item in record.history.item:
                last[item.key or ".".join(item.nested_key)] = item.value_json
        time.sleep(0.1)
    return kinds, set(last), last


def records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, each fragment with checksum (4), length (2), and type (1): whole,
    first, middle, last. The file's own header takes 7 bytes of the first block."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4) if left >= 7 else (0, 0)
        if kind == 0:  # the rest of a block is padding
            place += left
            continue
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
