"""Channel attention by Gram matrix: every channel of a feature map attends to every channel.

    E = X X^T        (C x C products of whole channels, no projection, no scale)
    y = gamma * softmax_j(max_j E_ij - E_ij) X + x        with gamma = 0 at first

Fu et al., "Dual attention network" (DANet, arXiv 1809.02983), section 3.3; Sinha & Dolz (MSGA,
arXiv 1906.02849). The published code subtracts from the maximum, so that the *least* similar
channels get the most weight (`invert=True`); the papers' formula is softmax(E) (`invert=False`).

Cost for N places: time N C^2, memory N C + C^2. The map may have any number of spatial axes.

Differs from the published code: products and softmax are float32 for half-precision input, since a
sum over all places overflows float16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.impl import Impl
from heed_core.sites import Attend
from heed_core.tokens import check_real


def channel_gram_attention(
    x: Float[Tensor, "b c *spatial"], *, invert: bool = True, impl: Impl = "auto"
) -> Float[Tensor, "b c *spatial"]:
    """Attend from every channel to every channel by their products.

    Args:
        x: Feature map.
        invert: Give the least similar channels the most weight.
        impl: Back-end of `attend`.
    """
    with _full_precision(x):
        query, key = _channels(x, invert=invert)
        mixed = attend(query, key, key, scale=1.0, impl=impl)
    return mixed.reshape(x.shape).to(x.dtype)


class ChannelGramAttention(nn.Module):
    """Channel attention with its residual.

    The site is `attend`: weights (b, 1, C, C).

    Args:
        invert: Give the least similar channels the most weight.
        gamma: Initial weight of what was attended to; at 0 the module is the identity.
        impl: Back-end of `attend`.

    Example:
        >>> ChannelGramAttention()(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(self, *, invert: bool = True, gamma: float = 0.0, impl: Impl = "auto") -> None:
        super().__init__()
        self.invert = invert
        self.attend = Attend(scale=1.0, impl=impl)
        self.gamma = nn.Parameter(torch.tensor([gamma]))

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Add what every channel attends to."""
        with _full_precision(x):
            query, key = _channels(x, invert=self.invert)
            mixed: Tensor = self.attend(query, key, key)
        return self.gamma * mixed.reshape(x.shape).to(x.dtype) + x

    def extra_repr(self) -> str:
        """Show the options."""
        return f"invert={self.invert}"


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _channels(x: Tensor, *, invert: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys (b, 1, c, N); a softmax over max - E is one over -E."""
    if x.dim() < 3:
        raise ValueError(f"x must be (batch, channels, *spatial), got {tuple(x.shape)}")
    check_real(x=x)
    key = x.flatten(2)[:, None].to(torch.promote_types(x.dtype, torch.float32))
    return (-key if invert else key), key
