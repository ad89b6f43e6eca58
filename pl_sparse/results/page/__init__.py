"""The page of a set of runs: one file that works offline."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = []


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Files


def _page(found: Mapping[str, Any]) -> str:
    """The page, whole in itself: its policy lets nothing but its own script and style run, and loads nothing."""
    here = Path(__file__).parent
    style, script = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = json.dumps(_plain(found), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {"DATA": data, "STYLE": style, "SCRIPT": script, "STYLE_HASH": _hash(style), "SCRIPT_HASH": _hash(script)}
    page = (here / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\$(STYLE_HASH|SCRIPT_HASH|STYLE|SCRIPT|DATA)", lambda match: parts[match[1]], page)


def _plain(found: Any) -> Any:
    """Numbers that JSON lacks become null."""
    if isinstance(found, float):
        return _known(found)
    if isinstance(found, Mapping):
        return {key: _plain(value) for key, value in found.items()}
    return [_plain(value) for value in found] if isinstance(found, (list, tuple)) else found


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
