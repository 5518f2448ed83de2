"""Gaussian adaptive attention: values are weighted by Gaussians of their own distance from a mean.

Normalised form, along one axis, with n learned Gaussians (offset delta_i in units of x, width c_i):

    w = prod_i N(x; mu + delta_i, c_i^2 (var + 1e-8)), scaled to sum 1;   y = x * w
      = softmax( -W/2 (z - m)^2 )      z = (x - mu) / s,  s = sqrt(var + 1e-8),
                                       W = sum_i c_i^-2,  m = sum_i delta_i / (s c_i^2) / W

with mu and the unbiased var along that axis. The second line is how it is computed: the product of
Gaussians is a Gaussian, n times cheaper and without underflow. `normalize="clamped"` gives the
published code's value, whose sum is clamped at 1e-8 after the product has underflowed.

Density form, on stacked layers (B, L, D) with an offset and a width per feature:

    w = exp(-z^2 / (2 c))            z = (x - mu - delta) / sqrt(var + 1e-8 + 1e-5);   y = x * w

with mu and the biased var along L, widths not squared, and no normalisation. The two are different
functions. Ioannides, Chadha and Elkins, "Gaussian adaptive attention is all you need" (arXiv
2401.11143); the density form is that of its experiments.

Cost for N values: time and memory N. Weights belong to single values, not to pairs of tokens:
`observe` gets them as (b, lines, 1, size of the axis) in the normalised form, rows summing to one
per head, and as (b, D, 1, L) in the density form; there is no softmax over keys to steer.

Differs from the published code: padding is a boolean mask and takes no part in means, variances or
weights; `padding_value` is there for old results alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.precision import at_least_float32, without_autocast
from heed_core.sites import Probe
from heed_core.tokens import check_real, check_shape

Normalize = Literal["exact", "clamped"]
"""Weights that sum to one, or the published code's, which underflow."""

SMALLEST_WIDTH = 1e-3
"""Widths nearer to zero, where the Gaussian is singular, count as this."""


def gaussian_weights(
    x: Float[Tensor, "*shape"],
    offsets: Float[Tensor, " gaussians"],
    widths: Float[Tensor, " gaussians"],
    *,
    axis: int,
    mask: Bool[Tensor, "*shape"] | None = None,
    normalize: Normalize = "exact",
) -> Float[Tensor, "*shape"]:
    """Weights of the normalised form, in float32 at least.

    Args:
        x: Values.
        offsets: Of the Gaussians from the mean, in units of x.
        widths: Of the Gaussians, in standard deviations; the sign does not matter.
        axis: Along which means are taken and weights sum to one.
        mask: True = the value counts; others get the weight zero. Lines with fewer than two values
            that count get zeros.
        normalize: As `Normalize`.
    """
    check_real(x=x)
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis must be one of the {x.dim()} axes of x, got {axis}")
    if x.shape[axis] < 2:
        raise ValueError(
            f"axis {axis} must have at least 2 values for an unbiased variance, got "
            f"{tuple(x.shape)}"
        )
    if offsets.dim() != 1 or offsets.shape != widths.shape or offsets.shape[0] == 0:
        raise ValueError(
            "offsets and widths must be (gaussians,) of one size, got "
            f"{tuple(offsets.shape)} and {tuple(widths.shape)}"
        )
    if normalize not in ("exact", "clamped"):
        raise ValueError(f"normalize must be 'exact' or 'clamped', got {normalize!r}")
    with without_autocast(x):
        values = at_least_float32(x)
        mean, variance = _moments(values, axis, mask)
        spread = (variance + 1e-8).sqrt()
        precisions = widths.to(values.dtype).abs().clamp(min=SMALLEST_WIDTH) ** -2
        total = precisions.sum()
        centre = (offsets.to(values.dtype) * precisions).sum() / total / spread
        away = (values - mean) / spread
        scores = -0.5 * total * (away - centre).square()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if normalize == "exact":
            weights = _softmax(scores, axis, mask)
        else:
            constant = _log_constant(offsets.to(values.dtype), precisions, spread)
            product = (scores + constant).exp()
            weights = product / product.sum(axis, keepdim=True).clamp(min=1e-8)
    return weights


