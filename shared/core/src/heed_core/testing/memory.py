"""What tensors hold while something runs, counted, not timed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered.

    Example:
        >>> import torch
        >>> with Memory() as memory:
        ...     y = torch.zeros(10) + 1
        >>> memory.peak, memory.largest
        (80, 40)
    """

    peak: int
    """The most bytes that all of them hold at a time."""
    largest: int
    """The most bytes that one of them holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.largest = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Count what an operation makes."""
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._living[storage.data_ptr()] = alive, storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self._living = {
            at: item
            for at, item in self._living.items()
            if not item[0].expired()  # type: ignore[no-untyped-call]
        }
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return made


_SAY_PEAK = """
from pathlib import Path
# Unlike ru_maxrss, this begins anew with the program.
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def peak_bytes(program: str) -> int:
    """The most memory that a Python program holds in a process of its own, torch included.

    Example:
        >>> peak_bytes("whole = bytes(3 * 10**8)") > 3 * 10**8
        True

    Args:
        program: Its lines; it must print nothing.
    """
    done = subprocess.run(
        [sys.executable, "-c", program + _SAY_PEAK], capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024
