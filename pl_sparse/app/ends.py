"""How a run ends before its end: by a signal, a full disk, or weights that are not numbers."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from pl_sparse.callbacks.run.divergence import DivergedError, diverged, not_finite
from pl_sparse.core.files import is_full

__all__ = [
    "EndedError",
    "Interrupted",
    "Reminder",
    "asked",
    "end_with_parent",
    "explained",
    "how_to_go_on",
    "say",
    "signals",
]

_STARTED_BY = "PL_SPARSE_STARTED_BY"
_AGAIN = 3.0  # seconds in which a repeated signal is the same one
_asked: tuple[int, float] | None = None  # the signal that asked for an end, and when


class EndedError(RuntimeError):
    """A training ended early; the message says why, where, and how to go on."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        number: the signal's.
        folder: of the run that was interrupted.
    """

    def __init__(self, number: int, folder: Path | None = None) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number
        self.folder = folder


def asked() -> int | None:
    """The signal that has asked this process to end, within `signals()`."""
    return None if _asked is None else _asked[0]


def end_with_parent() -> None:
    """Let a process that was started as a further one of a training end when the one that started it is gone (Linux).

    It would wait for it otherwise: half an hour if they have not met yet, in code that no other signal ends.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[_STARTED_BY] = str(os.getpid())  # of the further ones
    elif sys.platform == "linux":
        starter, die_with_parent = int(os.environ.get(_STARTED_BY, os.getppid())), 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
        if os.getppid() != starter and not _is_there(starter):  # gone before; one that is there started something else
            os.kill(os.getpid(), signal.SIGKILL)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def signals() -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise `Interrupted`, unless they are ignored or handled already.

    An error that comes after a signal is the signal's: libraries raise ones of their own where they are interrupted.
    """
    global _asked
    _asked = None
    earlier: dict[int, Any] = {}
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        global _asked
        if os.getpid() != process:  # a worker of a loader, which has inherited this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _asked is not None and time.monotonic() - _asked[1] < _AGAIN and number != signal.SIGINT:
            return  # terminals and schedulers repeat themselves
        _asked = number, time.monotonic()
        raise Interrupted(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                earlier[number] = signal.signal(number, end)
    except ValueError:  # signals are the main thread's
        pass
    try:
        yield
    except Exception as error:
        if _asked is not None:
            raise Interrupted(_asked[0]) from error
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        _asked = None


class Reminder(Callback):
    """Ends a training whose signal came where exceptions are swallowed, such as in a destructor."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if _asked is not None:
            raise Interrupted(_asked[0])


def _signal_of(error: BaseException) -> int | None:
    """The signal behind an exception, which Lightning turns into an exit; None where there is none."""
    if _asked is not None:
        return _asked[0]
    if not isinstance(error, (KeyboardInterrupt, SystemExit)):
        return None
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, Interrupted):
            return link.number
        if isinstance(link, SIGTERMException):
            return int(signal.SIGTERM)
        if isinstance(link, KeyboardInterrupt):
            return int(signal.SIGINT)
        link = link.__cause__ or link.__context__
    return None


@contextmanager
def explained(folder: Path, module: nn.Module) -> Iterator[None]:
    """Within the block exceptions that a signal, a full disk or a divergence caused say so.

    Args:
        folder: the run's.
        module: what is trained.

    Raises:
        Interrupted: by a signal.
        EndedError: by a full disk, or weights that are not finite.
    """
    try:
        yield
    except BaseException as error:
        number = _signal_of(error)
        if number is not None:
            raise Interrupted(number, folder) from error
        message = _explanation(error, folder, module)
        if message is not None:
            raise EndedError(message) from error
        raise


def _explanation(error: BaseException, folder: Path, module: nn.Module) -> str | None:
    last = folder / "checkpoints" / "last.ckpt"
    if is_full(error):
        assert isinstance(error, OSError)
        go_on = f"ckpt_path={last} goes on" if last.is_file() else "there is no checkpoint yet: start it again"
        return f"the disk is full: {error.filename or folder} could not be written\n  make room on it, then {go_on}"
    if isinstance(error, (ArithmeticError, ValueError, RuntimeError)):
        first = str(error) if isinstance(error, DivergedError) else None
        names = [] if first else not_finite(module)
        if names:
            first = diverged(names, getattr(_trainer(module), "current_epoch", 0))
        if first:
            kept = f"{last} is of the epoch before; " if last.is_file() else ""
            return f"{first}\n  {kept}a lower optimizer.lr or trainer.gradient_clip_val=1 usually helps"
    return None


def _trainer(module: nn.Module) -> Trainer | None:
    try:
        return getattr(module, "trainer", None)
    except RuntimeError:
        return None


def how_to_go_on(end: KeyboardInterrupt, command: Sequence[str], sweep: bool) -> str:
    """The lines for a run or sweep that a signal has ended.

    Args:
        end: the exception.
        command: the arguments as they were typed.
        sweep: whether they are those of a sweep.
    """
    name = signal.Signals(end.number if isinstance(end, Interrupted) else signal.SIGINT).name
    folder = end.folder if isinstance(end, Interrupted) else None
    last = None if folder is None else folder / "checkpoints" / "last.ckpt"
    if sweep:
        given = [argument for argument in command if not argument.startswith("resume=")]
        return f"interrupted by {name}\n  resume it by: {_program()} {shlex.join([*given, 'resume=true'])}"
    if last is None or not last.is_file():
        return f"interrupted by {name} before the first checkpoint\n  it starts again with the same command"
    go_on = shlex.join([f"ckpt_path={last}"])
    return f"interrupted by {name}; the last checkpoint is {last}\n  resume it by: {_program()} {go_on}"


def _program() -> str:
    name = Path(sys.argv[0]).name
    return f"python {shlex.quote(sys.argv[0])}" if name.endswith(".py") and name[0] != "_" else "pl-sparse train"


def say(text: str) -> None:
    """Print on stderr, where anybody reads it: a terminal that is gone must not change how the process ends."""
    for stream, words in ((sys.stdout, ""), (sys.stderr, f"{text}\n")):
        try:
            stream.write(words)
            stream.flush()
        except (OSError, ValueError):
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2 if stream is sys.stderr else 1)