def density_weights(
    x: Float[Tensor, "*shape"],
    offset: Float[Tensor, "*#shape"],
    width: Float[Tensor, "*#shape"],
    *,
    axis: int,
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Weights of the density form, in float32 at least; they do not sum to one.

    Args:
        x: Values.
        offset: From the mean, in units of x, broadcastable.
        width: Not squared, positive, broadcastable.
        axis: Along which means are taken.
        mask: True = the value counts; others get the weight zero.
    """
    with without_autocast(x):
        values = at_least_float32(x)
        mean, variance = _moments(values, axis, mask, unbiased=False)
        away = (values - mean - offset.to(values.dtype)).square() / (variance + 1e-8 + 1e-5)
        weights = (-away / (2 * width.to(values.dtype))).exp()
        return weights if mask is None else weights.masked_fill(~mask, 0)


def gaussian_attention(
    x: Float[Tensor, " b *shape"],
    offsets: Float[Tensor, "heads gaussians"],
    widths: Float[Tensor, "heads gaussians"],
    *,
    axis: int,
    mask: Bool[Tensor, " b *shape"] | None = None,
    normalize: Normalize = "exact",
    site: Probe | None = None,
) -> Float[Tensor, " b *shape"]:
    """Values times their weights of the normalised form, along one axis that is cut into heads.

    Args:
        x: Values.
        offsets: As in `gaussian_weights`, of each head.
        widths: Likewise.
        axis: Of x (0 is the batch); its heads are pieces of floor(size / heads) values, the last
            takes the rest.
        mask: True = the value counts; the others become zero.
        normalize: As `Normalize`.
        site: Where weights may be observed.

    Raises:
        ValueError: Shapes that do not fit, an axis that is not there, a head of fewer than two
            values.
        TypeError: A mask that is not boolean.
    """
    weights = _in_heads(x, offsets, widths, axis, mask, normalize)
    if site is not None:
        site(lambda: weights.movedim(axis, -1).flatten(1, -2)[:, :, None])
    y = x * weights.to(x.dtype)
    return y if mask is None else y.masked_fill(~mask, 0)


def density_attention(
    x: Float[Tensor, "b layers *time c"],
    offset: Float[Tensor, "heads c"],
    width: Float[Tensor, "heads c"],
    *,
    compat_view: bool = False,
    site: Probe | None = None,
) -> Float[Tensor, "b layers *time c"]:
    """Values times their weights of the density form, in groups of layers.

    Args:
        x: Features of stacked layers, with a time axis or without.
        offset: As in `density_weights`, of each group.
        width: Likewise.
        compat_view: As in `DensityAttention`.
        site: Where weights may be observed.

    Raises:
        ValueError: Shapes that do not fit, layers that do not divide into groups.
    """
    weights = _of_layers(x, offset, width, compat_view)
    if site is not None:
        site(lambda: weights.transpose(1, 2)[:, :, None])
    return x * (weights if x.dim() == 3 else weights[:, :, None]).to(x.dtype)


def importance_factor(weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A map of mean weights, moved and scaled to [0, 1]; zeros where all are equal."""
    low, high = weights.min(), weights.max()
    spread = high - low
    return (weights - low) / torch.where(spread > 0, spread, 1.0)


def layer_contributions(weights: Float[Tensor, "layers features"]) -> Float[Tensor, " layers"]:
    """Share of each layer in a map of mean weights, in percent."""
    rows = weights.sum(1)
    return 100 * rows / rows.sum()


class GaussianAttention(nn.Module):
    """Gaussian adaptive attention along one axis, which is cut into heads.

    The axis is cut into `heads` pieces of floor(size / heads) values, the last takes the rest; each
    has Gaussians of its own. The site is `probe`.

    Args:
        axis: Of the input (0 is the batch).
        heads: Pieces of the axis.
        gaussians: Of each head.
        normalize: As `Normalize`.
        padding_value: As the published code: values equal to it are set to zero, count in means and
            weights, and come back unchanged. Use a mask instead.

    Example:
        >>> GaussianAttention(axis=1, heads=2, gaussians=3)(torch.randn(2, 8, 5)).shape
        torch.Size([2, 8, 5])
    """

    def __init__(
        self,
        *,
        axis: int,
        heads: int = 1,
        gaussians: int = 1,
        normalize: Normalize = "exact",
        padding_value: float | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or gaussians < 1:
            raise ValueError(f"heads and gaussians must be at least 1, got {heads, gaussians}")
        if normalize not in ("exact", "clamped"):
            raise ValueError(f"normalize must be 'exact' or 'clamped', got {normalize!r}")
        self.axis, self.heads, self.padding_value = axis, heads, padding_value
        self.normalize: Normalize = normalize
        self.offsets = nn.Parameter(torch.zeros(heads, gaussians))
        self.widths = nn.Parameter(torch.randn(heads, gaussians).exp())
        self.probe = Probe()

    def forward(
        self, x: Float[Tensor, " b *shape"], *, mask: Bool[Tensor, " b *shape"] | None = None
    ) -> Float[Tensor, " b *shape"]:
        """Multiply the values by their weights.

        Args:
            x: Values.
            mask: True = the value counts; the others become zero.
        """
        padding = None
        if self.padding_value is not None:
            padding = x == self.padding_value
            x = x.masked_fill(padding, 0)
        y = gaussian_attention(
            x,
            self.offsets,
            self.widths,
            axis=self.axis,
            mask=mask,
            normalize=self.normalize,
            site=self.probe,
        )
        if padding is None:
            return y
        return y.masked_fill(padding, cast(float, self.padding_value))

    def weights(
        self, x: Float[Tensor, " b *shape"], *, mask: Bool[Tensor, " b *shape"] | None = None
    ) -> Float[Tensor, " b *shape"]:
        """What values are multiplied by; in each head they sum to one along the axis."""
        return _in_heads(x, self.offsets, self.widths, self.axis, mask, self.normalize)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"axis={self.axis}, heads={self.heads}, gaussians={self.offsets.shape[1]}"


class GaussianBlock(nn.Module):
    """Gaussian attentions one after the other, each with its residual.

    Args:
        axes: Of the layers.
        heads: Of the layers.
        gaussians: Of each head of the layers.
        normalize: As `Normalize`.
    """

    def __init__(
        self,
        *,
        axes: Sequence[int],
        heads: Sequence[int],
        gaussians: Sequence[int],
        normalize: Normalize = "exact",
    ) -> None:
        super().__init__()
        if not len(axes) == len(heads) == len(gaussians) or not axes:
            raise ValueError(
                "axes, heads and gaussians must have one number per layer, got "
                f"{len(axes)}, {len(heads)} and {len(gaussians)}"
            )
        self.layers = nn.ModuleList(
            GaussianAttention(axis=axis, heads=count, gaussians=each, normalize=normalize)
            for axis, count, each in zip(axes, heads, gaussians, strict=True)
        )

    def forward(
        self, x: Float[Tensor, " b *shape"], *, mask: Bool[Tensor, " b *shape"] | None = None
    ) -> Float[Tensor, " b *shape"]:
        """Transform; `mask` is True where a value counts."""
        for layer in self.layers:
            x = layer(x, mask=mask) + x
        return x


class DensityAttention(nn.Module):
    """Density adaptive attention of stacked layers (B, L, D) or (B, L, T, D).

    The layers are cut into `heads` groups with an offset and a width per feature. With a time axis
    means are taken over time and layers' means get the weights, which all times share. The site is
    `probe`.

    Args:
        dim: Features D.
        heads: Groups of layers; must divide L.
        compat_view: Take (B, L, T, D) for (B, L, D, T) where the mean over time is taken, as the
            published code does, which mixes times and features.

    Example:
        >>> DensityAttention(16, heads=4)(torch.randn(2, 12, 16)).shape
        torch.Size([2, 12, 16])
    """

    def __init__(self, dim: int, *, heads: int = 1, compat_view: bool = False) -> None:
        super().__init__()
        if dim < 1 or heads < 1:
            raise ValueError(f"dim and heads must be at least 1, got {dim} and {heads}")
        self.dim, self.heads, self.compat_view = dim, heads, compat_view
        self.offset = nn.Parameter(torch.zeros(heads, dim))
        self.width = nn.Parameter(torch.full((heads, dim), 2.0))
        self.probe = Probe()

    def forward(self, x: Float[Tensor, "b layers *time c"]) -> Float[Tensor, "b layers *time c"]:
        """Multiply the values by their weights."""
        return density_attention(
            x, self.offset, self.width, compat_view=self.compat_view, site=self.probe
        )

    def weights(self, x: Float[Tensor, "b layers *time c"]) -> Float[Tensor, "b layers c"]:
        """What the features of each layer are multiplied by."""
        return _of_layers(x, self.offset, self.width, self.compat_view)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}"


def gaussian_attention_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the library's multi-head class, or of its block (`layers.<l>.`).

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"mean_offsets": "offsets", "c": "widths"}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        before, found, rest = name.rpartition("attention_heads.")
        head, _, kind = rest.partition(".")
        if not found or not head.isdigit() or kind not in names:
            raise ValueError(f"{name!r} is no weight of Gaussian adaptive attention")
        parts.setdefault(before + names[kind], {})[int(head)] = tensor
    return _stacked(parts)


