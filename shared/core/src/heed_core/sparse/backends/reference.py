"""Sparse convolution as its formula reads; gradients come from autograd."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from heed_core.sparse.rulebook import Rulebook


def run(
    features: Float[Tensor, "n i"],
    weight: Float[Tensor, "o volume i"],
    rulebook: Rulebook,
) -> Float[Tensor, "m o"]:
    """For each kernel cell: gather, multiply, add."""
    output = features.new_zeros(rulebook.num_out, weight.shape[0])
    for k, (sources, targets) in enumerate(zip(rulebook.sources, rulebook.targets, strict=True)):
        output = output.index_add(0, targets, features[sources] @ weight[:, k].T)
    return output
