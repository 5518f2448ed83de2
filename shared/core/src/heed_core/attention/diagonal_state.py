"""S4D: a convolution of every channel with the response of a diagonal state space.

    s_(t+1) = exp(dt a) s_t + u_t,   K_l = 2 Re sum_m C_m (exp(dt a_m) - 1) / a_m exp(l dt a_m)
    y_t = sum_(l <= t) K_l u_(t-l) + D u_t,   output = W gelu(y)

with a = -exp(r) + i w, one step dt for each channel and as many responses K for each channel as
there are `channels`. Gu, Gupta, Goel, Re, "On the parameterization and initialization of diagonal
state space models" (arXiv 2206.11893), S4D-Inv: r = log 1/2, w = (n (n / (1 + 2 m) - 1)) / pi. Not
causal, a second set of responses runs backwards over the tokens after the own one. Padding enters
as zeros.

Cost for n tokens, c channels, r responses and a state of k numbers: time n log n c r + n c r k,
memory n c r (the transforms); decoding c r k a token. The responses are products of exp(dt a l) at
a few l, so that n k exponentials become about 2 sqrt(n) k.

There is no softmax and no map that heads share: nothing is observed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.projected import check_positive
from heed_core.cache import StateCache, check_sequences, restores_cache
from heed_core.precision import at_least_float32, without_autocast
from heed_core.tokens import (
    Pattern,
    check_padding,
    check_real,
    check_shape,
    check_some,
    check_tokens,
)

STRIDE = 32
"""Lags whose powers are computed one by one; the others are products with those."""


def state_response(
    coefficients: Float[Tensor, "r c m 2"],
    log_step: Float[Tensor, " c"],
    log_decay: Float[Tensor, " m"],
    frequency: Float[Tensor, " m"],
    length: int,
) -> Float[Tensor, "r c n"]:
    """The responses K for lags 0 to n - 1.

    Args:
        coefficients: C, real and imaginary part.
        log_step: log dt.
        log_decay: r, the logarithm of -Re a.
        frequency: w = Im a.
        length: n.
    """
    rate = torch.complex(-log_decay.exp(), frequency) * log_step.exp()[:, None]  # dt a, (c, m)
    own = torch.view_as_complex(coefficients.contiguous())
    first = own * torch.expm1(rate) / rate * log_step.exp()[:, None]
    strides = (length + STRIDE - 1) // STRIDE
    if torch.compiler.is_compiling():
        strides = strides + 1  # a spare one needs no guard on their number
    lag = torch.arange(STRIDE, device=rate.device)
    far = torch.arange(strides, device=rate.device) * STRIDE
    near_power = (rate[..., None] * lag).exp()  # (c, m, stride)
    far_power = (rate[:, None] * far[:, None]).exp()  # (c, strides, m)
    left = first[:, :, None] * far_power  # (r, c, strides, m)
    # Re (x y) = Re x Re y - Im x Im y, as one product of real matrices.
    both = torch.cat([left.real, -left.imag], dim=-1)
    total = both @ torch.cat([near_power.real, near_power.imag], dim=-2)
    if torch.compiler.is_compiling():  # picked lags need no guard on the length
        lag = torch.arange(length, device=rate.device)
        return 2 * total[..., lag // STRIDE, lag % STRIDE]
    return 2 * total.flatten(2)[..., :length]


def causal_convolution(
    tokens: Float[Tensor, "b c n"], response: Float[Tensor, "r c n"]
) -> Float[Tensor, "b r c n"]:
    """y_t = sum over l <= t of K_l u_(t-l), by transforms of length 2 n."""
    n = tokens.shape[-1]
    if tokens.shape[0] == 0:  # torch's transforms refuse it on the CPU
        return tokens[:, None] * response
    product = torch.fft.rfft(tokens, n=2 * n)[:, None] * torch.fft.rfft(response, n=2 * n)
    found: Tensor = torch.fft.irfft(product, n=2 * n)
    return found[..., :n]


@restores_cache
def diagonal_state_mixing(
    tokens: Float[Tensor, "b c n"],
    coefficients: Float[Tensor, "sets c m 2"],
    log_step: Float[Tensor, " c"],
    log_decay: Float[Tensor, " m"],
    frequency: Float[Tensor, " m"],
    skip: Float[Tensor, "r c"],
    *,
    causal: bool = True,
    padding_mask: Bool[Tensor, "b far"] | None = None,
    cache: StateCache | None = None,
) -> Float[Tensor, "b r c n"]:
    """S4D before its activation: y of every response, in float32 inside.

    Args:
        tokens: u.
        coefficients: C, as in `state_response`, of the r responses; not causal, then of r more,
            which run backwards.
        log_step: log dt.
        log_decay: r, the logarithm of -Re a.
        frequency: w = Im a.
        skip: D.
        causal: Without what comes later.
        padding_mask: True = real token, for all tokens so far: with a cache also those before.
            Others enter as zeros.
        cache: For decoding: the "state" (b, c, m, 2) after earlier tokens, which these renew.

    Returns:
        In the type of `tokens`.

    Raises:
        ValueError: Shapes that do not fit, a cache that is not causal.
        TypeError: Tokens that are no real numbers, a padding mask that is not boolean.
    """
    _check_mixing(tokens, coefficients, log_step, log_decay, frequency, skip, causal)
    if cache is not None and not causal:
        raise ValueError("cache serves causal=True only")
    past = 0 if cache is None else cache.length
    if padding_mask is not None:
        check_padding(padding_mask, tokens.shape[0], past + tokens.shape[2], of="tokens so far")
    with without_autocast(tokens):
        rows = at_least_float32(tokens)
        if padding_mask is not None:
            rows = rows.masked_fill(~padding_mask[:, None, past:], 0.0)
        space = (
            at_least_float32(coefficients),
            at_least_float32(log_step),
            at_least_float32(log_decay),
            at_least_float32(frequency),
        )
        if cache is None:
            found = _convolved(rows, state_response(*space, rows.shape[-1]), skip.shape[0], causal)
        else:
            check_sequences(cache, rows.shape[0])
            found = _stepped(rows, cache, *space)
        found = found + at_least_float32(skip)[:, :, None] * rows[:, None]
    return found.to(tokens.dtype)


def _convolved(tokens: Tensor, response: Tensor, channels: int, causal: bool) -> Tensor:
    found = causal_convolution(tokens, response[:channels])
    if causal:
        return found
    # Backwards over the tokens after the own one: its own lag 0 belongs to the forward set.
    later = causal_convolution(tokens.flip(-1), response[channels:]).flip(-1)
    return found + F.pad(later, (0, 1))[..., 1:]


def _stepped(
    tokens: Tensor,
    cache: StateCache,
    coefficients: Tensor,
    log_step: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Token by token, with the state of all that came before."""
    step = log_step.exp()[:, None]
    rate = torch.complex(-log_decay.exp(), frequency) * step
    keep = rate.exp()
    read = torch.view_as_complex(coefficients.contiguous()) * torch.expm1(rate) / rate * step
    state = torch.view_as_complex(cache["state"].contiguous())
    rows = [tokens.new_zeros(tokens.shape[0], *coefficients.shape[:2], 0)]
    for token in tokens.unbind(-1):
        state = keep * state + token[..., None]
        rows.append(2 * (read * state[:, None]).sum(-1).real[..., None])
    cache.update({"state": torch.view_as_real(state)}, tokens=tokens.shape[-1])
    return torch.cat(rows, dim=-1)


