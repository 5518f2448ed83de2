"""Where the towers looked: gradient-weighted attention rollout.

Chefer et al., "Transformer interpretability beyond attention visualization" (CVPR 2021), with the
attention itself in the place of its layer-wise relevance, and the gradient without what all keys of
a query share:

    A_l = I + mean over heads of ((dS / dA_l - sum over keys of A_l dS / dA_l) * A_l)^+,
    rows divided by their sum,   C = A_L ... A_1,

of a scalar S, the cosine of two embeddings. A query's weights sum to one, so that what its keys
share moves nothing; as published it stays in, and a map is nearly even where attention is. The
product is the gradient of the scores before the softmax. With `relevance="published"` it stays.
The row of C that S is read from, without the class token, is the map; a mean over tokens has no
such row, see `row_of_mean`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from heed_core import observe
from heed_core.sites import attach_points
from heed_medical.more.network import More, MoreClassifier
from heed_medical.more.text import Text
from heed_medical.more.towers import ECG_PATCH

Relevance = Literal["centred", "published"]
WINDOW = 5 * ECG_PATCH
"""Samples that a token of an ECG comes of."""


def rollout(
    attention: Sequence[Float[Tensor, "h n n"]],
    gradients: Sequence[Float[Tensor, "h n n"]],
    *,
    relevance: Relevance = "centred",
) -> Float[Tensor, "n n"]:
    """C of the module's formula; first block first. Rows sum to one."""
    if len(attention) != len(gradients) or not attention:
        raise ValueError(f"as many gradients as maps, got {len(gradients)}, {len(attention)}")
    count = attention[0].shape[-1]
    identity = torch.eye(count, dtype=attention[0].dtype, device=attention[0].device)
    total = identity
    for weights, gradient in zip(attention, gradients, strict=True):
        if relevance == "centred":
            gradient = gradient - (gradient * weights).sum(dim=-1, keepdim=True)
        passed = identity + (gradient * weights).clamp(min=0).mean(dim=0)
        total = passed / passed.sum(dim=1, keepdim=True) @ total
    return total


