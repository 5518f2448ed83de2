"""Cross-correlation of a feature map with a smaller map: how alike is each place to a template.

    a[y, x] = sum_(c, i, j) f[c, y + i - p, x + j - q] t[c, i, j],    p = (kh - 1) // 2, q likewise

The output has the size of the map (padding "same": zeros outside, (k - 1) // 2 before, the rest
after). Time h w c kh kw.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def xcorr2d(
    features: Float[Tensor, "b c h w"], template: Float[Tensor, "b c kh kw"]
) -> Float[Tensor, "b h w"]:
    """Correlate each map with its own template, without flipping it.

    Raises:
        ValueError: Another number of maps or channels.

    Example:
        >>> import torch
        >>> xcorr2d(torch.ones(2, 3, 9, 8), torch.ones(2, 3, 4, 5)).shape
        torch.Size([2, 9, 8])
    """
    if features.shape[:2] != template.shape[:2]:
        raise ValueError(
            f"template must have {tuple(features.shape[:2])} maps and channels, "
            f"got {tuple(template.shape[:2])}"
        )
    batch, channels, height, width = features.shape
    kh, kw = template.shape[2:]
    top, left = (kh - 1) // 2, (kw - 1) // 2
    padded = F.pad(features, (left, kw - 1 - left, top, kh - 1 - top))
    joined = padded.reshape(1, batch * channels, *padded.shape[2:])
    return F.conv2d(joined, template, groups=batch).view(batch, height, width)
