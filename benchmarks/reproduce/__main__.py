"""Runs published experiments and writes what came of them to docs/reproductions.md.

    python -m benchmarks.reproduce [--only mnist1d_lottery ...] [--seeds 5] [--jobs 2]

MNIST is looked for in /usr/share/datasets/mnist and $PL_SPARSE_DATA/mnist, and downloaded otherwise.

Finished runs are not repeated, and an interrupted one resumes from its last checkpoint. `--report` writes the page
from the finished runs.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from benchmarks.reproduce import at_init, dynamic, full, lottery, posttraining, structured, text
from benchmarks.reproduce.runs import ROOT, console, section
from pl_sparse.core.files import write_text

EXPERIMENTS = {
    **lottery.EXPERIMENTS,
    **at_init.EXPERIMENTS,
    **dynamic.EXPERIMENTS,
    **structured.EXPERIMENTS,
    **posttraining.EXPERIMENTS,
    **text.EXPERIMENTS,
    **full.EXPERIMENTS,
}
HEAD = section(
    "Reproductions",
    """
    Published claims, and the results of this library: mean ± standard deviation over seeds. `make reproduce` runs
    all experiments and writes this page; an interrupted one resumes. "Best" is the epoch with the best validation
    among those at the target sparsity. Figures are of that epoch unless a table says otherwise.
    [Methods](methods.md) has all presets on one task.
    """,
).removeprefix("#")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="at the most; long trainings take fewer")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    if not arguments.report:
        for name in arguments.only:
            experiment = EXPERIMENTS[name]
            if experiment.direct is not None:
                experiment.direct()
            for wave in (False, True):  # first what nothing else is needed for
                jobs = [(run, seed) for run in experiment.runs if run.after == wave for seed in seeds[: run.seeds]]
                jobs = [(run, seed) for run, seed in jobs if not run.finished(seed)]
                console.print(f"{name}: {len(jobs)} runs", highlight=False)
                with ThreadPoolExecutor(arguments.jobs) as pool:
                    for future in [pool.submit(run.start, seed) for run, seed in jobs]:
                        future.result()
    sections = [experiment.section(seeds) for experiment in EXPERIMENTS.values()]
    write_text(ROOT / "docs" / "reproductions.md", "\n\n".join([HEAD, *sections]) + "\n")
    console.print("written to docs/reproductions.md", highlight=False)


if __name__ == "__main__":
    main()
