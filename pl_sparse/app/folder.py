"""A run's folder: one run has it, one process at a time writes into it, and what the run wrote is known."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pl_sparse.app.checkpoints import refuse_other_settings
from pl_sparse.app.hydra_api import register_resolver
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.sweep.identity import run_fingerprint
from pl_sparse.callbacks.run.status import read_status
from pl_sparse.core.files import is_full, remove_temporaries
from pl_sparse.core.ledger import Ledger

__all__ = ["FolderError", "Keep", "RunFolder", "leave", "lock", "of_hydra", "run_dir", "take", "unlock"]

_SAVED = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "status.json")
"""The small files that say what a run is."""
_PATTERNS = (
    *_SAVED, "metrics.json", "front.json", "config.yaml", "run.log", "model.safetensors", "shrunk.json", "history.csv",
    "ranges.safetensors", "layers.csv", "layers.png", "training.png", "masks.png", "bench.json", "bench.csv",
    "bench.png", "tickets.csv", "tickets.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
    "checkpoints/prefix.ckpt", "levels/rewind.safetensors", "levels/level_*/*",
)  # fmt: skip
"""What runs write, for those that kept no ledger and those that were killed before it was written."""
_RESULTS = ("metrics.json", "model.safetensors", "checkpoints/*.ckpt")
_held: dict[Path, RunFolder] = {}


class FolderError(ConfigError):
    """The folder is another run's, or another process writes into it."""


