"""Pure edits of attention for `heed_core.sites.steer`, and two measures to choose where to edit.

Each maker returns a function (tensor, call) -> tensor; the place that it is made for is named:
scores, weights or output. Gates and factors may be tensors that require gradients: the edits are
differentiable in them.

    with steer(model, gate_heads(gates), at="output"):
        loss(model(x)).backward()                       # gates.grad: the importance of each head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.attachments import AttendCall, Edit

Rows = slice | Sequence[int]
"""Query rows: a slice, or their numbers."""


def gate_heads(gates: Float[Tensor, "*gates"]) -> Edit:
    """Multiply what each head gives by its gate; for "weights" or "output".

    Gate 1 changes no bit, gate 0 removes the head, above 1 it is reinforced.

    Args:
        gates: (h,), or (b, h) for each sample its own, or (b, h, n) for each query.
    """
    return _per_head("gates", gates)


def scale_heads(factors: Float[Tensor, "*factors"]) -> Edit:
    """Multiply the scores of each head by its factor, an inverse temperature; for "scores".

    Args:
        factors: (h,), or (b, h) for each sample its own, or (b, h, n) for each query.
    """
    return _per_head("factors", factors)


def prune_heads(heads: Sequence[int]) -> Edit:
    """Let these heads give nothing; for "weights" or "output"."""

    def edit(x: Tensor, call: AttendCall) -> Tensor:
        gates = _factors(x, heads, 0.0, "heads")
        return x * gates

    return edit


def reinforce_heads(heads: Sequence[int], factor: float) -> Edit:
    """Multiply what these heads give by `factor`; for "weights" or "output"."""

    def edit(x: Tensor, call: AttendCall) -> Tensor:
        return x * _factors(x, heads, factor, "heads")

    return edit


def emphasise_tokens(
    key_mask: Bool[Tensor, "*b m"],
    factor: float | Float[Tensor, ""],
    *,
    renormalise: bool = True,
    rows: Rows | None = None,
) -> Edit:
    """Multiply the weights of some keys by `factor`; for "weights".

    Args:
        key_mask: The keys, (m,) or (b, m).
        factor: Above 1 emphasises, below 1 suppresses, 0 removes.
        renormalise: Bring every edited row back to its sum; a row whose every weight was removed
            stays zero.
        rows: Only these query rows.
    """

    def edit(weights: Tensor, call: AttendCall) -> Tensor:
        chosen = _columns("key_mask", key_mask, weights)
        edited = torch.where(chosen, weights * factor, weights)
        if renormalise:
            edited = edited * _quotient(weights.sum(-1, True), edited.sum(-1, True))
        return _in_rows(edited, weights, rows)

    return edit


def redistribute(
    donors: Bool[Tensor, "*#b m"],
    receivers: Bool[Tensor, "*#b m"],
    fraction: float | Float[Tensor, ""],
    *,
    rows: Rows | None = None,
    where: Bool[Tensor, "*rows"] | None = None,
) -> Edit:
    """Move a part of the weight of some keys to others, as they share it already; for "weights".

        w'_j = (1 - fraction) w_j                                   j in donors
        w'_j = w_j + fraction * sum(donors) * w_j / sum(receivers)  j in receivers and not in donors

    Row sums are kept. A row whose receivers have no weight is left as it is.

    Args:
        donors: Keys that give, (m,) or (b, m).
        receivers: Keys that take, (m,) or (b, m); those that are also donors only give.
        fraction: What is moved, in [0, 1].
        rows: Only these query rows.
        where: Only these (b, h, n), or what broadcasts to it: heads and rows that qualify.
    """
    if not isinstance(fraction, Tensor) and not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")

    def edit(weights: Tensor, call: AttendCall) -> Tensor:
        giving = _columns("donors", donors, weights)
        taking = _columns("receivers", receivers, weights) & ~giving
        held = weights.masked_fill(~taking, 0.0).sum(-1, keepdim=True)
        moved = weights.masked_fill(~giving, 0.0).sum(-1, keepdim=True) * fraction
        gained = weights * (1.0 + _quotient(moved, held))
        edited = torch.where(giving, weights * (1.0 - fraction), weights)
        edited = torch.where(taking, gained, edited)
        edited = torch.where(held > 0.0, edited, weights)
        if where is not None:
            edited = torch.where(where.unsqueeze(-1), edited, weights)
        return _in_rows(edited, weights, rows)

    return edit


def attention_mass(
    weights: Float[Tensor, "b h n m"], key_mask: Bool[Tensor, "*b m"]
) -> Float[Tensor, "b h n"]:
    """The weight that each row gives to some keys together; `key_mask` is (m,) or (b, m)."""
    return weights.masked_fill(~_columns("key_mask", key_mask, weights), 0.0).sum(-1)


def sink_value(
    x: Float[Tensor, "*b d"], dims: Sequence[int], *, eps: float = 1e-6
) -> Float[Tensor, "*b"]:
    """How much a token is an attention sink: its largest sink channel over its root mean square.

        phi(x) = max over k in dims of |x_k| / sqrt(mean(x ** 2) + eps)  <=  sqrt(d)

    Computed in float32 (float64 stays), on hidden states before the layer's norm (Kang et al.,
    arXiv:2503.03321).

    Args:
        x: Hidden states.
        dims: The model's sink channels.
        eps: Under the root.

    Raises:
        ValueError: No channel, or one that `x` does not have.
    """
    if not dims or any(not 0 <= k < x.shape[-1] for k in dims):
        raise ValueError(f"dims must name channels below {x.shape[-1]}, got {list(dims)}")
    x = x if x.dtype == torch.float64 else x.float()
    rms = (x.square().mean(dim=-1) + eps).sqrt()
    return x[..., list(dims)].abs().amax(dim=-1) / rms


def _per_head(name: str, factors: Tensor) -> Edit:
    if factors.ndim not in (1, 2, 3):
        raise ValueError(
            f"{name} must be (h,), (b, h) or (b, h, n), got shape {tuple(factors.shape)}"
        )
    by_query = factors if factors.ndim == 3 else factors[..., None]

    def edit(x: Tensor, call: AttendCall) -> Tensor:
        batch, heads, queries, _ = x.shape
        sizes = zip(reversed((batch, heads, queries)), reversed(by_query.shape), strict=False)
        fits = factors.shape[-2 if factors.ndim == 3 else -1] == heads and all(
            size in (1, wanted) for wanted, size in sizes
        )
        if not fits:
            raise ValueError(
                f"{name} must be ({heads},), ({batch}, {heads}) or ({batch}, {heads}, {queries}) "
                f"at site {call.site!r}, got {tuple(factors.shape)}"
            )
        return x * by_query.to(x)[..., None]

    return edit


def _factors(x: Tensor, heads: Sequence[int], factor: float, name: str) -> Tensor:
    """(h, 1, 1), `factor` at the chosen heads and 1 elsewhere."""
    number = x.shape[1]
    if wrong := [head for head in heads if not -number <= head < number]:
        raise ValueError(f"{name}={wrong} are out of range: the site has {number} heads")
    factors = torch.ones(number, dtype=x.dtype, device=x.device)
    factors[list(heads)] = factor
    return factors[:, None, None]


def _columns(
    name: str, mask: Tensor, weights: Tensor
) -> Bool[Tensor, " m"] | Bool[Tensor, "b 1 1 m"]:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, got {mask.dtype}")
    batch, keys = weights.shape[0], weights.shape[-1]
    if mask.shape not in ((keys,), (1, keys), (batch, keys)):
        raise ValueError(
            f"{name} must be ({keys},) or ({batch}, {keys}) here, got {tuple(mask.shape)}"
        )
    mask = mask.to(weights.device)
    return mask if mask.ndim == 1 else mask[:, None, None, :]


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, and 0 with zero gradients where b is 0."""
    none = b == 0.0
    return (a / b.masked_fill(none, 1.0)).masked_fill(none, 0.0)


def _in_rows(edited: Tensor, original: Tensor, rows: Rows | None) -> Tensor:
    if rows is None:
        return edited
    chosen = torch.zeros(original.shape[-2], dtype=torch.bool, device=original.device)
    chosen[rows if isinstance(rows, slice) else list(rows)] = True
    return torch.where(chosen.unsqueeze(-1), edited, original)
