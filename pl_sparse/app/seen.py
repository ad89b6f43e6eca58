"""The configuration as Hydra sees it, with the folders that a command names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from pl_sparse.app.hydra_api import composition, quoted
from pl_sparse.app.settings import CONF, ConfigError

__all__ = ["Seen"]


class Seen:
    """The configuration as Hydra sees it: with the folders that a command names beside those of the package.

    Args:
        options: Hydra's own, as `arranged` gives them.
        settings: what else was typed.

    Attributes:
        overrides: the settings, parsed.
        multirun: whether they are those of several runs.

    Raises:
        HydraException: the settings cannot be parsed.
        ConfigError: a folder of configurations does not exist.
    """

    def __init__(self, options: Sequence[str], settings: Sequence[str]) -> None:
        self.overrides: list[Override] = OverridesParser.create().parse_overrides(list(settings))
        self.multirun = bool({"-m", "--multirun"} & set(options)) or "hydra.mode=MULTIRUN" in settings
        self.name = _value(options, "--config-name", "-cn") or "train"
        self._folder = str(Path(__file__).parent / (_value(options, "--config-path", "-cp") or CONF))
        folders = [
            str(folder)
            for override in self.overrides
            if override.key_or_group == "hydra.searchpath" and isinstance(override.value(), list)
            for folder in override.value()  # type: ignore[union-attr]
        ]
        added = _value(options, "--config-dir", "-cd")
        for what, folder in [("--config-dir ", added), *(("hydra.searchpath: ", folder) for folder in folders)]:
            if folder is None or folder.startswith("pkg://"):
                continue
            path = Path(folder.removeprefix("file://"))
            if not path.is_dir():
                raise ConfigError(f"{what}{folder} is not a folder: its groups are folders of YAML files below it")
        paths = [*([f"file://{Path(added).resolve()}"] if added else []), *folders]
        own = Path(added or ".") / f"{self.name}.yaml"
        if added and own.is_file() and not (Path(self._folder) / f"{self.name}.yaml").is_file():
            paths.append(f"file://{self._folder}")
            self._folder = str(own.parent.resolve())  # a configuration of one's own, over that of the package
        self._path = [f"hydra.searchpath=[{','.join(map(quoted, paths))}]"] if paths else []
        self._places = [found for place in (self._folder, *paths) if (found := _folder_of(place))]
        self._groups: list[str] | None = None

    def compose(self, settings: Sequence[str]) -> DictConfig:
        """The configuration of one run, without Hydra's own settings.

        Args:
            settings: as they are typed, without several values.
        """
        GlobalHydra.instance().clear()
        with composition(self._folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hydra.compose(self.name, [*settings, *self._path])

    def options(self, group: str) -> list[str]:
        """The names of the options of a group."""
        GlobalHydra.instance().clear()
        with composition(self._folder):
            loader = GlobalHydra.instance().config_loader()
            names: list[str] = loader.get_group_options(group, config_name=self.name, overrides=self._path)
            return names

    @property
    def groups(self) -> list[str]:
        """The names of all groups but Hydra's."""
        if self._groups is None:
            GlobalHydra.instance().clear()
            with composition(self._folder):
                loader = GlobalHydra.instance().config_loader()
                loader.get_group_options("model", config_name=self.name, overrides=self._path)
                self._groups = sorted(set(loader.list_groups("")) - {"hydra"})
        return self._groups

    @property
    def defaults(self) -> list[Any]:
        """The defaults list of the configuration."""
        path = Path(self._folder) / f"{self.name}.yaml"
        node: Any = OmegaConf.load(path) if path.is_file() else {}
        return list(node.get("defaults", []))

    def choosing(self, group: str, key: str) -> list[str]:
        """The options of a group that have a key, from their files."""
        found = []
        for option in self.options(group):
            node = self._file(f"{group}/{option}")
            above = None if node is None else OmegaConf.select(node, key.rpartition(".")[0], throw_on_missing=False)
            if isinstance(above, DictConfig) and key.rpartition(".")[2] in list(above):  # it may be missing: ???
                found.append(option)
        return found

    def _file(self, name: str) -> DictConfig | None:
        for path in (place / f"{name}.yaml" for place in self._places):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                node = OmegaConf.create(text) if text.strip() else OmegaConf.create()
                if isinstance(node, DictConfig):
                    return node if "@package _global_" in text else OmegaConf.create({name.partition("/")[0]: node})
        return None


def _folder_of(place: str) -> Path | None:
    """The folder that an element of the search path names; None where there is none of its own."""
    if not place.startswith("pkg://"):
        return Path(place.removeprefix("file://"))
    spec = find_spec(place.removeprefix("pkg://").replace("/", "."))
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _value(options: Sequence[str], *names: str) -> str | None:
    for index, option in enumerate(options):
        name, given, value = option.partition("=")
        if name in names:
            return value if given else options[index + 1]
    return None
