"""The page of a set of runs: one file that works offline."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pl_sparse.core.files import finite

__all__ = ["render"]

_FOLDER = Path(__file__).parent
_SCRIPTS = ("data.js", "plot.js", "tables.js", "controls.js")  # each uses names of those before it


def render(contents: Mapping[str, Any]) -> str:
    """The HTML of the page with data, style and script in it.

    Its content security policy names the hashes of this one style and script. Nothing else runs, and nothing is loaded.

    Args:
        contents: what is in pareto.json.
    """
    style = _text("page.css")
    script = "\n".join(map(_text, _SCRIPTS))
    # "<" is escaped, so that no text in the data ends the script element
    data = json.dumps(finite(contents), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {"DATA": data, "STYLE": style, "SCRIPT": script, "STYLE_HASH": _hash(style), "SCRIPT_HASH": _hash(script)}
    return re.sub(r"\$(STYLE_HASH|SCRIPT_HASH|STYLE|SCRIPT|DATA)", lambda match: parts[match[1]], _text("page.html"))


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
