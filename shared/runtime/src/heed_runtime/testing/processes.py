"""Running an app in other processes, as tests need it: several ranks, sudden death."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from heed_runtime.app import App

KILLED = -signal.SIGKILL


def start(
    app: App, argv: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
) -> int:
    """Run a command line in a copy of this process; its number comes back at once.

    The copy has everything imported already, so that it starts in no time.

    Args:
        app: The program.
        argv: The command line after the program.
        log: Takes standard output and standard error of the copy.
        environment: Variables to set there.

    Raises:
        RuntimeError: This process computes with several threads, for which a copy waits for ever.
    """
    if torch.get_num_threads() > 1:
        raise RuntimeError("set OMP_NUM_THREADS=1 before the tests, as tools/test does")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout = os.fdopen(os.dup(handle), "w", buffering=1)
        sys.stderr = os.fdopen(os.dup(handle), "w", buffering=1)
        os.environ.update(environment or {})
        code = app.call(list(argv))
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a process that `start` made; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_when(child: int, ready: Callable[[], bool], *, limit_s: float = 120.0) -> int:
    """Send SIGKILL as soon as `ready`, unless the process ends before; its exit code."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if ready():
            break
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def start_ranks(app: App, argv: Sequence[str], *, ranks: int, log: Path) -> list[int]:
    """Run a command line in several connected processes, as torchrun starts them."""
    common = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    return [
        start(
            app,
            argv,
            log=log.with_suffix(f".{rank}{log.suffix}"),
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
