"""When a Triton kernel of ours can run: plain facts of a call, in one place for all kernels.

On the CPU kernels run in Triton's interpreter, in a process that was started with
TRITON_INTERPRET=1: that is how tests check them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch

from heed_core.dispatch import UnsupportedBackend

KernelImpl = Literal["auto", "torch", "triton"]
"""Who runs an operation; auto is torch."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs kernels on the CPU; Triton settles it once per process."""


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """Why no kernel of ours can run on tensors like these; None if one can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return (
            f"Triton needs a CUDA device, the tensors are on {device!r} "
            "(TRITON_INTERPRET=1 lets tests run it on the CPU)"
        )
    if dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    return None


def takes_triton(impl: KernelImpl, why_not: Callable[[], str | None]) -> bool:
    """Whether a call runs on the kernel.

    Args:
        impl: What the caller asks for.
        why_not: Why the kernel cannot run the call; None if it can. Asked only if it is wanted.

    Raises:
        ValueError: `impl` is no name.
        UnsupportedBackend: The kernel was asked for and cannot run the call.
    """
    if impl not in get_args(KernelImpl):
        raise ValueError(f"impl must be one of {get_args(KernelImpl)}, got {impl!r}")
    if impl != "triton":
        return False
    if (reason := why_not()) is not None:
        raise UnsupportedBackend(f"impl='triton' cannot run this call: {reason}")
    return True
