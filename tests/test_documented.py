"""The commands that README and docs print: each is found, run and held against what the text says of it.

A training is shortened to SHORT, unless the page has a line `<!-- shortened: key=value ... -->` before it; a page says
`<!-- not run: why -->` before a command that a test cannot run. Those of the README run in `make test`, all others and
the table of figures in `make test-docs`.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from pl_sparse.app import cli
from pl_sparse.app.cli import COMMANDS

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "start", "howto", "migrate")  # of docs; others have tests of their own
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for f in FOLDERS for p in (ROOT / "docs" / f).glob("*.md"))]
)
FIGURES = ROOT / "docs" / "start" / "command_line.md"
SHORT = {"data.limit": "300", "trainer.max_epochs": "3", "trainer.enable_progress_bar": "false"}
PLACEHOLDERS = (
    "NAME",
    "scorer=relative",
    "key=a",
    "package.Class",
    "mymod.",
    "my_project",
    "=...",
    "<folder",
)  # what a reader replaces by something of their own
LOOKERS = ("pareto", "show", "compare", "connectivity", "export", "bench", "test")
START = re.compile(r"^(python train\.py|python benchmarks/|python -m benchmarks|pl-sparse |make )")
PLACES = re.compile(r"outputs/(<date>/<time>|\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d)|<run>|\b(RUN|DIR)\b|^outputs$")


@dataclass(frozen=True)
class Command:
    """A command as it is printed, the page's line, and what is written before it for these tests."""

    page: str
    line: int
    text: str
    shortened: str | None = None
    not_run: str | None = None

    @property
    def words(self) -> list[str]:
        """The arguments, without the comment and with optional ones left out."""
        text = re.sub(r"\s\[[^]=]*(=[^]]*)?\](?=\s|$)", "", self.text)
        return shlex.split(text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def commands_of(page: Path) -> list[Command]:
    """The commands in blocks of code and within sentences."""
    commands: list[Command] = []
    fence, notes = False, {"shortened": None, "not run": None}
    lines = page.read_text().splitlines()
    for index, line in enumerate(lines):
        if note := re.fullmatch(r"<!-- (shortened|not run): (.*) -->", line.strip()):
            notes[note[1]] = note[2]  # type: ignore[assignment]
            continue
        if line.startswith("```"):
            fence = not fence
            continue
        texts = []
        if fence or line.startswith("    "):
            if START.match(line.strip()):
                text, following = line.strip(), index
                while text.endswith("\\"):
                    following += 1
                    text = text[:-1] + lines[following].strip()
                texts.append(text)
        else:
            texts += [code for code in re.findall(r"`([^`]+)`", line) if START.match(code) and "..." not in code]
        commands += [
            Command(str(page.relative_to(ROOT)), index + 1, text, notes["shortened"], notes["not run"])
            for text in texts
        ]
        if not fence and not line.strip():  # a note is of the paragraph, or the block, that follows
            notes = {"shortened": None, "not run": None}
    return commands


@cache
def documented() -> tuple[Command, ...]:
    seen: dict[str, Command] = {}
    for page in PAGES:
        for command in commands_of(page):
            seen.setdefault(" ".join(command.words), command)
    return tuple(seen.values())


def is_training(command: Command) -> bool:
    words = command.words
    trains = words[:2] in (["python", "train.py"], ["pl-sparse", "train"], ["pl-sparse", "sweep"])
    return trains and not any(word.startswith("-") and word != "-m" for word in words) and not words[-1].endswith("=")


def shortened(command: Command) -> list[str]:
    """The arguments of a training: lists of a sweep cut to their first and last value, lengths to SHORT."""
    words = [re.sub(r"(?<==)([\w.]+),(?:[\w.]+,)*([\w.]+)$", r"\1,\2", word) for word in command.words[2:]]
    words = ["seed=0" if word.startswith("seed=") else word for word in words]
    extra = shlex.split(command.shortened) if command.shortened else []
    keys = {word.partition("=")[0] for word in extra}
    named = {word.partition("=")[0] for word in words}
    extra += [f"{key}={value}" for key, value in SHORT.items() if key not in keys]
    if "schedule.epochs" in named or "method=lth" in words:
        extra = [word for word in extra if not word.startswith("trainer.max_epochs")]
    return [word for word in words if word.partition("=")[0] not in {e.partition("=")[0] for e in extra}] + extra


def call(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """The exit code of `pl-sparse` in this process."""
    monkeypatch.setattr(sys, "argv", ["pl-sparse", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, for commands that look at one."""
    folder = tmp_path_factory.mktemp("documented") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, ["train", "sparsity=0.8", f"output_dir={folder}", f"hydra.run.dir={folder}", *short()]) == 0
    return folder


def short() -> list[str]:
    return [f"{key}={value}" for key, value in SHORT.items()]


def check_run(folder: Path, words: list[str]) -> None:
    """A run's figures are there, its target is reached, and the sparsity is that of the file."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    settings = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    assert metrics["at_target"] is True
    tensors = load_file(folder / "model.safetensors")
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = sum(int(row["kept"]) for row in rows)
    if not (folder / "shrunk.json").is_file():
        zeros = sum(int((tensors[row["name"]] == 0).sum()) for row in rows if row["name"] in tensors)
        assert zeros >= sum(int(row["weights"]) for row in rows) - kept
    wanted = settings.get("sparsity", "")
    if re.fullmatch(r"[\d.]+", wanted) and settings.get("structure", "unstructured") == "unstructured":
        assert metrics["sparsity"] == pytest.approx(float(wanted), abs=1e-3)
    files = {"csr": "model_csr.safetensors", "onnx": "model.onnx", "onnx_int8": "model_int8.onnx"}
    for name in settings.get("export", "").strip("[]").split(","):
        assert name not in files or (folder / files[name]).is_file()


def run_training(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: Path,
) -> None:
    if command.not_run or any(part in command.text for part in PLACEHOLDERS):
        pytest.skip(command.not_run or "the reader's own names")
    words = shortened(command)
    sweep = "sweep" in command.words[:2] or bool({"-m", "--multirun"} & set(words))
    words = [PLACES.sub(str(finished), word) for word in words if not word.startswith(("hydra.sweep.dir", "resume"))]
    if any(word.startswith("ckpt_path=") for word in words):
        folder = finished
    else:
        folder = tmp_path / "run"
        words.append(f"hydra.sweep.dir={folder}" if sweep else f"hydra.run.dir={folder}")
    words = [word for word in words if word not in ("-m", "--multirun")]
    if "trainer=ddp_cpu" in words:  # its other processes are started by the command line of this one
        arguments = [sys.executable, "-m", "pl_sparse", "train", *words]
        done = subprocess.run(arguments, check=False, capture_output=True, text=True, cwd=tmp_path)
        code, error = done.returncode, done.stderr
    else:
        code = call(monkeypatch, ["sweep" if sweep else "train", *words])
        error = capsys.readouterr().err
    if code == 2 and "cannot be reached" in error:
        pytest.skip(error)
    assert code == 0, f"{command.text}\nas {' '.join(words)} ended with code {code}: {error}"
    runs = [path.parent.parent for path in folder.glob("**/.hydra/overrides.yaml")] if sweep else [folder]
    assert runs
    for run in runs:
        saved = run / ".hydra" / "overrides.yaml"
        check_run(run, [line.removeprefix("- ") for line in saved.read_text().splitlines()] if sweep else words)
    assert not sweep or (folder / "pareto.html").is_file()


def test_launchers_take_their_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a cluster's command sets is composed, though not run."""
    commands = [c for c in documented() if c.not_run and "hydra/launcher=" in c.text]
    assert len(commands) == 2
    for command in commands:
        pytest.importorskip(
            "hydra_plugins." + ("hydra_ray_launcher" if "launcher=ray" in command.text else "hydra_submitit_launcher")
        )
        words = [word for word in shortened(command) if word != "-m" and "," not in word and "hydra.sweep." not in word]
        assert call(monkeypatch, ["train", *words, f"hydra.run.dir={tmp_path}", "--cfg", "hydra"]) == 0, command.text


def test_commands_are_found() -> None:
    texts = [command.text for command in documented()]
    assert len(texts) > 60
    assert any(text.startswith("python train.py scorer=movement structure=nm24") for text in texts)
    assert any("hydra.launcher.ray.remote.num_gpus" in text for text in texts)
    assert any(text.startswith("pl-sparse bench RUN") for text in texts)


def test_a_group_that_a_run_has_is_not_appended() -> None:
    """Hydra refuses `+experiment=mine`, as conf/train.yaml names the group already."""
    defaults = yaml.safe_load((ROOT / "conf" / "train.yaml").read_text())["defaults"]
    named = {key for entry in defaults if isinstance(entry, dict) for key in entry}
    text = "\n".join(re.findall(r"^.*\+\w+=.*$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE))
    added = set(re.findall(r"(?<![+\w])\+(\w+)=", text))
    assert "experiment" in named and added & named == set()


def test_what_is_no_training_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in documented():
        words = command.words
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), command
        elif words[0] == "pl-sparse":
            assert words[1].startswith("-") or words[1] in COMMANDS, command
        elif words[1] == "-m":
            assert (ROOT / words[2].replace(".", "/")).exists(), command
        else:
            assert (ROOT / words[1]).is_file(), command


def figures() -> list[Any]:
    """The rows of the table of figures: command, accuracy, and the band that its text states."""
    text = FIGURES.read_text()
    rows = re.findall(r"^\| `(python train\.py[^`]*)`[^|]*\| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    return [
        pytest.param(*row, id=row[0], marks=[] if row[0] == "python train.py" else [pytest.mark.docs]) for row in rows
    ]


OF_THE_DOCS = (
    pytest.mark.docs,
    pytest.mark.filterwarnings("default"),  # of the sweepers' and launchers' dependencies
)


def _trainings() -> list[Any]:
    """All; those of the README run in `make test`."""
    return [
        pytest.param(
            command,
            id=str(command),
            marks=() if command.page == "README.md" else OF_THE_DOCS,
        )
        for command in documented()
        if is_training(command) and command.text not in {figure.values[0] for figure in figures()}
    ]


@pytest.mark.parametrize("command", _trainings())
def test_a_training_does_what_the_page_says(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: Path,
) -> None:
    run_training(command, tmp_path, monkeypatch, capsys, finished)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, id=str(c))
        for c in documented()
        if c.words[0] == "pl-sparse" and not is_training(c) and c.words[1] in LOOKERS and len(c.words) > 2
    ],
)
def test_a_command_that_looks_at_runs(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: Path,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    words = [PLACES.sub(str(folder), word) for word in command.words[1:]]
    if words[0] == "bench":
        words += ["--seconds", "0.01", "--to", "csr"]
    assert call(monkeypatch, words) == 0, capsys.readouterr().err
    files = {
        "pareto": "pareto.html",
        "show": "masks.png",
        "export": "model_csr.safetensors",
        "bench": "bench.csv",
        "connectivity": "connectivity.csv",
    }
    assert (folder / files.get(words[0], "metrics.json")).is_file()


@pytest.mark.parametrize(("text", "dense", "sparse"), figures())
def test_the_figures_of_the_page(text: str, dense: str, sparse: str, tmp_path: Path) -> None:
    band = float(re.search(r"within (0\.\d+)", FIGURES.read_text())[1])  # type: ignore[index]
    words = shlex.split(text)[2:]
    for options, accuracy in ((["method=dense"], dense), ([], sparse)):
        folder = tmp_path / ("dense" if options else "sparse")
        kept = [word for word in words if not (options and word.startswith("sparsity="))]
        command = [sys.executable, str(ROOT / "train.py"), *kept, *options, f"hydra.run.dir={folder}"]
        subprocess.run([*command, "trainer.enable_progress_bar=false"], check=True, capture_output=True, cwd=tmp_path)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["test/acc"] == pytest.approx(float(accuracy), abs=band)


def test_the_files_of_a_run_are_on_the_page_with_their_keys(finished: Path) -> None:
    page = (ROOT / "docs" / "reference" / "files.md").read_text()
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {"metrics.json", "history.csv"} <= files
    assert [name for name in sorted(files) if f"`{name}`" not in page] == []
    parts = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(parts) == {"metrics.json", "status.json", "history.csv", "layers.csv"}
    for name, text in parts.items():
        if name.endswith(".json"):
            keys = set(json.loads((finished / name).read_text()))
        else:
            keys = set((finished / name).read_text().partition("\n")[0].split(","))
        keys = {key for key in keys if not key.startswith(("val/", "train/", "test/"))}
        assert [key for key in sorted(keys) if f"`{key}`" not in text] == [], name
        if name == "metrics.json":
            written = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE))))
            assert written - keys == {"sparsity_quantized", "exports_failed", "target"}  # of runs with other settings
