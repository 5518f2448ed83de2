"""Several processes on this machine that run one job together, over gloo, for tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

PATIENCE = timedelta(seconds=60)
"""How long a process waits for another before it raises."""


def run_together(world: int, job: Callable[[int], None]) -> None:
    """Run a job in so many processes and wait for all; what one raises is raised here.

    Args:
        world: Of processes, forked, each with one thread.
        job: Called with `world` once the processes know each other.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "meeting")
        start_processes(  # type: ignore[no-untyped-call]
            _worker, args=(world, file, job), nprocs=world, start_method="fork"
        )


def _worker(rank: int, world: int, file: str, job: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        job(world)
    finally:
        dist.destroy_process_group()
