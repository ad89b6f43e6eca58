"""Times: fractions of training, optimizer steps, epochs."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import TypeAlias

__all__ = ["Time", "parse"]

Time: TypeAlias = "float | int | str"
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?)\s*")


@lru_cache(typed=True)  # asked for at each step; 1 and True are not the same
def parse(time: Time, what: str) -> tuple[float, str]:
    """A time as (number, unit); the units are "fraction", "steps" and "epochs"."""
    if isinstance(time, str):
        match = _TIME.fullmatch(time)
        if not match:
            raise ValueError(f"{what}={time!r} is not a time: write a fraction such as 0.1, '500 steps' or '2 epochs'")
        return float(match[1]), "epochs" if match[2].startswith("epoch") else "steps"
    if isinstance(time, bool) or not math.isfinite(time) or time < 0:
        raise ValueError(f"{what}={time!r} must not be negative: a fraction of training in [0, 1] or optimizer steps")
    if time <= 1:
        return float(time), "fraction"
    if time != int(time):
        raise ValueError(f"{what}={time!r}: a fraction of training is at most 1, and optimizer steps are whole")
    return float(time), "steps"