def xray_map(
    model: More,
    xray: Float[Tensor, "1 3 h w"],
    target: Float[Tensor, " p"],
    *,
    relevance: Relevance = "centred",
) -> Float32[np.ndarray, "h w"]:
    """Relevance of the patches for the cosine with `target`, at the size of the image."""
    with torch.enable_grad(), observe(model, "xray.*", keep="all", grad=True) as record:
        score = (model.embed_xray(xray)[0] * target).sum()
        found = _rolled(record, score, relevance)[0, 1:]
    height, width = model.config.image_size
    patch = model.config.patch
    grid = found.view(1, 1, height // patch, width // patch)
    return _array(F.interpolate(grid, (height, width), mode="bilinear")[0, 0])


def ecg_map(
    model: More,
    ecg: Float[Tensor, "1 12 n"],
    target: Float[Tensor, " p"],
    *,
    relevance: Relevance = "centred",
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, "12 n"]]:
    """Relevance of each sample for the cosine with `target`, and of each lead.

    The stem mixes leads, so that the attention knows only time: the relevance of leads is
    |input gradient x input|, smoothed over 25 samples.
    """
    with torch.enable_grad(), observe(model, "ecg.*", keep="all", grad=True) as record:
        given = ecg.detach().clone().requires_grad_()
        score = (model.embed_ecg(given)[0] * target).sum()
        tokens = _rolled(record, score, relevance)[0, 1:]
        (gradient,) = torch.autograd.grad(score, given)
    product = (gradient * given).detach().abs()
    smooth = F.avg_pool1d(product, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    return _array(tokens_to_samples(tokens, ecg.shape[2])), _array(smooth[0])


def finding_maps(
    model: MoreClassifier,
    inputs: Mapping[str, Float[Tensor, "1 ..."]],
    finding: int,
    *,
    relevance: Relevance = "centred",
) -> dict[str, np.ndarray]:
    """Relevance of what a classifier sees for one finding's score: as `xray_map` and `ecg_map`.

    Returns:
        `xray` (h, w), `ecg` (n) and `ecg_leads` (12, n), as far as the classifier sees them.
    """
    given = {name: inputs[name].detach().clone().requires_grad_() for name in model.inputs}
    found: dict[str, np.ndarray] = {}
    sites = [f"{name}.*" for name in model.inputs]
    with torch.enable_grad(), observe(model, sites, keep="all", grad=True) as record:
        score = model(**given)[0, finding]
        if "xray" in given:
            tokens = _rolled(record, score, relevance, of="xray.")[0, 1:]
            height, width = model.config.image_size
            patch = model.config.patch
            grid = tokens.view(1, 1, height // patch, width // patch)
            found["xray"] = _array(F.interpolate(grid, (height, width), mode="bilinear")[0, 0])
        if "ecg" in given:
            ecg = given["ecg"]
            tokens = _rolled(record, score, relevance, of="ecg.")[0, 1:]
            (gradient,) = torch.autograd.grad(score, ecg)
            product = (gradient * ecg).detach().abs()
            smooth = F.avg_pool1d(product, WINDOW, 1, WINDOW // 2, count_include_pad=False)
            found["ecg"] = _array(tokens_to_samples(tokens, ecg.shape[2]))
            found["ecg_leads"] = _array(smooth[0])
    return found


def tokens_to_samples(tokens: Float[Tensor, " t"], samples: int) -> Float[Tensor, " n"]:
    """Spread each token evenly over the 25 samples that it comes of; the sum stays."""
    spread = torch.zeros(samples, dtype=tokens.dtype, device=tokens.device)
    places = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * ECG_PATCH
    places = places + torch.arange(WINDOW, device=tokens.device)
    share = (tokens / WINDOW).unsqueeze(1).expand(-1, WINDOW)
    return spread.index_add(0, places.flatten(), share.flatten())


def maps_text(model: More) -> bool:
    """Whether the text tower shows its attention: not those of MPNet, DeBERTa and few others."""
    return any(name.startswith("text.") for name in attach_points(model))


def text_map(
    model: More, text: Text, target: Float[Tensor, " p"], *, relevance: Relevance = "centred"
) -> tuple[list[str], Float32[np.ndarray, " n"]]:
    """Words and their relevance for the cosine with `target`; pieces of a word are summed.

    The sentence vector is a mean over tokens, so the map is that of `row_of_mean`.
    """
    tokens = model.text.tokens([text])
    mask = tokens.mask[0]
    with torch.enable_grad(), observe(model, "text.*", keep="all", grad=True) as record:
        vector = F.normalize(model.projectors["text"](model.text(*tokens)), dim=1)
        total = _rolled(record, (vector[0] * target).sum(), relevance)
    found = _array(row_of_mean(total[mask][:, mask]))
    return join_words(model.text.words(text), found)


def row_of_mean(total: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """The map of a mean over tokens, of C: what tokens took from each of the others, summing to 1.

    What a token keeps of itself is left out, as that of the class token is in other maps: it is
    nearly the same for all and hides the rest. 0 where nothing was taken.
    """
    taken = (total - torch.diag(total.diagonal())).sum(dim=0)
    return taken / taken.sum().clamp(min=torch.finfo(taken.dtype).tiny)


def join_words(
    pieces: Sequence[str], relevance: Float32[np.ndarray, " n"]
) -> tuple[list[str], Float32[np.ndarray, " m"]]:
    """Join pieces to words: one begins after white space. Special tokens (empty) are left out."""
    words: list[str] = []
    sums: list[float] = []
    fresh = True
    for piece, value in zip(pieces, relevance, strict=True):
        text = piece.strip()
        if not piece or not text:
            fresh = True
            continue
        if fresh or piece[0].isspace():
            words.append(text)
            sums.append(float(value))
        else:
            words[-1] += text
            sums[-1] += float(value)
        fresh = piece[-1].isspace()
    return words, np.array(sums, dtype=np.float32)


def _rolled(
    record: object, score: Tensor, relevance: Relevance, *, of: str = ""
) -> Float[Tensor, "n n"]:
    names = [name for name in record if name.startswith(of)]  # type: ignore[attr-defined]
    maps = [record.calls(name)[0] for name in names]  # type: ignore[attr-defined]
    gradients = torch.autograd.grad(score, maps, retain_graph=True)
    found = [m[0].detach() for m in maps]
    return rollout(found, [g[0] for g in gradients], relevance=relevance)


def _array(tensor: Float[Tensor, "*n"] | Bool[Tensor, "*n"]) -> np.ndarray:
    return np.asarray(tensor.detach().float().cpu().numpy())
