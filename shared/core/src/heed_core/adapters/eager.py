"""The eager attention of Hugging Face transformers, once for all models, with places for edits.

    S = cap(scale * Q K^T) + bias,   A = softmax(S + mask),   O = A V

Q is (b, h, n, d), K is (b, g, m, d), V is (b, g, m, e); head i reads group i // (h / g). The order
of operations is that of the models' own code, so that float32 results are equal to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.attachments import Attachments, AttendCall
from heed_core.backends import reference


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a model of transformers hands to its attention function."""

    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b g m d"]
    value: Float[Tensor, "b g m e"]
    mask: Float[Tensor, "b _ n m"] | None
    """Added to the scores: 0, or the lowest number where attention is forbidden."""
    scale: float
    bias: Float[Tensor, "#b h n m"] | None
    softcap: float | None
    """Scores are bent to this magnitude: cap(s) = softcap * tanh(s / softcap)."""
    sinks: Float[Tensor, " h"] | None
    """A score per head that takes its share of every row and meets no value."""
    dropout: float

    @property
    def fusable(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.softcap is None and self.sinks is None

    @property
    def addend(self) -> Float[Tensor, "b h n m"] | None:
        """All that is added to the scores."""
        if self.mask is None or self.bias is None:
            return self.bias if self.mask is None else self.mask
        return self.bias + self.mask

    def scores(self) -> Float[Tensor, "b h n m"]:
        """The scores before the mask."""
        key = _for_heads(self.key, self.query.shape[1])
        scores = torch.matmul(self.query, key.transpose(2, 3)) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores if self.bias is None else scores + self.bias

    def weights(
        self, scores: Float[Tensor, "b h n m"], allowed: Bool[Tensor, "b _ n m"] | None = None
    ) -> Float[Tensor, "b h n m"]:
        """Softmax in float32 at least.

        Args:
            scores: Before the mask.
            allowed: Given where scores were edited: no edit reaches what this forbids, and a row
                whose permitted scores are all -inf attends to nothing.
        """
        if self.mask is not None:
            scores = scores + self.mask
        if self.sinks is not None:
            return self._weights_beside_sinks(scores, allowed)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        if allowed is None:
            return F.softmax(scores, dim=-1, dtype=wide).to(self.query.dtype)
        return reference.masked_softmax(scores.to(wide), allowed).to(self.query.dtype)

    def _weights_beside_sinks(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        assert self.sinks is not None
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        joint = torch.cat([scores, sinks], dim=-1)
        joint = joint - joint.max(dim=-1, keepdim=True).values
        return F.softmax(joint, dim=-1, dtype=joint.dtype)[..., :-1].to(self.value.dtype)


def attend_eager(
    inputs: Inputs, attached: Attachments | None = None, call: AttendCall | None = None
) -> tuple[Float[Tensor, "b n h e"], Float[Tensor, "b h n m"]]:
    """Head outputs and weights, edited and recorded by what is attached, if a call is given."""
    if attached is None or call is None:
        weights = inputs.weights(inputs.scores())
    else:
        weights = _edited_weights(inputs, attached, call)
    if inputs.dropout > 0.0:
        weights = F.dropout(weights, inputs.dropout)
    output = torch.matmul(weights, _for_heads(inputs.value, weights.shape[1]))
    if attached is not None and call is not None:
        output = attached.edit_output(output, call)
    return output.transpose(1, 2).contiguous(), weights


def _edited_weights(inputs: Inputs, attached: Attachments, call: AttendCall) -> Tensor:
    scores = inputs.scores()
    edited = attached.edit_scores(scores, call)
    changed = edited is not scores
    weights = inputs.weights(edited, call.mask if changed else None)
    if attached.wants("raw"):
        attached.record(inputs.weights(scores) if changed else weights, call, raw=True)
    weights = attached.edit_weights(weights, call)
    attached.record(weights, call)
    return weights


def additive(
    mask: Bool[Tensor, "b _ n m"] | Float[Tensor, "b _ n m"] | None, dtype: torch.dtype
) -> Float[Tensor, "b _ n m"] | None:
    """A mask as it is added to scores: boolean ones (True = may attend) are translated."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)


def allowed_keys(
    mask: Float[Tensor, "b _ n m"] | None,
) -> Bool[Tensor, "b _ n m"] | None:
    """Which pairs an additive mask permits."""
    if mask is None:
        return None
    allowed = mask > torch.finfo(mask.dtype).min / 2
    # A row of which everything is forbidden is padding; eager attention spreads it over all keys.
    return allowed | ~allowed.any(dim=-1, keepdim=True)


def _for_heads(groups: Tensor, heads: int) -> Tensor:
    repeats = heads // groups.shape[1]
    return groups if repeats == 1 else groups.repeat_interleave(repeats, dim=1)
