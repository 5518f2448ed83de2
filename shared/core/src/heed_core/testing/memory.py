"""What tensors hold while something runs, counted, not timed."""

from __future__ import annotations

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
