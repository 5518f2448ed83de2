"""What `bench conditioning` measures: the delta rule on 4096 trials of 64 channels, and on half.

The chunked rule's peak memory at both lengths stands beside each other: it is linear in trials.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.attention.delta_rule import delta_rule
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.recurrence import Form
from heed_runtime.recipe import Contender

TRIALS, CHANNELS = 4096, 64


class DeltaRule(nn.Module):
    """The delta rule with a learnt rate."""

    def __init__(self, form: Form, impl: KernelImpl = "torch") -> None:
        super().__init__()
        self.form = form
        self.impl: KernelImpl = impl
        self.rate = nn.Parameter(torch.zeros(()))

    def forward(
        self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        """Answers to the keys."""
        rates = self.rate.sigmoid().expand(values.shape[:3])
        read, _ = delta_rule(keys, keys, values, rates, scale=1.0, form=self.form, impl=self.impl)
        return read


class FlaDeltaRule(nn.Module):
    """The same by flash-linear-attention, whose layout is (b, n, h, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(()))

    def forward(
        self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        """Answers to the keys."""
        from fla.ops.delta_rule import chunk_delta_rule  # type: ignore[import-not-found]

        key, value = keys.transpose(1, 2), values.transpose(1, 2)
        rates = self.rate.sigmoid().expand(value.shape[:3])
        read, _ = chunk_delta_rule(key, key, value, rates, scale=1.0)
        found: Tensor = read.transpose(1, 2)
        return found


def delta_contenders() -> list[Contender]:
    """Chunked first, also on half the trials, then trial by trial, Triton, and other libraries."""
    cuda = None if torch.cuda.is_available() else "needs a CUDA device"
    fla = importlib.util.find_spec("fla")
    absent = None if fla else "flash-linear-attention is not installed"
    chunked = partial(DeltaRule, "chunked")
    builds: dict[str, tuple[Callable[[], nn.Module], int, str | None]] = {
        "heed, chunked": (chunked, TRIALS, None),
        f"heed, chunked, {TRIALS // 2} trials": (chunked, TRIALS // 2, None),
        "heed, recurrent": (partial(DeltaRule, "recurrent", "auto"), TRIALS, None),
        "heed, chunked, Triton": (partial(DeltaRule, "chunked", "triton"), TRIALS, cuda),
        "flash-linear-attention": (FlaDeltaRule, TRIALS, absent or cuda),
    }
    return [
        Contender(
            name=name,
            build=build,
            inputs=partial(inputs, trials),
            loss=Tensor.mean,
            missing=missing,
            items=trials,
        )
        for name, (build, trials, missing) in builds.items()
    ]


def inputs(trials: int = TRIALS) -> tuple[Tensor, Tensor]:
    """Keys of length 1, and values."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 1, trials, CHANNELS, generator=generator) for _ in range(2))
    return F.normalize(keys, dim=-1), values
