"""Pointer head: the logits of a choice among memory tokens, for every query.

    a_h[t, j] = <W_k,h m_j + b_k,h, W_q,h x_t + b_q,h> * scale        (h = 1 ... heads)
    logits[t, j] = sum_h w_h a_h[t, j] + b                            (mix = "linear")

Extra slots at the end have a_h = 0: choices that no token stands for, such as padding; their logit
is b. A token that is not there has the logit -inf. The number of tokens is free: the same weights
choose among 22 or 84.

Vinyals et al., "Pointer networks" (arXiv 1506.03134), with products instead of a perceptron; Fang
et al., "OAT" (arXiv 2407.13335), object attention. With one head there is nothing to mix.

Cost per head for n queries and m tokens of width d: time (n + m) d^2 + n m d, memory n m.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.sites import Probe
from heed_core.tokens import check_tokens

Mix = Literal["linear", "mean"]
"""How heads become one logit: by learned weights and a shift, or their mean."""


def pointer_scores(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    *,
    scale: float | None = None,
    extra_slots: int = 0,
) -> Float[Tensor, "b h n m+{extra_slots}"]:
    """The scaled products of queries and keys, and zeros for the extra slots.

    Args:
        query: One row per choice to be made.
        key: One row per token that can be chosen.
        scale: Factor of the products; default d ** -0.5.
        extra_slots: How many.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return F.pad((query * scale) @ key.transpose(-2, -1), (0, extra_slots))


class PointerHead(nn.Module):
    """The logits of a choice among memory tokens, by products in several heads.

    It has no softmax of its own; its site `probe` states softmax(logits), (b, 1, n, m +
    extra_slots).

    Args:
        dim: Channels of queries and of memory tokens.
        heads: Products that are mixed.
        extra_slots: Choices at the end whose products are 0.
        mix: How heads become one logit.
        head_dim: Channels of a head; `dim` if not given.
        scale: Factor of the products; head_dim ** -0.5 if not given.
        memory_dim: Channels of memory tokens; `dim` if not given.

    Example:
        >>> head = PointerHead(32, heads=2, extra_slots=1)
        >>> head(torch.randn(1, 5, 32), torch.randn(1, 9, 32)).shape
        torch.Size([1, 5, 10])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        extra_slots: int = 0,
        mix: Mix = "linear",
        head_dim: int | None = None,
        scale: float | None = None,
        memory_dim: int | None = None,
    ) -> None:
        super().__init__()
        head_dim = dim if head_dim is None else head_dim
        memory_dim = dim if memory_dim is None else memory_dim
        if min(dim, heads, head_dim, memory_dim) < 1 or extra_slots < 0:
            raise ValueError(
                "dim, heads, head_dim and memory_dim must be at least 1 and extra_slots not "
                f"negative, got {dim, heads, head_dim, memory_dim, extra_slots}"
            )
        if mix not in ("linear", "mean"):
            raise ValueError(f"mix must be 'linear' or 'mean', got {mix!r}")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        self.dim, self.memory_dim, self.heads, self.head_dim = dim, memory_dim, heads, head_dim
        self.extra_slots, self.scale = extra_slots, scale
        self.query = nn.Linear(dim, heads * head_dim)
        self.key = nn.Linear(memory_dim, heads * head_dim)
        self.mix = nn.Linear(heads, 1) if heads > 1 and mix == "linear" else None
        self.probe = Probe()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m k"] | None = None,
        *,
        memory_mask: Bool[Tensor, "b m"] | None = None,
        keys: Float[Tensor, "b h m d"] | None = None,
    ) -> Float[Tensor, "b n slots"]:
        """Logits of every choice.

        Args:
            x: Tokens that choose.
            memory: Tokens that can be chosen.
            memory_mask: True = the token is there; others get -inf.
            keys: What `project` made of the memory, instead of it: many steps share it.
        """
        check_tokens("x", x, self.dim, layer=self.query)
        if (memory is None) == (keys is None):
            raise ValueError("give either memory or keys")
        keys = self.project(cast(Tensor, memory)) if keys is None else keys
        if keys.shape[0] != x.shape[0]:
            raise ValueError(f"memory must have the batch of x, {x.shape[0]}, got {keys.shape[0]}")
        query = self._heads(self.query(x))
        scores = pointer_scores(query, keys, scale=self.scale, extra_slots=self.extra_slots)
        if self.mix is None:
            logits = scores.mean(dim=1)
        else:
            logits = cast(Tensor, self.mix(scores.movedim(1, -1)))[..., 0]
        if memory_mask is not None:
            logits = logits.masked_fill(~self._slots(memory_mask, keys)[:, None], -torch.inf)
        self.probe(lambda: logits.softmax(dim=-1)[:, None])
        return logits

    def project(self, memory: Float[Tensor, "b m k"]) -> Float[Tensor, "b h m d"]:
        """The keys of memory tokens."""
        check_tokens("memory", memory, self.memory_dim, layer=self.key)
        return self._heads(self.key(memory))

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self.heads, self.head_dim).transpose(1, 2)

    def _slots(self, memory_mask: Tensor, keys: Tensor) -> Tensor:
        if memory_mask.dtype != torch.bool:
            raise TypeError(
                f"memory_mask must be boolean, True = is there, got {memory_mask.dtype}"
            )
        if tuple(memory_mask.shape) != (keys.shape[0], keys.shape[2]):
            raise ValueError(
                f"memory_mask must be {(keys.shape[0], keys.shape[2])} (batch, tokens), got "
                f"{tuple(memory_mask.shape)}"
            )
        return F.pad(memory_mask, (0, self.extra_slots), value=True)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, head_dim={self.head_dim}, extra_slots={self.extra_slots}"
