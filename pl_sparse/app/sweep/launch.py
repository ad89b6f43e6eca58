"""Hydra's launchers and sweepers with the settings that suit trainings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

from pl_sparse.results.runs import key_of

__all__ = ["arguments"]

_PLUGINS = {  # what chooses a plugin: its module, the extra that has it, settings that stand unless others are given
    "hydra/launcher=joblib": (
        "hydra_joblib_launcher",
        "sweep",
        # a worker takes one run after the other, in their order
        ["hydra.launcher.pre_dispatch=n_jobs", "hydra.launcher.batch_size=1"],
    ),
    "hydra/launcher=ray": (
        "hydra_ray_launcher",
        "ray",
        [
            "hydra.launcher.ray.init.address=local",
            "++hydra.launcher.ray.init.include_dashboard=false",
            "++hydra.launcher.ray.init.log_to_driver=false",
            "++hydra.launcher.ray.remote.num_cpus=1",
        ],
    ),
    "hydra/launcher=submitit_local": ("hydra_submitit_launcher", "slurm", ["hydra.launcher.cpus_per_task=1"]),
    "hydra/launcher=submitit_slurm": (
        "hydra_submitit_launcher",
        "slurm",
        # a run that the time limit ends is sent again, and goes on
        ["hydra.launcher.cpus_per_task=1", "hydra.launcher.max_num_timeout=3"],
    ),
    "hydra/sweeper=optuna": (
        "hydra_optuna_sweeper",
        "sweep",
        [
            "hydra/sweeper/sampler=nsgaii",
            "hydra.sweeper.direction=[maximize,minimize]",
            "hydra.sweeper.storage='sqlite:///${hydra.sweep.dir}/study.db'",
            "hydra.sweeper.study_name=pl_sparse",
            "hydra.sweeper.n_jobs=1",
            "hydra.sweeper.max_failure_rate=1.0",
        ],
    ),
}


def arguments(command: Sequence[str]) -> list[str]:
    """The arguments of a command, and settings for the plugins that they choose, where they do not set these.

    >>> arguments(["-m", "sparsity=0.5,0.9"])
    ['-m', 'sparsity=0.5,0.9']

    Args:
        command: the arguments as they were typed.

    Raises:
        ImportError: a plugin is not installed.
    """
    keys = {key_of(argument) for argument in command}
    added: list[str] = []
    for choice, (module, extra, settings) in _PLUGINS.items():
        if choice not in command:
            continue
        if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{module}") is None:
            raise ImportError(f"{choice} is not installed: pip install 'pl_sparse[{extra}]'")
        added += [setting for setting in settings if key_of(setting) not in keys]
        if extra == "ray":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return [*added, *command]  # before a flag such as --cfg, after which no setting is read
