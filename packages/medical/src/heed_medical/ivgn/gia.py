"""Globally-intensive attention: three views of a feature map, mixed and added to it.

    d = sigmoid(conv1d_k(mean over places of X))            depth: one gate per channel
    s = sigmoid(BN(conv_7x7([mean_c X; max_c X])))          space: one gate per place
    p = sigmoid(conv_1x1(relu(BN(conv_1x1(X)))))            pixel: a gate of its own per element
    Y = X + g (l_1 d X + l_2 s X + l_3 p X),   l = softmax(w)

Zheng et al., "Intensive Vision-guided Network for Radiology Report Generation" (arXiv 2402.03754),
name the three views and that they are learned and integrated; the formulas are a reconstruction:
depth as in ECA (arXiv 1910.03151), space as in CBAM (arXiv 1807.06521), pixel as a bottleneck.
g and w start at 0, so that the module starts as the identity. There is no softmax over tokens, so
`observe` has nothing to record; `views` gives the gates. Time and memory are linear in the places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GiaViews(NamedTuple):
    """The gates of a feature map, within 0..1."""

    depth: Float[Tensor, "b c 1 1"]
    space: Float[Tensor, "b 1 h w"]
    pixel: Float[Tensor, "b c h w"]


class GlobalIntensiveAttention(nn.Module):
    """Gate a feature map by channel, by place and by element.

    Args:
        dim: Channels of the feature map.
        reduction: Of the channels inside the pixel view.
        depth_kernel: Neighbouring channels that the depth view looks at, odd.
        space_kernel: Side of the space view's window, odd.

    Example:
        >>> x = torch.randn(1, 32, 7, 5)
        >>> torch.equal(GlobalIntensiveAttention(32)(x), x)  # the identity at first
        True
    """

    def __init__(
        self, dim: int, *, reduction: int = 16, depth_kernel: int = 5, space_kernel: int = 7
    ) -> None:
        super().__init__()
        if dim < 1 or reduction < 1 or dim % reduction:
            raise ValueError(f"reduction must divide dim, got dim={dim}, reduction={reduction}")
        for name, kernel in (("depth_kernel", depth_kernel), ("space_kernel", space_kernel)):
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"{name} must be odd and positive, got {kernel}")
        inner = dim // reduction
        self.depth = nn.Conv1d(1, 1, depth_kernel, padding=depth_kernel // 2, bias=False)
        self.space = nn.Sequential(
            nn.Conv2d(2, 1, space_kernel, padding=space_kernel // 2, bias=False), nn.BatchNorm2d(1)
        )
        self.pixel = nn.Sequential(
            nn.Conv2d(dim, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, dim, 1),
        )
        self.mixture = nn.Parameter(torch.zeros(3))
        """Before the softmax; in the order depth, space, pixel."""
        self.strength = nn.Parameter(torch.zeros(()))

    def views(self, x: Float[Tensor, "b c h w"]) -> GiaViews:
        """The three gates."""
        channels = self.depth(x.mean((2, 3))[:, None])[:, 0]  # (b, c)
        places = self.space(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1))
        return GiaViews(
            depth=channels.sigmoid()[:, :, None, None],
            space=places.sigmoid(),
            pixel=self.pixel(x).sigmoid(),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The feature map with the gated ones added."""
        shares = self.mixture.softmax(0)
        depth, space, pixel = self.views(x)
        return x + self.strength * x * (shares[0] * depth + shares[1] * space + shares[2] * pixel)
