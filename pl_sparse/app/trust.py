"""What the folder of a run may have built: classes that are known to be parts of a run, of packages that are known.

The settings in a run's folder are of whoever wrote it. A `_target_` can name anything that can be imported, and many
things run code or read pickled objects when they are called, some in torch and Lightning too. So what a folder names is
looked at before it is imported: where its module lies, where it is defined, and what kind of thing it is.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import sysconfig
import typing
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from yaml import YAMLError  # type: ignore[import-untyped]

from pl_sparse.app.aliases import TARGETS
from pl_sparse.app.settings import CONF, ConfigError
from pl_sparse.core.files import read_yaml
from pl_sparse.core.registry import Axis, registered
from pl_sparse.export.format import Export
from pl_sparse.export.hardware import Hardware
from pl_sparse.quantize import Quantization
from pl_sparse.results.runs import printable
from pl_sparse.tasks.lr import LRSchedule

__all__ = ["Untrusted", "leaves", "read_settings"]

_KINDS = (
    nn.Module, Optimizer, LRScheduler, LRSchedule, Dataset, LightningDataModule, Callback, Logger, Trainer,
    SimpleProfiler, Axis, Export, Hardware, Quantization,
)  # fmt: skip
_LIBRARIES = (
    "pl_sparse",
    "torch.nn.modules",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers.simple",
    "lightning.pytorch.trainer.trainer",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.trainer.trainer",
    "torchmetrics.classification",
    "torchmetrics.regression",
    "torchmetrics.aggregation",
)
"""Where classes are defined that do what their kind does, and neither run a command nor read what is pickled."""
_TOPS = tuple(dict.fromkeys(name.partition(".")[0] for name in _LIBRARIES))
_AXES = ("scorer", "schedule", "structure", "allocation", "updater", "masking", "regularizer")
_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w.]*\}")


class Untrusted:
    """What stands in a file of a run's folder.

    Args:
        file: which one it stands in.
        run: the run's folder. Nothing in it is imported, nor below the folder of the current one that it is in: an
            archive may bring modules beside the run.
        way: how to trust it, for messages.
    """

    def __init__(self, file: Path, run: Path, way: str) -> None:
        self.file, self.run, self.way = file, run, way
        current = Path.cwd()
        self._strange = {run.resolve()}
        for path in (run.resolve(), Path(os.path.abspath(run))):
            if path.is_relative_to(current):
                self._strange.add(current.joinpath(*path.relative_to(current).parts[:1]))

    def refusal(self, what: str, reason: str) -> ConfigError:
        """The error for something that stands there."""
        return ConfigError(
            f"{self.file}: {printable(what)[:200]} {reason}\n  if you trust whoever wrote the run, {self.way}"
        )

    def check_links(self) -> None:
        """Check that no link leads out of the run's folder: what is written or removed there would be elsewhere.

        Raises:
            ConfigError: one does.
        """
        for parent, folders, files in os.walk(self.run):
            for path in (Path(parent, name) for name in (*folders, *files)):
                if path.is_symlink() and not path.resolve().is_relative_to(self.run.resolve()):
                    raise self.refusal(str(path), "is a link out of the run's folder")

    def check_text(self, key: str, text: str) -> None:
        """Check that a text, before it is resolved, refers to other settings at most.

        Raises:
            ConfigError: it has a resolver, which may read the environment or run code.
        """
        if "${" in _REFERENCE.sub("", text) or "\\$" in text:
            raise self.refusal(f"{key}={text}", "has a resolver, and those of a run's folder are not called")

    def check_value(self, key: str, value: Any) -> None:
        """Check a resolved value: what a `_target_` names, and that no text is resolved again.

        Raises:
            ConfigError: it names what is not built from a run's folder.
        """
        if isinstance(value, str) and "${" in value:
            raise self.refusal(f"{key}={value}", "would be resolved again")
        if key.rpartition(".")[2] == "_target_":
            reason = self._reason(value) if isinstance(value, str) else "it is not a name"
            if reason is not None:
                raise self.refusal(f"{key}={value}", f"is not built from the folder of a run: {reason}")

    def _reason(self, name: str) -> str | None:
        """Why the thing of a name is not built; None if it is."""
        name = TARGETS.get(name, name)
        if name.partition(".")[0] not in _TOPS and name in _plugins():
            return None
        try:
            found = self._located(name)
        except ImportError as error:
            return str(error)
        where = str(getattr(found, "__module__", None))
        if inspect.isclass(found):
            kind, part = found, "it is no"
        elif inspect.isfunction(found):
            if name in _functions():
                return None
            kind, part = _returned(found), "it is a function, and not annotated to return a"
        else:
            return "it is neither a class nor a function"
        if where.partition(".")[0] in _TOPS:
            if not inspect.isclass(found) or not _within(where, _LIBRARIES):
                return f"it is of {where}, which has no part of a run that pl_sparse knows"
        elif not self._is_own(Path(getattr(sys.modules.get(where), "__file__", None) or "/")):
            return f"it is of {where}, {_OUTSIDE}"
        if not (inspect.isclass(kind) and issubclass(kind, _KINDS)):
            return f"{part} network, data, callback, logger, optimizer or other part of a run"
        return None

    def _located(self, name: str) -> Any:
        """What a dotted name stands for, found as Hydra finds it; a module is imported only where it may be.

        Raises:
            ImportError: there is no such thing, or its module may not be imported.
        """
        parts = name.split(".")
        found: Any = None
        for depth, part in enumerate(parts, 1):
            dotted, above = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if not part.isidentifier() or (part.startswith("__") and depth > 1):
                raise ImportError(f"{dotted} is not a name of a class")
            if found is not None and hasattr(found, part):
                found = getattr(found, part)
                if depth < len(parts) and not (inspect.ismodule(found) or inspect.isclass(found)):
                    raise ImportError(f"{dotted} is neither a module nor a class")
                continue
            if found is not None and not (isinstance(found, ModuleType) and sys.modules.get(above) is found):
                raise ImportError(f"{above} has no {part}")
            self._allow(dotted)
            try:
                found = import_module(dotted)
            except Exception as error:
                raise ImportError(f"{dotted} cannot be imported: {error}") from error
        return found

    def _allow(self, module: str) -> None:
        """Check that a module may be imported, whose parent has been.

        Raises:
            ImportError: it may not, or there is none.
        """
        if module in sys.modules:
            return
        top = module.partition(".")[0]
        if top in _TOPS and not any(_within(module, [part]) or _within(part, [module]) for part in _LIBRARIES):
            raise ImportError(f"{module} has no part of a run that pl_sparse knows")
        try:
            spec = find_spec(module)
        except (ImportError, ValueError, AttributeError):
            spec = None
        if spec is None:
            raise ImportError(f"there is no module {module}")
        if spec.origin is None and spec.submodule_search_locations is not None:
            return  # a folder without __init__.py: nothing is run
        path = _file(spec)
        if top in _TOPS:
            refused = path is not None and self._is_strange(path)
        else:
            refused = path is None or not self._is_own(path)
        if refused:
            raise ImportError(f"{module} is {_OUTSIDE}")

    def _is_own(self, path: Path) -> bool:
        """Whether a file is the user's: below the current folder, no installed package, not of the run."""
        path = path.resolve()
        installed = {"site-packages", "dist-packages"} & set(path.parts) or any(
            path.is_relative_to(folder) for folder in _installed()
        )
        return path.is_relative_to(Path.cwd()) and not installed and not self._is_strange(path)

    def _is_strange(self, path: Path) -> bool:
        return any(candidate.is_relative_to(f) for f in self._strange for candidate in (path, path.resolve()))