class RunFolder:
    """A folder that this process alone writes into, until it is released; as a context it is released at the end.

    Where training has not begun, an error leaves the folder as it was found: no folder if there was none.

    Args:
        path: the folder; it is made.

    Attributes:
        ledger: what the run writes there.
        continues: whether a run goes on that was there before.

    Raises:
        FolderError: another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path)
        self.continues = False
        self._begun = False
        self._aside = path / f".replaced.{uuid4().hex}"
        self._before: dict[Path, bytes] = {}
        self._lock: FileLock | None = None
        self._noting: AbstractContextManager[None] | None = None
        self._made = [place for place in (path, *path.parents) if not place.exists()]
        if getattr(rank_zero_only, "rank", 0) == 0:  # the other processes of a training write nothing
            try:
                path.mkdir(parents=True, exist_ok=True)
                self._lock = lock(path)
            except OSError as error:
                if is_full(error):
                    raise
                raise FolderError(f"output_dir={path} cannot be written into: {error.strerror}") from error
            _held[path.resolve()] = self
        self._noting = self.ledger.noting()
        self._noting.__enter__()

    def open(self, cfg: DictConfig) -> None:
        """Make room for a run, or prepare that the one which is there goes on.

        Args:
            cfg: the run's settings.

        Raises:
            FolderError: there is another run, and `overwrite` is not set.
        """
        if self._lock is None:
            return
        status = read_status(self.path)
        self.continues = _goes_on(cfg, self.path, status)
        self.ledger.written = set(_strings((status or {}).get("files")))
        self.ledger.found = set(_strings((status or {}).get("found")))
        for folder in {self.path, *(self.path / name for name in self._folders())}:
            remove_temporaries(folder)
        if self.continues:
            self.ledger.written |= (
                self._known() - self.ledger.found - set(_SAVED)
            )  # it may have been killed before it was noted
            self._before = {path: path.read_bytes() for name in _SAVED if (path := self.path / name).is_file()}
            return
        if _is_of_this_sweep(cfg, self.path, status):
            raise FolderError(
                f"{self.path} holds another run of this sweep\n  hydra.sweep.subdir must name another folder for each "
                "run: leave it out, or include what differs, as in hydra.sweep.subdir='${hydra:job.num}'"
            )
        allowed = cfg.get("overwrite") is True or _is_sweep() or _starts_again(cfg, self.path, status)
        if not allowed and any(any(self.path.glob(name)) for name in _RESULTS):
            raise FolderError(_refusal(self.path, status, bool(cfg.get("resume"))))
        if status is not None:
            self.ledger.move(self._aside, self._known())
        self.ledger.found = self._known()

    def _known(self) -> set[str]:
        """The names of runs' files that are there."""
        return {path.relative_to(self.path).as_posix() for name in _PATTERNS for path in self.path.glob(name)}

    def _folders(self) -> set[str]:
        """Folders below that the run wrote into."""
        return {str(Path(name).parent) for name in {*self.ledger.written, *self._known()} if ".." not in name}

    @contextmanager
    def noting_new(self) -> Iterator[None]:
        """Note as written what is new in the folder after the block: loggers write their own way."""
        before = set(os.listdir(self.path)) if self.path.is_dir() else set()
        try:
            yield
        finally:
            if self.path.is_dir():
                self.ledger.written |= set(os.listdir(self.path)) - before

    def begin(self) -> None:
        """Training begins: what was there before is given up."""
        self._begun = True
        shutil.rmtree(self._aside, ignore_errors=True)

    def undo(self) -> None:
        """Leave the folder as it was found."""
        if self._lock is None:
            return
        if self.continues:
            for path, content in self._before.items():
                if not path.is_file() or path.read_bytes() != content:
                    path.write_bytes(content)
        else:
            self.ledger.clear(self._known())
        if self._aside.is_dir():
            Ledger(self._aside, _names(self._aside)).move(self.path)
        self.release()
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def release(self) -> None:
        """Let others write here."""
        if self._noting is not None:
            self._noting.__exit__(None, None, None)
            self._noting = None
        if self._lock is not None:
            _held.pop(self.path.resolve(), None)
            shutil.rmtree(self._aside, ignore_errors=True)
            unlock(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._begun and not _is_sweep():
            self.undo()
        self.release()


class Keep(Callback):
    """Says to a folder that training begins."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.begin()


def take(cfg: DictConfig) -> RunFolder:
    """Take the folder of a run, or give the one that this process has taken for it before.

    Args:
        cfg: with `output_dir`, `ckpt_path`, `resume`, `overwrite`.

    Raises:
        FolderError: it holds another run, or another process writes into it; nothing has changed then.
        ConfigError: `ckpt_path` cannot be gone on from with these settings.
    """
    path = Path(cfg.output_dir)
    if path.exists() and not path.is_dir():
        raise FolderError(f"output_dir={path} is a file: a run needs a folder")
    if (held := _held.get(path.resolve())) is not None:
        return held
    if cfg.get("ckpt_path") is not None:
        with suppress(OmegaConfBaseException):  # which the check of all settings explains
            refuse_other_settings(cfg)
    folder = RunFolder(path)
    try:
        folder.open(cfg)
    except BaseException:
        folder.release()
        for made in folder._made:
            with suppress(OSError):
                made.rmdir()
        raise
    return folder


def leave(undo: bool) -> None:
    """Release the folders that are still taken: their runs were not begun.

    Args:
        undo: leave them as they were found.
    """
    for folder in list(_held.values()):
        if undo and not folder._begun:
            folder.undo()
        folder.release()


def lock(folder: Path) -> FileLock:
    """Lock a folder against other processes, until `unlock` or the end of this process in whatever way.

    Raises:
        FolderError: another process has it.
    """
    file = FileLock(folder / ".lock")
    try:
        file.acquire(timeout=0)
    except Timeout:
        number = (read_status(folder) or {}).get("process")
        raise FolderError(
            f"another process{f' ({number})' if number else ''} writes into {folder}: wait for its end, or give this "
            "run another folder by output_dir=..."
        ) from None
    return file


def unlock(file: FileLock) -> None:
    """Unlock what `lock` locked."""
    with suppress(OSError):
        os.unlink(file.lock_file)  # while it is held: who comes later makes a new one
    file.release()


def run_dir(default: str, *, _root_: DictConfig) -> str:
    """Hydra's folder of a run: `output_dir`, so that all of the run is in one.

    Args:
        default: where none is given.
        _root_: the whole configuration, which the resolver is given.
    """
    folder = _root_.get("output_dir")
    return default if folder is None else str(folder)


register_resolver("run_dir", run_dir)


def of_hydra(config: DictConfig) -> DictConfig:
    """The settings of a run in Hydra's configuration, with the folder that Hydra has for it.

    Raises:
        ConfigError: `output_dir` and `hydra.run.dir` are two folders.
    """
    cfg = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.set_struct(cfg, False)
    folder = str(config.hydra.run.dir)
    if cfg.output_dir is None:
        cfg.output_dir = folder
    if Path(str(cfg.output_dir)).resolve() != Path(folder).resolve():
        raise ConfigError(
            f"output_dir={cfg.output_dir} and hydra.run.dir={folder} are two folders for one run: give output_dir alone"
        )
    return cfg


def _goes_on(cfg: DictConfig, path: Path, status: dict[str, Any] | None) -> bool:
    """Whether the run in a folder is the one that is asked for."""
    if status is None:
        return False
    if cfg.get("ckpt_path") is not None:
        return path.resolve() in Path(str(cfg.ckpt_path)).resolve().parents
    return bool(cfg.get("resume")) and status.get("config") == run_fingerprint(cfg, path)


def _starts_again(cfg: DictConfig, path: Path, status: dict[str, Any] | None) -> bool:
    """Whether the run in a folder is the one that is asked for, and was ended before its first epoch was."""
    if status is None or (cfg.get("callbacks") or {}).get("last") is None:
        return False
    begun = any((path / name).exists() for name in ("metrics.json", "checkpoints/last.ckpt"))
    return not begun and status.get("config") == run_fingerprint(cfg, path)


def _refusal(path: Path, status: dict[str, Any] | None, resume: bool) -> str:
    what = "checkpoints or a model of another program" if status is None else f"another run ({status.get('state')})"
    if status is not None and resume:
        what = f"a run with other settings ({status.get('state')})"
    last = path / "checkpoints" / "last.ckpt"
    goes_on = f"ckpt_path={last} resumes it, " if status is not None and last.is_file() else ""
    return (
        f"{path} holds {what}\n  {goes_on}overwrite=true clears what it wrote and trains again, output_dir=... is "
        "another folder"
    )


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _is_of_this_sweep(cfg: DictConfig, path: Path, status: dict[str, Any] | None) -> bool:
    """Whether a folder holds another run that this sweep has trained: one whose status is newer than its start."""
    if status is None or not _is_sweep() or status.get("config") == run_fingerprint(cfg, path):
        return False
    try:
        begun = (Path(HydraConfig.get().sweep.dir) / "multirun.yaml").stat().st_mtime
        return (path / "status.json").stat().st_mtime > begun
    except OSError:
        return False


def _strings(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
