"""Several processes on this machine that run one job together, over gloo, for tests."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

PATIENCE = timedelta(seconds=60)
"""How long a process waits for another before it raises."""


def run_together(world: int, job: Callable[[int], None]) -> None:
    """Run a job in so many processes and wait for all.

    They are forked from a fresh interpreter: one that has run a backward pass cannot be forked.

    Args:
        world: Of processes, each with one thread.
        job: A function of a file, or a `partial` of one with arguments that JSON holds; called
            with `world` once the processes know each other.

    Raises:
        AssertionError: One of them failed; with what it said.
    """
    whole = job if isinstance(job, partial) else partial(job)
    file = inspect.getsourcefile(whole.func)
    assert file is not None
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        words = [file, whole.func.__name__, json.dumps(whole.args), str(world), meeting]
        done = subprocess.run(
            [sys.executable, "-m", __name__, *words], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr


def _main(file: str, name: str, given: str, world: str, meeting: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    job = partial(getattr(module, name), *json.loads(given))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    count = int(world)
    start_processes(  # type: ignore[no-untyped-call]
        _worker, args=(count, meeting, job), nprocs=count, start_method="fork"
    )


def _worker(rank: int, world: int, meeting: str, job: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        job(world)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
