"""Position attention: every place of a feature map attends to every place.

    q, k, v = W_q x, W_k x, W_v x        (channels qk_dim, qk_dim, C; with biases)
    y = gamma * softmax_j(scale * q_i . k_j) v_j + x        with scale = 1, gamma = 0 at first

Fu et al., "Dual attention network" (DANet, arXiv 1809.02983), section 3.2; Sinha & Dolz (MSGA,
arXiv 1906.02849). Mind that there is no 1 / sqrt(qk_dim): `scale=1.0` is the published mechanism.

Cost for N places: time N^2 (qk_dim + C), memory N C with fused kernels (no N x N map, neither
forward nor backward). The map may have any number of spatial axes of any sizes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.impl import Impl
from heed_core.sites import Attend
from heed_core.tokens import check_real, check_type


def position_attention(
    query: Float[Tensor, "b k *spatial"],
    key: Float[Tensor, "b k *spatial"],
    value: Float[Tensor, "b c *spatial"],
    *,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> Float[Tensor, "b c *spatial"]:
    """Attend from every place to every place of a feature map.

    Args:
        query: Of every place.
        key: Of every place.
        value: Of every place.
        scale: Of the products.
        impl: Back-end of `attend`.
    """
    if query.dim() < 3 or query.shape != key.shape or value.shape[2:] != query.shape[2:]:
        raise ValueError(
            "query, key and value must be (batch, channels, *spatial) of one spatial size, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    tokens = (x.flatten(2).transpose(1, 2)[:, None].contiguous() for x in (query, key, value))
    mixed = attend(*tokens, scale=scale, impl=impl)
    return mixed[:, 0].transpose(1, 2).reshape(value.shape)


class PositionAttention(nn.Module):
    """Position attention with its projections and residual.

    The site is `attend`: weights (b, 1, N, N), places in the order of `x.flatten(2)`.

    Args:
        dim: Channels of the feature map.
        qk_dim: Channels of queries and keys; an eighth of `dim` if not given.
        scale: Of the products.
        gamma: Initial weight of what was attended to; at 0 the module is the identity.
        impl: Back-end of `attend`.

    Example:
        >>> PositionAttention(16)(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        *,
        qk_dim: int | None = None,
        scale: float = 1.0,
        gamma: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        qk_dim = max(1, dim // 8) if qk_dim is None else qk_dim
        if dim < 1 or qk_dim < 1:
            raise ValueError(f"dim and qk_dim must be at least 1, got {dim} and {qk_dim}")
        self.dim = dim
        self.query = nn.Linear(dim, qk_dim)
        self.key = nn.Linear(dim, qk_dim)
        self.value = nn.Linear(dim, dim)
        self.attend = Attend(scale=scale, impl=impl)
        self.gamma = nn.Parameter(torch.tensor([gamma]))

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Add what every place attends to."""
        if x.dim() < 3 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (batch, {self.dim}, *spatial), got {tuple(x.shape)}")
        check_real(x=x)
        check_type(self.query, x=x)
        tokens = x.flatten(2).transpose(1, 2)[:, None]  # (b, 1, N, c)
        mixed: Tensor = self.attend(self.query(tokens), self.key(tokens), self.value(tokens))
        return self.gamma * mixed[:, 0].transpose(1, 2).reshape(x.shape) + x