def _check_mixing(
    tokens: Tensor,
    coefficients: Tensor,
    log_step: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    skip: Tensor,
    causal: bool,
) -> None:
    check_shape("tokens", tokens, (None, None, None), "batch, channels, tokens")
    check_real(tokens=tokens)
    if tokens.shape[2] == 0:
        raise ValueError(f"tokens must have at least one token, got {tuple(tokens.shape)}")
    dim = tokens.shape[1]
    check_shape("skip", skip, (None, dim), "responses, channels")
    sets = skip.shape[0] * (1 if causal else 2)
    check_shape("coefficients", coefficients, (sets, dim, None, 2), "responses, channels, m, 2")
    check_shape("log_step", log_step, (dim,), "channels")
    for name, x in (("log_decay", log_decay), ("frequency", frequency)):
        check_shape(name, x, (coefficients.shape[2],), "m")


class DiagonalStateMixer(nn.Module):
    """S4D with its output layer.

    Args:
        dim: Channels of a token, in and out.
        channels: Responses of each channel.
        state: Real numbers of the state, half as many complex ones; even.
        causal: Without what comes later.
        dropout: Of y after the activation, in training.
        least_step: Of dt, drawn log-uniform.
        most_step: Of dt.

    Example:
        >>> mixer = DiagonalStateMixer(32, channels=2)
        >>> mixer(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal self"})

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 1,
        state: int = 16,
        causal: bool = True,
        dropout: float = 0.0,
        least_step: float = 1e-3,
        most_step: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, channels=channels, state=state)
        if state % 2:
            raise ValueError(f"state must be even, got {state}")
        if not 0 < least_step <= most_step:
            raise ValueError(f"0 < least_step <= most_step must hold, got {least_step, most_step}")
        self.dim, self.channels, self.state, self.causal = dim, channels, state, causal
        half, sets = state // 2, channels * (1 if causal else 2)
        self.coefficients = nn.Parameter(torch.randn(sets, dim, half, 2) * 0.5**0.5)
        span = math.log(most_step) - math.log(least_step)
        self.log_step = nn.Parameter(torch.rand(dim) * span + math.log(least_step))
        self.log_decay = nn.Parameter(torch.full((half,), math.log(0.5)))
        inverse = state * (state / (1 + 2 * torch.arange(half)) - 1)
        self.frequency = nn.Parameter(inverse / math.pi)
        self.skip = nn.Parameter(torch.randn(channels, dim))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(channels * dim, dim)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b far"] | None = None,
        cache: StateCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix.

        Args:
            x: Tokens.
            padding_mask: True = real token, for all tokens so far: with a cache also those before.
                Others enter as zeros.
            cache: From `new_cache`, for decoding; `causal` only.
        """
        check_tokens("x", x, self.dim, layer=self.out)
        check_some(x=x)
        found = diagonal_state_mixing(
            x.mT,
            self.coefficients,
            self.log_step,
            self.log_decay,
            self.frequency,
            self.skip,
            causal=self.causal,
            padding_mask=padding_mask,
            cache=cache,
        )
        hidden = self.dropout(F.gelu(found))
        return cast(Tensor, self.out(hidden.flatten(1, 2).mT))

    def new_cache(self, batch: int) -> StateCache:
        """An empty cache for decoding: one state, however many tokens come."""
        weight = self.coefficients
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (batch, self.dim, self.state // 2, 2)
        return StateCache({"state": torch.zeros(shape, dtype=dtype, device=weight.device)})

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"channels={self.channels}, state={self.state}, causal={self.causal}"


def diagonal_state_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's S4D.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {
        "D": "skip",
        "kernel.kernel.C": "coefficients",
        "kernel.kernel.log_dt": "log_step",
        "kernel.kernel.log_w_real": "log_decay",
        "kernel.kernel.w_imag": "frequency",
        "output_linear.weight": "out.weight",
        "output_linear.bias": "out.bias",
    }
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in names:
            raise ValueError(f"{name!r} is no weight of CAB's S4D")
        shared = names[name] in ("log_decay", "frequency")  # stored with an axis of copies
        result[names[name]] = tensor.reshape(-1) if shared else tensor
    return result
