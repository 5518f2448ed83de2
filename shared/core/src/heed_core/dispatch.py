"""Which back-end runs a call: a pure function of plain facts about it.

No environment, no try/except, no tensor values: the choice compiles, and `explain_dispatch` can
tell it in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Facts(NamedTuple):
    """What a choice may depend on."""

    device: str
    """Device type: "cpu", "cuda"."""
    dtype: torch.dtype
    needs_grad: bool
    """Gradients are on and one of the tensors asks for them."""
    dropout: float
    queries: int
    keys: int
    key_dim: int
    value_dim: int


class UnsupportedBackend(ValueError):  # noqa: N818 (reads as what happened)
    """The back-end that was asked for by name cannot run this call."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation."""

    name: str
    why_not: Callable[[Facts], str | None]
    """None if it can run a call with these facts, else the sentence shown to the user."""
    run: Callable[..., Tensor]
    """Imports its kernel library on first use."""


@dataclass(frozen=True)
class BackendReport:
    """What `explain_dispatch` says of one back-end."""

    name: str
    usable: bool
    reason: str
    """Why it cannot run the call or was passed over; empty for the chosen one."""
    chosen: bool


def autocasting(device_type: str) -> bool:
    """Whether `torch.autocast` is on for a device type; the meta device has none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def select(
    facts: Facts, impl: str, *, backends: Mapping[str, Backend], order: Sequence[str]
) -> Backend:
    """Pick the back-end of a call.

    Args:
        facts: The call.
        impl: A name, which never falls back to another, or "auto": the first of `order` that can.
        backends: All back-ends by name.
        order: The names that "auto" considers; the last accepts everything.

    Raises:
        ValueError: `impl` is no name of a back-end.
        UnsupportedBackend: The named back-end cannot run the call.
    """
    if impl == "auto":
        for name in order:
            if backends[name].why_not(facts) is None:
                return backends[name]
        raise AssertionError(f"the last of {order} must accept every call")
    if impl not in backends:
        raise ValueError(f"impl must be 'auto' or one of {sorted(backends)}, got {impl!r}")
    backend = backends[impl]
    if (reason := backend.why_not(facts)) is not None:
        raise UnsupportedBackend(f"impl={impl!r} cannot run this call: {reason}")
    return backend


def explain(
    facts: Facts, impl: str, *, backends: Mapping[str, Backend], order: Sequence[str]
) -> list[BackendReport]:
    """Tell of every back-end whether it can run the call, and which one does."""
    reasons = {name: backend.why_not(facts) for name, backend in backends.items()}
    chosen = impl if impl != "auto" else next(name for name in order if reasons[name] is None)
    if chosen not in backends:
        raise ValueError(f"impl must be 'auto' or one of {sorted(backends)}, got {impl!r}")

    def note(name: str) -> str:
        if reasons[name] is not None or name == chosen:
            return reasons[name] or ""
        if name not in order:
            return f"only when asked for by impl={name!r}"
        return f"{chosen!r} is preferred" if impl == "auto" else f"impl={impl!r} was asked for"

    return [
        BackendReport(
            name=name,
            usable=reasons[name] is None,
            reason=note(name),
            chosen=name == chosen and reasons[name] is None,
        )
        for name in backends
    ]
