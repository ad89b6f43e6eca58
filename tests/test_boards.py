"""Weights & Biases: a report against a server on this machine, and the overview of a sweep read back offline."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf
from test_app import config
from test_loggers import read_offline
from test_pareto import made

from pl_sparse.app.hydra_api import composition
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.integrations.servers import obstacle
from pl_sparse.integrations.wandb_report import hand_over_sweep
from pl_sparse.results.overview import overview

wandb = pytest.importorskip("wandb", reason="wandb is not installed")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two levels and a dense run, logged online as the group "swept"."""
    folder = tmp_path / "swept"
    board = {"logger": {"wandb": {"project": "pl_sparse", "group": "swept", "mode": "online"}}}
    for i, (value, sparsity) in enumerate(((0.9, 0.0), (0.89, 0.5), (0.7, 0.9))):
        made(folder / str(i), value, sparsity, config=board)
    return folder


class Board(BaseHTTPRequestHandler):
    """Answers what the client asks for a report, and keeps the views that it saves."""

    saved: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if self.path == "/graphql" else {}
        query, values = asked.get("query", ""), asked.get("variables") or {}
        data: dict[str, Any] = {"viewer": {"id": "u", "entity": "team", "username": "someone", "flags": "{}"}}
        if "upsertView" in query:
            self.saved.append(values)
            project = {"id": "p", "name": values["projectName"], "entityName": values["entityName"]}
            view = {key: values[key] for key in ("type", "name", "displayName", "description", "spec")}
            view |= {"id": "Vmlldzox", "project": project, "updatedAt": "2026-01-01T00:00:00Z"}
            data = {"upsertView": {"view": view, "inserted": True}}
        elif "ProjectInternalId" in query:
            data = {"project": {"id": "p", "internalId": "1"}}
        elif "GetProjects" in query:
            node = {"id": "p", "name": "pl_sparse", "entityName": "team", "createdAt": "2026-01-01T00:00:00Z"}
            edge = {"node": {**node, "isBenchmark": False, "user": None}, "cursor": "c"}
            data = {"models": {"edges": [edge], "pageInfo": {"endCursor": None, "hasNextPage": False}}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what was saved there."""
    saved: list[dict[str, Any]] = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Board,), {"saved": saved}))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}", saved
    running.shutdown()
    running.server_close()
    thread.join()


def report(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-c", "from pl_sparse.app.cli import main; main()", "report", str(folder)]
    settings = {"NETRC": str(folder / "none"), "WANDB_CONFIG_DIR": str(folder.parent / "settings"), **env}
    return subprocess.run(command, env={**kept, **settings}, capture_output=True, text=True, check=False)


def test_a_report_is_saved_and_its_link_told(sweep: Path, server: tuple[str, list[dict[str, Any]]]) -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    address, saved = server
    done = report(sweep, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0, done.stderr
    assert f"report: {address}/team/pl_sparse/reports/" in done.stdout
    (view,) = saved
    assert (view["entityName"], view["projectName"], view["type"]) == ("team", "pl_sparse", "runs")
    spec = json.loads(view["spec"])
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    kinds = [
        [panel["viewType"] for section in grid["panelBankSectionConfig"]["panels"] for panel in [section]]
        for grid in grids
    ]
    assert kinds == [["Scatter Plot"] * 3 + ["Parallel Coordinates Plot"], ["Run History Line Plot"] * 4]
    (filters,) = (runs["filters"]["filters"] for runs in grids[0]["runSets"])
    assert filters[0]["key"] == {"section": "run", "name": "group"} and filters[0]["value"] == ["swept"]
    assert "final/sparsity" in view["spec"] and "final/test/acc" in view["spec"] and "0.89" in view["spec"]


def test_the_agent_of_a_sweep_starts_runs_with_settings_that_are(tmp_path: Path) -> None:
    """The command of examples/wandb_sweep.yaml, made of its parameters as the agent makes it, is composed."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    path = Path(__file__).parent.parent / "examples" / "wandb_sweep.yaml"
    asked = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(asked, dict)
    least = {name: {"value": p["min"] if "min" in p else p["values"][0]} for name, p in asked["parameters"].items()}
    values = create_sweep_command_args({"args": least}) | {"env": []}
    line = [word for part in create_sweep_command(asked["command"]) for word in values.get(part[2:-1], [part])]
    assert line[:3] == ["pl-sparse", "train", "logger=wandb"] and len(line) == 3 + len(least)
    with composition():
        cfg = hydra.compose("train", line[2:])
    assert cfg.sparsity == 0.5 and cfg.optimizer.lr == 0.0003 and cfg.logger.wandb.project == asked["project"]
    assert asked["metric"]["name"] == f"final/{cfg.objective}"


def test_without_a_login_the_page_is_the_report(sweep: Path) -> None:
    done = report(sweep)
    assert done.returncode == 0 and "you are not logged in" in done.stdout, done.stderr
    assert (sweep / "pareto.html").as_uri() in done.stdout and (sweep / "pareto.html").is_file()


@pytest.mark.filterwarnings("ignore")  # wandb's own deprecations
def test_the_overview_of_a_sweep_is_a_run_of_its_group(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    overview([sweep], sweep)
    hand_over_sweep(OmegaConf.create({"project": "pl_sparse", "group": None, "mode": "offline"}), sweep)
    kinds, history, last = read_offline(sweep)
    assert (kinds["run"].run_group, kinds["run"].job_type) == ("swept", "overview")
    assert "pareto/front.path" in history and json.loads(last["pareto/table.nrows"]) == 3
    artifact = kinds["request"].log_artifact.artifact if "artifact" not in kinds else kinds["artifact"]
    assert {entry.path for entry in artifact.manifest.contents} >= {"pareto.csv", "pareto.html", "pareto.png"}
    assert wandb.run is None


def test_a_server_that_does_not_answer_is_named_within_seconds(server: tuple[str, list[dict[str, Any]]]) -> None:
    """One that refuses, one that stays silent; one that answers, if only with an error, is there."""
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    mlflow = {"_target_": "lightning.pytorch.loggers.MLFlowLogger"}
    began = time.monotonic()
    address = "http://127.0.0.1:{}"
    waits = obstacle({**mlflow, "tracking_uri": address.format(silent.getsockname()[1])}, seconds=0.5)
    silent.close()
    refused = obstacle({**mlflow, "tracking_uri": address.format(9)})
    assert time.monotonic() - began < 5
    assert waits is not None and "MLFlowLogger cannot reach" in waits
    assert refused is not None and "refused" in refused and "sqlite" in refused
    assert obstacle({**mlflow, "tracking_uri": server[0]}) is None  # it answers GET with an error
    assert obstacle({**mlflow, "tracking_uri": "sqlite:///mlflow.db"}) is None


def test_wandb_that_cannot_be_reached_ends_a_run_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match=r"logger.wandb: WandbLogger cannot reach http://127.0.0.1:9: .*mode=offline"):
        train(config(tmp_path, "logger=wandb"))
    assert not (tmp_path / "history.csv").exists()
