"""When to prune, and how sparse: a curve from dense to the final sparsity, read at optimizer steps.

Times (`begin`, `end`) are fractions of training (a number from 0 to 1), optimizer steps (a whole number above 1, or
"500 steps") or epochs ("2 epochs"). `every` is a fraction of the time from `begin` to `end` (a number below 1), a count
of optimizer steps (1 or more), or "1 epoch". The argument `step` is the number of optimizer steps already taken; in a
training of `total` steps the last one is `total - 1`. The level due at `end` is always set, even if `end` is not a
multiple of `every`.
"""

from pl_sparse.schedule.base import Schedule
from pl_sparse.schedule.gradual import Cosine, Cubic, Exponential, Linear
from pl_sparse.schedule.paced import Decisions, Paced
from pl_sparse.schedule.rounds import Constant, Cyclic, Iterative, OneShot, Staircase
from pl_sparse.schedule.tickets import Tickets
from pl_sparse.schedule.time import Time

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Cyclic",
    "Decisions",
    "Exponential",
    "Iterative",
    "Linear",
    "OneShot",
    "Paced",
    "Schedule",
    "Staircase",
    "Tickets",
    "Time",
]
