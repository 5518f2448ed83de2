"""Time and peak memory of contenders, measured side by side.

Rounds of all contenders are interleaved in one run, so that a machine that slows down slows all of
them; ratios are taken round by round.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one contender needs for one call."""

    name: str
    times_s: tuple[float, ...]
    """One per round, in order."""
    peak_mib: float
    """Most memory in use during one call above what was in use before it."""
    ratio: float
    """Median over the rounds of this time over the first contender's time in the same round."""

    @property
    def median_s(self) -> float:
        """Median time of a call."""
        return statistics.median(self.times_s)

    @property
    def iqr_s(self) -> float:
        """Interquartile range of the times."""
        if len(self.times_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times_s, n=4, method="inclusive")
        return high - low


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    memory: bool = True,
) -> list[Measurement]:
    """Measure functions without arguments against each other.

    Args:
        contenders: Name -> function; the first is what the others are compared with.
        rounds: Timed calls of each.
        warmup: Calls of each before, not timed.
        device: Where they run; CUDA work is waited for.
        memory: Also measure peak memory, in one further call of each.

    Raises:
        ValueError: No contender, or no round.
    """
    if not contenders:
        raise ValueError("contenders must name at least one function")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = torch.device(device)
    for run in contenders.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in _rotated(names, number):  # so that nobody always runs after the same other
            times[name].append(_timed(contenders[name], device))
    first = times[names[0]]
    return [
        Measurement(
            name=name,
            times_s=tuple(times[name]),
            peak_mib=peak_memory_mib(run, device=device) if memory else float("nan"),
            ratio=statistics.median(a / b for a, b in zip(times[name], first, strict=True)),
        )
        for name, run in contenders.items()
    ]


def peak_memory_mib(run: Callable[[], object], *, device: torch.device | str = "cpu") -> float:
    """The most memory that one call holds above what was held before it.

    On CUDA the allocator's own count. Elsewhere the resident memory of the process is watched by
    a thread, which sees what is held for longer than about a millisecond.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with _ResidentMemory() as watch:
        run()
    return watch.peak_mib


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _ResidentMemory:
    """Peak resident memory of this process inside a context, above that at its start."""

    def __enter__(self) -> _ResidentMemory:
        _give_freed_memory_back()
        self._stop = threading.Event()
        self._before = self._peak = _resident_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak_mib(self) -> float:
        return (self._peak - self._before) / 2**20

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, _resident_bytes())
            self._stop.wait(0.0005)
        self._peak = max(self._peak, _resident_bytes())


def _give_freed_memory_back() -> None:
    """Otherwise a call that reuses freed pages of the process would seem to need none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
