"""Where an encoder's queries look, and how alike they are."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed_core import observe
from heed_neuro.brain_encoder.network import BrainEncoder


@torch.no_grad()
def attention_maps(
    model: BrainEncoder, features: Float[Tensor, "b h w c"]
) -> Float[Tensor, "b q h w"]:
    """Weights of the tokens for each query, averaged over heads; each map sums to 1.

    Of a factorised encoder: its maps, the same for every image.

    Raises:
        ValueError: The encoder has no queries.
    """
    site = {"transformer": "decoder.attention.attend", "factorised": "maps.probe"}
    kind = model.config.kind
    if kind not in site:
        raise ValueError(f"kind={kind!r} has no maps")
    with observe(model, sites=site[kind]) as record:
        model.region_tokens(features)
    weights = record[site[kind]].mean(dim=1)
    return weights.unflatten(-1, features.shape[1:3])  # type: ignore[no-any-return,no-untyped-call]


def upsample(
    maps: Float[Tensor, "b q h w"], size: tuple[int, int]
) -> Float[Tensor, "b q rows columns"]:
    """Maps at the size of the image, bilinear."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def query_similarity(model: BrainEncoder) -> Float[np.ndarray, "q q"]:
    """Cosine of each pair of queries: the learned codes, or the logits of fixed maps."""
    kind = model.config.kind
    if kind not in ("transformer", "factorised"):
        raise ValueError(f"kind={kind!r} has no queries")
    rows = model.decoder.codes if kind == "transformer" else model.maps.logits
    unit = F.normalize(rows.double(), dim=-1)
    return np.asarray((unit @ unit.T).cpu().numpy())


@torch.no_grad()
def routed_representation(
    model: BrainEncoder, features: Float[Tensor, "b h w c"]
) -> Float[Tensor, "b q d"]:
    """What each query found: the vectors that the linear read-out reads."""
    return model.region_tokens(features)
