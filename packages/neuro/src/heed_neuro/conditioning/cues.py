"""Vectors of cues: the keys of attention."""

from __future__ import annotations

import math
import re

import torch
from jaxtyping import Float64
from torch import Tensor

from heed_core.errors import InputError

KINDS = "orthonormal, random, overlap:RHO"


def check_kind(kind: str) -> None:
    """Refuse what is no kind of cue vectors.

    Raises:
        ValueError: Says which kinds there are.
    """
    if kind not in ("orthonormal", "random") and overlap_of(kind) is None:
        raise ValueError(f"cues must be one of {KINDS} (such as overlap:0.5), got {kind!r}")


def overlap_of(kind: str) -> float | None:
    """The cosine in `overlap:RHO`; None for another kind."""
    found = re.fullmatch(r"overlap:(-?\d*\.?\d+)", kind)
    return float(found[1]) if found else None


def cue_vectors(
    kind: str, count: int, d_k: int, *, seed: int = 0
) -> Float64[Tensor, "{count} {d_k}"]:
    """One vector of length 1 per cue.

    Args:
        kind: "orthonormal": axes. "random": drawn from the sphere. "overlap:RHO": every two cues
            have the cosine RHO.
        count: How many.
        d_k: Their channels.
        seed: Of the random ones.

    Raises:
        InputError: So many do not fit.
    """
    check_kind(kind)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(count, d_k, generator=generator, dtype=torch.float64)
        drawn /= drawn.norm(dim=1, keepdim=True)
        return drawn
    if count > d_k:
        raise InputError(
            f"{count} cues of the kind {kind!r} do not fit in d_k = {d_k} channels",
            remedy=f"make d_k at least {count}, or the cues random",
        )
    axes = torch.eye(count, d_k, dtype=torch.float64)
    rho = overlap_of(kind)
    if rho is None or count < 2:
        return axes
    if not -1 / (count - 1) < rho < 1:
        raise InputError(
            f"{count} cues cannot all have the cosine {rho:g}",
            remedy=f"choose it above {-1 / (count - 1):.3g} and below 1",
        )
    gram = torch.full((count, count), rho, dtype=torch.float64)
    gram.fill_diagonal_(1.0)
    mixed: Tensor = torch.linalg.cholesky(gram) @ axes
    return mixed


def max_coherence(vectors: Float64[Tensor, "n d"]) -> float:
    """The largest |cosine| of two vectors of length 1; 0 for one vector."""
    products = (vectors @ vectors.mT).fill_diagonal_(0.0)
    return float(products.abs().max())


def coherence_of_random(count: int, d_k: int) -> float:
    """What the largest of count (count - 1) / 2 cosines is near to: sqrt(2 ln(count^2) / d_k)."""
    return math.sqrt(4 * math.log(count) / d_k) if count > 1 else 0.0