def density_attention_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the experiments' `MultiHeadDAAM` (`daams.<h>.`) or single `DAAM`.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"mean_offset": "offset", "c": "width"}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        rest = name.removeprefix("daams.")
        head, _, kind = rest.partition(".") if rest != name else ("0", "", name)
        if not head.isdigit() or kind not in names:
            raise ValueError(f"{name!r} is no weight of density adaptive attention")
        parts.setdefault(names[kind], {})[int(head)] = tensor.flatten()
    return _stacked(parts)


def _stacked(parts: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([heads[head] for head in sorted(heads)]) for name, heads in parts.items()
    }


def _in_heads(
    x: Tensor,
    offsets: Tensor,
    widths: Tensor,
    axis: int,
    mask: Tensor | None,
    normalize: Normalize,
) -> Tensor:
    """Weights of the normalised form, piece by piece of the axis."""
    if x.dim() < 2 or not -x.dim() < axis < x.dim() or axis == 0:
        raise ValueError(f"x must have a batch axis and an axis {axis}, got {tuple(x.shape)}")
    check_shape("offsets", offsets, (None, None), "heads, gaussians")
    check_shape("widths", widths, tuple(offsets.shape), "heads, gaussians")
    if mask is not None:
        _check_mask(mask, x)
    heads, size = offsets.shape[0], x.shape[axis]
    each = size // heads if heads else 0
    if each < 2:
        raise ValueError(f"each of {heads} heads needs at least 2 values, axis {axis} has {size}")
    pieces = [each] * (heads - 1) + [size - each * (heads - 1)]
    found = [
        gaussian_weights(piece, offset, width, axis=axis, mask=part, normalize=normalize)
        for piece, part, offset, width in zip(
            torch.split(x, pieces, dim=axis),
            [None] * heads if mask is None else torch.split(mask, pieces, dim=axis),
            offsets,
            widths,
            strict=True,
        )
    ]
    return torch.cat(found, dim=axis)