_OUTSIDE = "neither of pl_sparse, torch, lightning or torchmetrics nor a module of the current folder"


def read_settings(path: Path, run: Path, way: str, trust: bool = False) -> DictConfig:
    """The settings in a file of a run's folder.

    Args:
        path: a YAML.
        run: the run's folder.
        way: how to trust it, for the message.
        trust: whether everything in it may be built.

    Raises:
        ConfigError: they cannot be read, or name what is not built from a run's folder.
    """
    try:
        if not trust:
            read_yaml(path)
        settings = OmegaConf.load(path)
        if not isinstance(settings, DictConfig):
            raise ConfigError(f"{path} holds no settings by name")
        if not trust:
            untrusted = Untrusted(path, run, way)
            untrusted.check_links()
            for key, value in leaves(OmegaConf.to_container(settings, resolve=False)):
                if isinstance(value, str):
                    untrusted.check_text(key, value)
            for key, value in leaves(OmegaConf.to_container(settings, resolve=True, throw_on_missing=False)):
                untrusted.check_value(key, value)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return settings


def leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """All values of nested settings with their dotted keys; each key, and what `_target_` holds, is a value too.

    >>> dict(leaves({"a": [{"_target_": "b.C"}, 1]}))
    {'a': 'a', 'a[0]._target_': 'b.C', 'a[1]': 1}
    """
    if isinstance(node, dict):
        for key, value in node.items():
            inner = f"{where}.{key}".lstrip(".")
            yield inner, value if key == "_target_" else str(key)
            if key != "_target_" or not isinstance(value, str):
                yield from leaves(value, inner)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from leaves(value, f"{where}[{index}]")
    else:
        yield where, node


def _within(module: str, packages: typing.Iterable[str]) -> bool:
    """
    >>> _within("torch.optim.adam", ["torch.optim"]), _within("torch.optimizer", ["torch.optim"])
    (True, False)
    """
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _returned(function: Any) -> Any:
    """The class that a function is annotated to return; None where it is not."""
    try:
        return typing.get_type_hints(function).get("return")
    except Exception:
        return None


def _file(spec: ModuleSpec) -> Path | None:
    return Path(spec.origin) if spec.has_location and spec.origin is not None else None


@cache
def _installed() -> tuple[Path, ...]:
    """The folders of the standard library and of installed packages."""
    return tuple(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib"))


@cache
def _functions() -> frozenset[str]:
    """The functions of pl_sparse that its own configuration names."""
    texts = (path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml"))
    names = {name for text in texts for name in re.findall(r"_target_:\s*(pl_sparse\.[\w.]+)", text)}
    return frozenset({*names, *TARGETS.values()})


def _plugins() -> set[str]:
    """The classes that installed packages give a name on an axis."""
    return {entry.path for axis in _AXES for entry in registered(axis).values() if not entry.builtin}
