"""Weights & Biases: the overview of a sweep as an artifact, and `pl-sparse report`, which builds a report of it."""

from __future__ import annotations

import argparse
import json
import netrc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pl_sparse.results.overview import overview
from pl_sparse.results.runs import Run, gather

__all__ = ["build", "hand_over_sweep", "main", "table"]


def hand_over_sweep(logger: Any, folder: Path) -> None:
    """Log table, picture and files of a sweep's overview as a run of the sweep's group.

    Args:
        logger: the settings of the sweep's wandb logger.
        folder: the sweep's, with the overview's files.
    """
    import wandb

    found = json.loads((folder / "pareto.json").read_text(encoding="utf-8"))
    group = logger.get("group") or folder.name
    with wandb.init(
        project=logger.project,
        entity=logger.get("entity"),
        group=group,
        job_type="overview",
        name=f"{group}: overview",
        mode=logger.get("mode"),
        dir=str(folder),
    ) as run:
        columns, rows = table(found)
        picture = wandb.Image(str(folder / "pareto.png"))
        run.log({"pareto/table": wandb.Table(columns=list(columns), data=rows), "pareto/front": picture})
        artifact = wandb.Artifact(f"pareto-{run.id}", type="overview")
        for kind in ("csv", "json", "png", "html"):
            artifact.add_file(str(folder / f"pareto.{kind}"))
        run.log_artifact(artifact)


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows, a model each, of what pareto.json has."""
    axes = found["axes"]
    columns = ["method", *(axis["short"] for axis in axes), found["metric"], "spread", "seeds", "settings"]
    rows = []
    for model in found["groups"]:
        costs = [model["costs"][axis["key"]] for axis in axes]
        shown = [1 - v if axis["sparsity"] and v is not None else v for axis, v in zip(axes, costs, strict=True)]
        settings = " ".join(model["differ"])
        rows.append([model["method"], *shown, model["accuracy"], model["spread"], len(model["points"]), settings])
    return columns, rows


# The report


def build(project: str, entity: str, groups: Sequence[str], found: Mapping[str, Any], folder: str) -> Any:
    """A W&B Report, not saved yet: a scatter of accuracy over each cost, the curves, and the table of the overview.

    Args:
        groups: the W&B groups of the runs; none for all runs of the project.
        found: what `overview` returned.
        folder: what the report is of, for its title.
    """
    try:
        wr: Any = import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise ImportError("reports need wandb-workspaces: pip install 'pl_sparse[wandb]'") from error

    listed = ", ".join(json.dumps(group) for group in groups)
    runs = wr.Runset(
        entity=entity, project=project, name="runs", filters=f"Metric('Group') in [{listed}]" if groups else ""
    )
    accuracy = wr.SummaryMetric(f"final/{found['metric']}")
    costs = {
        "sparsity": "final/sparsity",
        "size": "final/size_bytes.compressed",
        "macs": "final/macs_sparse",
        "latency": "final/latency_ms",
        "exported": "final/size_bytes.exported",
    }
    scatters = [
        wr.ScatterPlot(
            title=f"{found['metric']} over {axis['short']}", x=wr.SummaryMetric(costs[axis["key"]]), y=accuracy
        )
        for axis in found["axes"]
    ]
    curves = [
        wr.LinePlot(title=title, x="trainer/global_step", y=list(keys))
        for title, keys in {
            "sparsity": ("sparsity",),
            "accuracy": ("val/acc",),
            "loss": ("train/loss", "val/loss"),
            "overlap of masks": ("mask/overlap",),
        }.items()
    ]
    return wr.Report(
        project=project,
        entity=entity,
        title=f"Sparsity and accuracy: {folder}",
        description=found["lead"],
        blocks=[
            wr.H1("What sparsity costs"),
            wr.PanelGrid(runsets=[runs], panels=scatters),
            wr.H1("Methods"),
            wr.MarkdownBlock(
                _markdown(found["summary"]["columns"], found["summary"]["rows"]) + "\n\n" + found["summary"]["note"]
            ),
            wr.H1("Models"),
            wr.MarkdownBlock(_markdown(*table(found))),
            wr.H1("Training"),
            wr.PanelGrid(runsets=[runs], panels=curves),
        ],
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(map(_cell, cells)) + " |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *map(line, rows)])


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _boards(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The settings of the wandb loggers that runs had."""
    for run in runs:
        logger = run.config.get("logger")
        if isinstance(logger, Mapping) and isinstance(logger.get("wandb"), Mapping):
            yield dict(logger["wandb"])


def _logged_in() -> bool:
    """Whether there is a key for the server, without asking for one."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(wandb.Settings().base_url).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def main() -> None:
    """`pl-sparse report DIR...`"""
    parser = argparse.ArgumentParser(
        prog="pl-sparse report",
        description="Build a Weights & Biases report of runs that had logger=wandb: scatter plots, curves, the table "
        "of the sweep. Without a login, pareto.html is the report.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="runs, or folders of runs, such as a sweep's")
    parser.add_argument("--entity", help="the W&B entity (that of the runs, else your default)")
    parser.add_argument("--project", help="the W&B project (that of the runs)")
    parser.add_argument("--draft", action="store_true", help="save it as a draft")
    given = parser.parse_args()
    try:
        runs = gather(given.folders)
        found = overview(given.folders, Path(given.folders[0]))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(_failed(str(error)))
    boards = list(_boards(runs))
    online = [board for board in boards if board.get("mode") in (None, "online")]
    page = (Path(given.folders[0]) / "pareto.html").resolve()
    reason = _obstacle(boards, online, given.folders)
    if reason is not None:
        print(f"\nno W&B report: {reason}\nThe report is {page.as_uri()}")
        return
    import wandb

    try:
        entity = given.entity or next((b["entity"] for b in online if b.get("entity")), None)
        entity = str(entity or wandb.Api().default_entity)
        project = given.project or online[0]["project"]
        groups = sorted({str(board["group"]) for board in online if board.get("group")})
        report = build(project, entity, groups, found, Path(given.folders[0]).resolve().name)
        report.save(draft=given.draft)
    except Exception as error:  # whatever the server or its client has to say
        sys.exit(_failed(f"W&B refused the report: {error}\nThe report is {page.as_uri()}"))
    print(f"\nreport: {report.url}")


def _obstacle(
    boards: Sequence[Mapping[str, Any]], online: Sequence[Mapping[str, Any]], folders: Sequence[str]
) -> str | None:
    """Why there can be no report on the server."""
    if not boards:
        return "none of the runs was logged to it (logger=wandb)"
    if not online:
        return f"the runs are offline. To upload them: wandb sync {folders[0]}/*/wandb/offline-run-*"
    try:
        import wandb  # noqa: F401
    except ImportError:
        return "wandb is not installed: pip install 'pl_sparse[wandb]'"
    return None if _logged_in() else "you are not logged in (wandb login)"


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
