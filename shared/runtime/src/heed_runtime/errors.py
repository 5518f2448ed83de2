"""What went wrong, as one line and an exit code.

| code | means |
| --- | --- |
| 0 | done |
| 1 | a fault of ours, or `check` found problems |
| 2 | a fault of the user's input: one line that names the file, what is wrong and what to do |
| 130 | stopped with Ctrl-C |
| 143 | stopped with SIGTERM |
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable

from heed_core.errors import InputError, MissingExtra

FAULT, USER, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_OF_A_PATH = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


class UsageError(InputError):
    """The command line cannot be understood or asks for what has no effect."""


class Terminated(KeyboardInterrupt):
    """The program was asked to end by SIGTERM, as schedulers do, not by Ctrl-C."""


def nearest(name: str, allowed: Iterable[str], *, prefix: str = "") -> str:
    """A remedy for an unknown name: the nearest allowed one, or all of them.

    Example:
        >>> nearest("widht", ["width", "depth"])
        "did you mean 'width'?"
    """
    names = list(allowed)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        return f"did you mean '{prefix}{close[0]}'?"
    return "allowed: " + ", ".join(names) if names else "nothing is allowed here"


def user_fault(error: BaseException) -> str | None:
    """The one line for a fault of the user's input; None if the fault is ours.

    An `InputError` that was raised in a data loader's worker arrives as a new exception whose
    message is a traceback; its last line is the original one.
    """
    if isinstance(error, InputError | MissingExtra) or _refused_backend(error):
        return _original_line(error)
    if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename:
        return f"{error.filename}: {(error.strerror or 'cannot be read').lower()}"
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return f"cannot write: {(error.strerror or 'the disk is full').lower()}; free some space"
    if _from_worker(error) and (line := _worker_input_error(str(error))):
        return line
    return None


def guard(name: str, body: Callable[[], int], *, debug: bool = False) -> int:
    """Run `body`; show what it raises as one line on standard error and return the exit code.

    A KeyboardInterrupt may say how to go on.

    Args:
        name: The program's name, which starts the line.
        body: Does the work, returns the exit code.
        debug: Show the traceback too.
    """
    try:
        return body()
    except KeyboardInterrupt as stop:
        _line(f"{name}: stopped; {stop}" if stop.args else f"{name}: stopped")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        line = user_fault(error)
        if line is not None:
            _line(f"{name}: error: {line}")
            return USER
        _line(f"{name}: internal error: {_first_line(error)}; {_where(error, debug=debug)}")
        return FAULT


def _where(error: Exception, *, debug: bool) -> str:
    notes = [note for note in getattr(error, "__notes__", ()) if "traceback" in note]
    if notes:
        return str(notes[-1])
    return "please report it" if debug else "run again with --debug for the traceback"


def _refused_backend(error: BaseException) -> bool:
    """Whether `--impl` asked for a back-end that cannot run the call; imports nothing for it."""
    dispatch = sys.modules.get("heed_core.dispatch")
    return dispatch is not None and isinstance(error, dispatch.UnsupportedBackend)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _from_worker(error: BaseException) -> bool:
    return "Caught " in str(error) and " in DataLoader worker process" in str(error)


def _worker_input_error(message: str) -> str | None:
    found = re.findall(r"^(?:[\w.]*\.)?(?:InputError|MissingExtra): (.+)$", message, re.MULTILINE)
    return found[-1] if found else None


def _original_line(error: BaseException) -> str:
    message = str(next(iter(error.args), ""))  # of a worker, the lines of its traceback too
    line = _worker_input_error(message) if "Traceback" in message else None
    return line or " ".join(part.strip() for part in str(error).splitlines() if part.strip())


def _line(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _close_stdout() -> None:
    """Keep the interpreter from complaining when it flushes a closed pipe at exit."""
    import os

    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
