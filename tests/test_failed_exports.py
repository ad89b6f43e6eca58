"""An export that fails costs itself alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pl_sparse.app import main
from pl_sparse.app.export_command import export
from pl_sparse.callbacks import CostTarget
from pl_sparse.export import CSR

SHORT = ["data.limit=64", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]


def failing(error: Exception) -> Any:
    def write(*_: Any, **options: Any) -> Any:
        raise error

    return write


@pytest.mark.parametrize("error", [ValueError("no such operator\nsecond line"), KeyError("weight"), IndexError("3")])
def test_metrics_model_and_other_formats_are_there_and_the_code_is_3(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CSR, "write", failing(error))
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, "export=[csr,safetensors]", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 3, said.err
    reason = "no such operator" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    assert said.err.splitlines()[-2:] == [f"error: export=csr: {reason}", f"what else the run made is in {tmp_path}"]
    assert f"export=csr failed: {reason}" in said.out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["exports_failed"] == {"csr": reason} and metrics["sparsity"] > 0
    assert metrics["size_bytes"]["exported"] == (tmp_path / "model.safetensors.zst").stat().st_size
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    assert OmegaConf.load(tmp_path / "config.yaml").model

    with pytest.raises(SystemExit) as end:
        export([str(tmp_path), "--to", "csr"])
    assert end.value.code == 3 and f"export=csr: {reason}" in capsys.readouterr().err
    monkeypatch.undo()
    export([str(tmp_path), "--to", "csr"])
    assert "exports_failed" not in json.loads((tmp_path / "metrics.json").read_text())


def test_a_target_that_the_trained_network_misses_ends_with_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = CostTarget.on_train_end

    def end_slower(self: CostTarget, *args: Any) -> None:
        monkeypatch.setattr(CostTarget, "_times_less", lambda *_: 1.25)
        real(self, *args)

    monkeypatch.setattr(CostTarget, "on_train_end", end_slower)
    options = ["model=lenet5", "target=macs", "target.macs=0.5", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *options])
    with pytest.raises(SystemExit) as end, pytest.warns(UserWarning, match="misses the target"):
        main()
    assert end.value.code == 3
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines[0] == "error: target.macs=0.5: the trained network has 0.8. Ask for more than you need"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["target"] == {"macs": 0.5, "achieved": 0.8, "met": False}
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_channels_that_cannot_be_looked_for_stay_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pl_sparse.app.deploy.shrink", failing(IndexError("index 9 is out of bounds")))
    options = ["structure=channel", "sparsity=0.5", "export=[torch_export]"]
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *options, f"hydra.run.dir={tmp_path}"])
    main()
    said = capsys.readouterr().out
    assert "masked channels stay in the files: IndexError: index 9" in said, said[100:400]
    assert (tmp_path / "model.pt2").is_file() and (tmp_path / "metrics.json").is_file()
