"""Errors in a line or two: those of Hydra in the words of what was typed, those of the user's code with its frames."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException

from pl_sparse.app.arguments import refusal
from pl_sparse.app.seen import Seen
from pl_sparse.core.registry import suggestion

__all__ = ["damaged_yaml", "explanation", "is_of_the_user", "own_frames"]

_PACKAGE = Path(__file__).resolve().parents[1]


def explanation(error: BaseException, options: Sequence[str], settings: Sequence[str]) -> str:
    """The message of a composition error, with what was probably meant.

    Args:
        error: Hydra's, or OmegaConf's.
        options: of Hydra, as they were typed: folders of configurations above all.
        settings: as they were typed.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Ambiguous value"):
        typed = lines[0].partition("'")[2].rpartition("'")[0]
        key, _, values = typed.partition("=")
        return (
            f"{typed} is several values: -m trains a run per value (pl-sparse sweep does)\n"
            f"a list is {key}=[{values}], a text {key}=\"'{values}'\""
        )
    try:
        seen = Seen(options, settings)
    except HydraException:
        return _syntax(lines, settings)
    if (damaged := damaged_yaml(error)) is not None:
        return damaged
    for link in _chain(error):
        missing = str(getattr(link, "missing_cfg_file", None) or "")
        group, _, name = missing.rpartition("/")
        if missing and group and missing != seen.name:
            known = getattr(link, "options", None) or seen.options(group)
            return f"{group}={name}: there is no such {group}. {suggestion(name, known)}"
        if missing:
            return f"--config-name {missing}: there is no such configuration. {suggestion(missing, seen.options(''))}"
    name = lines[0].partition("'")[2].partition("'")[0]
    if lines[0].startswith("Could not override"):
        if name in seen.groups or "/" in name or "@" in name:
            return "\n".join(line.replace("default list", "defaults list") for line in lines[:2])
        return refusal(name, None, seen)
    if lines[0].startswith("Could not delete"):
        if "does not exist" not in lines[0] and "No match" not in lines[0]:
            return lines[0]
        return f"~{name}: there is no such setting to leave out. {refusal(name, None, seen)}"
    if lines[0].startswith("Could not append"):
        typed = next((part for line in lines for part in [line.rpartition("prefix: ")[2]] if "prefix:" in line), "")
        return f"{name} has a value: write {typed.strip(chr(39)) or name}, or ++{name}=..."
    if lines[0].startswith("Error merging override"):
        cause = str(error.__cause__ or "").strip().splitlines()
        return f"{lines[0].removeprefix('Error merging override ')}: {cause[0] if cause else 'it does not fit'}"
    where = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    if not where and lines[0].startswith("Interpolation key"):
        where = next((setting for setting in settings if f"${{{name}" in setting), "")
    return f"{where}: {lines[0]}" if where and where not in lines[0] else lines[0]


def damaged_yaml(error: BaseException) -> str | None:
    """The message for an error whose cause is a file that is not YAML; None where it is not."""
    for link in _chain(error):
        if isinstance(link, yaml.MarkedYAMLError):
            mark = link.problem_mark or link.context_mark
            where = "" if mark is None else f"{mark.name}, line {mark.line + 1}: "
            return f"{where}not YAML: {link.problem or link.context}"
    return None


def _syntax(lines: Sequence[str], settings: Sequence[str]) -> str:
    """The message for settings that Hydra cannot parse: which one, where, and how it is quoted."""
    for setting in settings:
        try:
            Seen([], [setting])
        except Exception:
            key, _, value = setting.partition("=")
            inner = value.strip("'\"")
            quotes = "\"'" + inner.replace("'", "\\'") + "'\""
            hint = f": a value with blanks, brackets, quotes or commas is {key}={quotes}" if inner else ""
            return f"{setting} cannot be read ({lines[0]}){hint}"
    return lines[0]


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and those that it comes from."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


# Errors of the user's code


def is_of_the_user(error: BaseException) -> bool:
    """Whether an error was raised in code of the user's, or in what that called."""
    return bool(_frames_of(error))


def own_frames(error: BaseException) -> str:
    """The traceback of an error, cut to the user's frames."""
    kept = _frames_of(error)
    lines = ["Traceback (most recent call last), without the frames of libraries:\n"] if kept else []
    return "".join([*lines, *traceback.format_list(kept), *traceback.format_exception_only(error)])


def _frames_of(error: BaseException) -> list[traceback.FrameSummary]:
    frames = list(traceback.walk_tb(error.__traceback__))
    below = [i for i, (frame, _) in enumerate(frames) if _PACKAGE in Path(frame.f_code.co_filename).resolve().parents]
    kept = [(frame, line) for frame, line in frames[below[0] if below else 0 :] if _is_own(frame)]
    return list(traceback.StackSummary.extract(iter(kept)))


def _is_own(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    if name.startswith("<"):
        return False
    path = Path(name).resolve()
    libraries = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not ({_PACKAGE, *libraries, Path(sys.prefix) / "lib"} & set(path.parents))
