"""The back-ends of sparse convolution: `reference` is the specification, the others are fast.

| name | what it does | where |
| --- | --- | --- |
| `torch` | gathers rows, multiplies, adds up; recomputes the gathers in backward | everywhere |
| `spconv` | spconv's `ConvAlgo.Native` on our rulebooks | float16, float32, float64 |
| `reference` | one product per kernel cell, gradients by autograd | everywhere; the oracle |

All run on the same rulebook, so rows have one order and a rulebook is built once. "auto" takes
`torch`, or what the environment's HEED_SPARSE_BACKEND names. While a program is traced
(`torch.compile`, `torch.export`) the table form runs, whose sizes depend on the numbers of rows
only; "auto" is `torch` there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from heed_core.dispatch import BackendReport, UnsupportedBackend
from heed_core.sparse.backends import gather, reference, spconv

BackendName = Literal["auto", "torch", "spconv", "reference"]
"""The name of a back-end, or "auto"."""


class ConvolutionFacts(NamedTuple):
    """What a choice may depend on."""

    device: str
    """Device type: "cpu", "cuda"."""
    dtype: torch.dtype
    tracing: bool
    """Inside torch.compile or torch.export."""


@dataclass(frozen=True)
class ConvolutionBackend:
    """One way to compute a sparse convolution."""

    name: str
    why_not: Callable[[ConvolutionFacts], str | None]
    """None if it can run a call with these facts, else the sentence shown to the user."""
    run: Callable[..., Tensor]
    """Features (n, i), weight (o, volume, i), rulebook -> (m, o)."""


def _anything(facts: ConvolutionFacts) -> str | None:
    return None


def _not_traced(facts: ConvolutionFacts) -> str | None:
    return "only the torch back-end can be traced" if facts.tracing else None


def _spconv_cannot(facts: ConvolutionFacts) -> str | None:
    if not spconv.installed():
        return "spconv is not installed; install it with: pip install 'heed-core[sparse]'"
    if facts.tracing:
        return _not_traced(facts)
    if facts.device not in ("cpu", "cuda"):
        return f"spconv runs on cpu and cuda, not on {facts.device}"
    if facts.dtype not in (torch.float16, torch.float32, torch.float64):
        return f"spconv has no kernels for {facts.dtype}"
    if facts.device == "cuda" and facts.dtype == torch.float64:
        return "spconv has no float64 kernels on cuda"
    return None


BACKENDS = {
    "torch": ConvolutionBackend("torch", _anything, gather.run),
    "spconv": ConvolutionBackend("spconv", _spconv_cannot, spconv.run),
    "reference": ConvolutionBackend("reference", _not_traced, reference.run),
}
"""All back-ends by name."""

VARIABLE = "HEED_SPARSE_BACKEND"
"""The environment's name for the back-end that "auto" takes."""


def select(facts: ConvolutionFacts, backend: str) -> ConvolutionBackend:
    """Pick the back-end of a call; a name, the environment's too, never falls back to another.

    Raises:
        ValueError: `backend` is no name of a back-end.
        UnsupportedBackend: The named back-end cannot run the call; the environment names none.
    """
    if backend == "auto":
        name = "torch" if facts.tracing else automatic()
        if (reason := BACKENDS[name].why_not(facts)) is not None:
            raise UnsupportedBackend(f"{VARIABLE}={name} cannot run this call: {reason}")
        return BACKENDS[name]
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    if (reason := BACKENDS[backend].why_not(facts)) is not None:
        raise UnsupportedBackend(f"backend={backend!r} cannot run this call: {reason}")
    return BACKENDS[backend]


def automatic() -> str:
    """The name of the back-end that "auto" takes.

    Raises:
        UnsupportedBackend: The environment names none.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name == "auto":
        return "torch"
    if name not in BACKENDS:
        raise UnsupportedBackend(
            f"{VARIABLE} must be auto or one of {', '.join(sorted(BACKENDS))}, got {name!r}"
        )
    return name


def explain_backends(
    device: str, dtype: torch.dtype, backend: BackendName = "auto"
) -> list[BackendReport]:
    """Tell of every back-end whether it can run a convolution, and which one does."""
    facts = ConvolutionFacts(device, dtype, tracing=False)
    chosen = automatic() if backend == "auto" else backend
    reports = []
    for name, candidate in BACKENDS.items():
        reason = candidate.why_not(facts)
        is_chosen = name == chosen and reason is None
        passed_over = "" if is_chosen else f"only when asked for by backend={name!r} or {VARIABLE}"
        reports.append(
            BackendReport(
                name=name,
                usable=reason is None,
                reason=passed_over if reason is None else reason,
                chosen=is_chosen,
            )
        )
    return reports
