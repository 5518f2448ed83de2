"""The contrastive loss of MoRE: reports draw their X-ray and their ECG near.

With N(a -> b) the cross-entropy of finding b's row i from a's row i among the batch,

    loss = (N(t -> x) + N(x -> t)) / 2 + (N(t -> e) + N(e -> t)) / 2.

Rows without one of both modalities are left out of that pair. Off-diagonal rows of the same group
(the same subject, the same report) are no negatives; the released code counts them as such.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from heed_core.exchange import gather_tokens

Pair = tuple[str, str]


def info_nce(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    temperature: Float[Tensor, ""] | float,
    *,
    valid: Bool[Tensor, " n"] | None = None,
    groups: Int64[Tensor, "k n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of finding row i of `b` from row i of `a` by cosine similarity.

    Args:
        a: Rows that ask.
        b: Rows that are found.
        temperature: Divides the cosines.
        valid: Rows that take part; without any, the loss is 0.
        groups: Several numberings of the rows; another row with the same number in any of them is
            not counted as a wrong answer. Negative numbers are in no group.
    """
    if a.shape != b.shape or a.dim() != 2:
        raise ValueError(f"a and b must be (n, d) alike, got {tuple(a.shape)}, {tuple(b.shape)}")
    if valid is not None:
        a, b = a[valid], b[valid]
        groups = None if groups is None else groups[:, valid]
    if not len(a):
        return (a.sum() + b.sum()) * 0.0
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    if groups is not None:
        same = (groups.unsqueeze(2) == groups.unsqueeze(1)) & (groups >= 0).unsqueeze(2)
        others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
        logits = logits.masked_fill(same.any(0) & others, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(a), device=a.device))


def pair_losses(
    embeddings: Mapping[str, Float[Tensor, "n d"]],
    valid: Mapping[str, Bool[Tensor, " n"]],
    temperature: Float[Tensor, ""] | float,
    *,
    groups: Int64[Tensor, "k n"] | None = None,
    xray_ecg: bool = False,
) -> dict[Pair, Float[Tensor, ""]]:
    """The symmetric loss of each pair of modalities: text with the others, and X-ray with ECG.

    Args:
        embeddings: Of "xray", "ecg", "text": two of them or all.
        valid: Which rows have the modality.
        temperature: As of `info_nce`.
        groups: As of `info_nce`.
        xray_ecg: Whether X-ray and ECG are a pair too; without text they always are.
    """
    pairs: list[Pair] = [("text", other) for other in ("xray", "ecg")]
    if xray_ecg or "text" not in embeddings:
        pairs.append(("xray", "ecg"))
    found = {}
    for one, other in pairs:
        if one not in embeddings or other not in embeddings:
            continue
        both = valid[one] & valid[other]
        a, b = embeddings[one], embeddings[other]
        there = info_nce(a, b, temperature, valid=both, groups=groups)
        back = info_nce(b, a, temperature, valid=both, groups=groups)
        found[one, other] = (there + back) / 2
    if not found:
        raise ValueError(f"two modalities at least are needed, got {sorted(embeddings)}")
    return found


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks; each must have as many.

    Gradients of all processes are summed: where each computes the same loss of all rows and the
    processes' parameter gradients are averaged (as DDP does), they are those of one process with
    the whole batch. Alone, `x` itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return gather_tokens(x[None, None], None)[0, 0]
