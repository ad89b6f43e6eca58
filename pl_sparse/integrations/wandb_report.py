"""Weights & Biases: the overview of a sweep as an artifact, and `pl-sparse report`, which builds a report of runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pl_sparse.results.overview import overview
from pl_sparse.results.runs import Run, gather

__all__ = ["build", "hand_over_sweep", "main", "table"]


def hand_over_sweep(logger: Any, folder: Path) -> None:
    """Log table, picture and files of a sweep's overview as a run of the sweep's group.

    Args:
        logger: the settings of the sweep's wandb logger.
        folder: the folder of the sweep, with the files of its overview.
    """
    import wandb

    contents = json.loads((folder / "pareto.json").read_text(encoding="utf-8"))
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
        columns, rows = table(contents)
        picture = wandb.Image(str(folder / "pareto.png"))
        run.log({"pareto/table": wandb.Table(columns=list(columns), data=rows), "pareto/front": picture})
        artifact = wandb.Artifact(f"pareto-{run.id}", type="overview")
        for kind in ("csv", "json", "png", "html"):
            artifact.add_file(str(folder / f"pareto.{kind}"))
        run.log_artifact(artifact)


def table(contents: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The table of models.

    Args:
        contents: what is in pareto.json.

    Returns:
        the names of the columns, and a row per series.
    """
    axes = contents["axes"]
    columns = ["method", *(axis["short"] for axis in axes), contents["metric"], "spread", "seeds", "settings"]
    rows = []
    for series in contents["groups"]:
        costs = [series["costs"][axis["key"]] for axis in axes]
        cells = [
            1 - cost if axis["sparsity"] and cost is not None else cost for axis, cost in zip(axes, costs, strict=True)
        ]
        seeds, settings = len(series["points"]), " ".join(series["differ"])
        rows.append([series["method"], *cells, series["accuracy"], series["spread"], seeds, settings])
    return columns, rows


# The report


def build(project: str, entity: str, groups: Sequence[str], contents: Mapping[str, Any], folder: str) -> Any:
    """A W&B Report, not saved yet: a scatter of accuracy over each cost, the curves, and the tables of the overview.

    Args:
        project: the W&B project of the runs.
        entity: the W&B entity that the project belongs to.
        groups: the W&B groups of the runs; none for all runs of the project.
        contents: what is in pareto.json.
        folder: the name of the runs' folder, for the title.

    Raises:
        ImportError: wandb-workspaces is missing.
    """
    try:
        wr: Any = import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise ImportError("reports need wandb-workspaces: pip install 'pl_sparse[wandb]'") from error

    names = ", ".join(json.dumps(group) for group in groups)
    runs = wr.Runset(
        entity=entity, project=project, name="runs", filters=f"Metric('Group') in [{names}]" if groups else ""
    )
    accuracy = wr.SummaryMetric(f"final/{contents['metric']}")
    costs = {
        "sparsity": "final/sparsity",
        "size": "final/size_bytes.compressed",
        "macs": "final/macs_sparse",
        "latency": "final/latency_ms",
        "exported": "final/size_bytes.exported",
    }
    scatters = [
        wr.ScatterPlot(
            title=f"{contents['metric']} over {axis['short']}", x=wr.SummaryMetric(costs[axis["key"]]), y=accuracy
        )
        for axis in contents["axes"]
    ]
    judged = re.sub("^test", "val", contents["metric"])
    curves = [
        wr.LinePlot(title=title, x="trainer/global_step", y=list(keys))
        for title, keys in {
            "sparsity": ("sparsity",),
            judged: (judged,),
            "loss": ("train/loss", "train_loss", "val/loss", "val_loss"),
            "overlap of masks": ("mask/overlap",),
        }.items()
    ]
    summary = contents["summary"]
    return wr.Report(
        project=project,
        entity=entity,
        title=f"Sparsity and accuracy: {folder}",
        description=contents["lead"],
        blocks=[
            wr.H1("What sparsity costs"),
            wr.PanelGrid(runsets=[runs], panels=[*scatters, _coordinates(wr, contents, costs)]),
            wr.H1("Methods"),
            wr.MarkdownBlock(_markdown(summary["columns"], summary["rows"]) + "\n\n" + summary["note"]),
            wr.H1("Models"),
            wr.MarkdownBlock(_markdown(*table(contents))),
            wr.H1("Training"),
            wr.PanelGrid(runsets=[runs], panels=curves),
        ],
    )


def _coordinates(wr: Any, contents: Mapping[str, Any], costs: Mapping[str, str]) -> Any:
    """Parallel coordinates: a line per run from its settings through its costs to its accuracy."""
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), display_name=name)
        for name, key in (("scorer", "scorer._target_"), ("sparsity asked for", "sparsity"))
    ]
    columns += [
        wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(costs[axis["key"]]), display_name=axis["short"])
        for axis in contents["axes"]
    ]
    accuracy = wr.SummaryMetric(f"final/{contents['metric']}")
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=accuracy, display_name=contents["metric"]))
    return wr.ParallelCoordinatesPlot(title="from settings to accuracy", columns=columns)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(map(_cell, cells)) + " |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *map(line, rows)])


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# The command


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
    arguments = parser.parse_args()
    folder = Path(arguments.folders[0])
    try:
        runs = gather(arguments.folders)
        contents = overview(arguments.folders, folder)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(_failed(str(error)))
    loggers = list(_wandb_loggers(runs))
    online = [logger for logger in loggers if logger.get("mode") in (None, "online")]
    page = (folder / "pareto.html").resolve()
    obstacle = _obstacle(loggers, online, arguments.folders)
    if obstacle is not None:
        print(f"\nno W&B report: {obstacle}\nThe report is {page.as_uri()}")
        return
    import wandb

    try:
        entity = arguments.entity or next((logger["entity"] for logger in online if logger.get("entity")), None)
        entity = str(entity or wandb.Api().default_entity)
        project = arguments.project or online[0]["project"]
        groups = sorted({str(logger["group"]) for logger in online if logger.get("group")})
        report = build(project, entity, groups, contents, folder.resolve().name)
        report.save(draft=arguments.draft)
    except Exception as error:  # whatever the server or its client raises
        sys.exit(_failed(f"W&B refused the report: {error}\nThe report is {page.as_uri()}"))
    print(f"\nreport: {report.url}")


def _wandb_loggers(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The settings of the wandb loggers of some runs."""
    for run in runs:
        loggers = run.config.get("logger")
        if isinstance(loggers, Mapping) and isinstance(loggers.get("wandb"), Mapping):
            yield dict(loggers["wandb"])


def _obstacle(
    loggers: Sequence[Mapping[str, Any]], online: Sequence[Mapping[str, Any]], folders: Sequence[str]
) -> str | None:
    """Why there can be no report on the server; None if there can."""
    if not loggers:
        return "none of the runs was logged to it (logger=wandb)"
    if not online:
        return f"the runs are offline. To upload them: wandb sync {folders[0]}/*/wandb/offline-run-*"
    try:
        import wandb  # noqa: F401
    except ImportError:
        return "wandb is not installed: pip install 'pl_sparse[wandb]'"
    return None if _logged_in() else "you are not logged in (wandb login)"


def _logged_in() -> bool:
    """Whether there is a key for the server, without asking for one."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