def _of_layers(x: Tensor, offset: Tensor, width: Tensor, compat_view: bool) -> Tensor:
    """Weights (b, layers, c) of the density form, group by group of layers."""
    check_shape("offset", offset, (None, None), "heads, features")
    check_shape("width", width, tuple(offset.shape), "heads, features")
    heads, dim = offset.shape
    if x.dim() not in (3, 4) or x.shape[-1] != dim:
        raise ValueError(
            f"x must be (batch, layers, {dim}) or (batch, layers, time, {dim}), got "
            f"{tuple(x.shape)}"
        )
    check_real(x=x)
    batch, layers = x.shape[:2]
    if heads == 0 or layers % heads:
        raise ValueError(f"heads={heads} must divide the number of layers, got {layers}")
    values = at_least_float32(x)
    if x.dim() == 4:
        view = values.reshape(batch, layers, dim, x.shape[2]) if compat_view else None
        values = values.mean(2) if view is None else view.mean(3)
    groups = values.reshape(batch, heads, layers // heads, dim)
    found = density_weights(groups, offset[:, None], width[:, None], axis=2)
    return found.reshape(batch, layers, dim)


def _moments(
    x: Tensor, axis: int, mask: Tensor | None, *, unbiased: bool = True
) -> tuple[Tensor, Tensor]:
    if mask is None:
        mean = x.mean(axis, keepdim=True)
        squares = (x - mean).square().sum(axis, keepdim=True)
        return mean, squares / (x.shape[axis] - int(unbiased))
    count = mask.sum(axis, keepdim=True)
    kept = x.masked_fill(~mask, 0)
    mean = kept.sum(axis, keepdim=True) / count.clamp(min=1)
    squares = (kept - mean).square().masked_fill(~mask, 0).sum(axis, keepdim=True)
    return mean, squares / (count - int(unbiased)).clamp(min=1)


def _softmax(scores: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """Softmax whose lines with fewer than two permitted values are zero."""
    if mask is None:
        return scores.softmax(axis)
    enough = mask.sum(axis, keepdim=True) >= 2
    return scores.masked_fill(~enough, 0.0).softmax(axis).masked_fill(~enough | ~mask, 0.0)


def _log_constant(offsets: Tensor, precisions: Tensor, spread: Tensor) -> Tensor:
    """Logarithm of product over softmax argument: what the closed form divides out."""
    total = precisions.sum()
    scaled = offsets / spread[..., None]  # (*shape, gaussians)
    mean_square = (precisions * scaled.square()).sum(-1)
    square_mean = (precisions * scaled).sum(-1).square() / total
    roots = 0.5 * (precisions.log() - math.log(2 * math.pi)).sum()
    return roots - 0.5 * (mean_square - square_mean)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True = the value counts), got {mask.dtype}")
    if mask.shape != x.shape:
        raise ValueError(f"mask must be {tuple(x.shape)} as x, got {tuple(mask.shape)}")
