"""Context-mixing dynamic convolution (ContMix): each place makes its own kernels out of a context.

    A = q^T k                    q: every place, k: the context pooled to 7 x 7 regions; per group
    [a_s, a_l] = W A + b         s^2 + k^2 numbers from 49 affinities, W shared by all groups
    y_i = sum_j softmax_j(a_i + T[offset of j from i]) v_j       j in the s x s, the k x k window

Half of the channels go through the small window, half through the large. Windows are clamped into
the map: at borders they move inwards instead of meeting zeros. Lou and Yu, "OverLoCK: an
overview-first-look-closely-next ConvNet with context-mixing dynamic kernels" (arXiv 2502.20087).
Queries are scaled by (dim / heads) ** -0.5 although they have half as many channels per head.

Cost for N places of width C and a kernel of side k: time N k^2 C; memory N (C + k^2), with a
gradient too (`kernels.neighborhood`). Kernels are softmaxes of mixed affinities, not of products of
a query and a key, so they do not go through `attend`: `observe` gets them as N x N maps of the
sites `small` and `large` (b, heads, N, N; rows sum to one), and there is nothing to steer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.kernels.neighborhood import wants_triton, window_starts, window_sum
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.layers import matrix_and_bias
from heed_core.precision import at_least_float32, without_autocast
from heed_core.sites import Probe
from heed_core.tokens import check_real, check_shape, check_type


def neighborhood_av(
    weights: Float[Tensor, "b g h w k2"],
    value: Float[Tensor, "b g h w c"],
    *,
    kernel: int,
    impl: KernelImpl = "auto",
) -> Float[Tensor, "b g h w c"]:
    """Sum the values of each place's clamped window, with weights of its own.

    Args:
        weights: Of the window's places in row-major order.
        value: Of every place.
        kernel: Odd side k of the window, at most the sides of the map.
        impl: Who sums, see `kernels.neighborhood`.
    """
    _check_window(weights, value, kernel)
    found: Tensor = window_sum(weights, value, kernel, wants_triton(impl, value))
    return found


def clamped_relative_bias(
    table: Float[Tensor, "g t t"], height: int, width: int
) -> Float[Tensor, "g h w k2"]:
    """Of each place, the entries of a table of offsets for the places of its clamped window.

    Args:
        table: (groups, 2 k - 1, 2 k - 1), offsets of the neighbour from the place, from -(k - 1).
        height: Of the map.
        width: Of the map.
    """
    if table.dim() != 3 or table.shape[1] != table.shape[2] or table.shape[1] % 2 == 0:
        raise ValueError(f"table must be (groups, 2 k - 1, 2 k - 1), got {tuple(table.shape)}")
    kernel = (table.shape[1] + 1) // 2

    def offsets(size: int) -> Tensor:
        place = torch.arange(size, device=table.device)
        first = window_starts(size, kernel, device=table.device) - place + kernel - 1
        return first[:, None] + torch.arange(kernel, device=table.device)  # (n, k)

    found = table[:, offsets(height)[:, None, :, None], offsets(width)[None, :, None, :]]
    return found.flatten(3)


def context_kernels(
    query: Float[Tensor, "b g h w c"],
    key: Float[Tensor, "b g r c"],
    weight: Float[Tensor, "numbers r"],
    bias: Float[Tensor, " numbers"],
    small_bias: Float[Tensor, "g t t"],
    large_bias: Float[Tensor, "g u u"],
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b g h w s2"], Float[Tensor, "b g h w k2"]]:
    """The kernels of every place, small and large, in float32 at least.

    Args:
        query: Of every place.
        key: Of the r regions of the context.
        weight: W, to the s^2 + k^2 numbers of both kernels, for all groups.
        bias: b.
        small_bias: T of the small window, (groups, 2 s - 1, 2 s - 1).
        large_bias: T of the large window, (groups, 2 k - 1, 2 k - 1).
        scale: Of the products; (2 c) ** -0.5 if not given.

    Raises:
        ValueError: Shapes that do not fit, a map with a side shorter than a kernel.
    """
    sides = _check_kernels(query, key, weight, bias, small_bias, large_bias)
    query = query * ((2 * query.shape[-1]) ** -0.5 if scale is None else scale)
    height, width = query.shape[2:4]
    with without_autocast(query):
        affinity = at_least_float32(query).flatten(2, 3) @ at_least_float32(key).mT
        logits = F.linear(affinity, at_least_float32(weight), at_least_float32(bias))
        logits = logits.reshape(*logits.shape[:2], height, width, logits.shape[-1])
        small, large = torch.split(logits, [side**2 for side in sides], dim=-1)
        small = small + clamped_relative_bias(small_bias, height, width)
        large = large + clamped_relative_bias(large_bias, height, width)
        return small.softmax(-1), large.softmax(-1)


def context_mixing(
    query: Float[Tensor, "b g h w c"],
    key: Float[Tensor, "b g r c"],
    value: Float[Tensor, "b 2 g h w e"],
    weight: Float[Tensor, "numbers r"],
    bias: Float[Tensor, " numbers"],
    small_bias: Float[Tensor, "g t t"],
    large_bias: Float[Tensor, "g u u"],
    *,
    scale: float | None = None,
    impl: KernelImpl = "auto",
    sites: tuple[Probe, Probe] | None = None,
) -> Float[Tensor, "b 2 g h w e"]:
    """Sum the values of each place's windows by the kernels that it makes from the context.

    Args:
        query: As the others but `value` in `context_kernels`.
        key: Likewise.
        value: Of every place, the half of the small window and that of the large.
        weight: Likewise.
        bias: Likewise.
        small_bias: Likewise.
        large_bias: Likewise.
        scale: Likewise.
        impl: Who sums, see `kernels.neighborhood`.
        sites: Where small and large kernels may be observed.

    Raises:
        ValueError: Shapes that do not fit, a map with a side shorter than a kernel.
    """
    kernels = context_kernels(query, key, weight, bias, small_bias, large_bias, scale=scale)
    batch, groups, height, width = query.shape[:4]
    names = "batch, halves, groups, height, width, channels"
    check_shape("value", value, (batch, 2, groups, height, width, None), names)
    mixed = []
    for place, (numbers, half) in enumerate(zip(kernels, value.unbind(1), strict=True)):
        side = math.isqrt(numbers.shape[-1])
        mixed.append(neighborhood_av(numbers.to(half.dtype), half, kernel=side, impl=impl))
        if sites is not None:
            sites[place](partial(window_map, numbers, kernel=side))
    return torch.stack(mixed, dim=1)


class ContextMixing(nn.Module):
    """Dynamic convolution of a map by kernels that each place makes from the context.

    The sites are `small` and `large`: weights (b, heads, N, N), to observe only. A map with a side
    shorter than the large kernel is enlarged for the computation and pooled back.

    Args:
        dim: Channels of the map and of the values, a multiple of 2 heads.
        context_dim: Channels of the context.
        heads: Groups of channels that share kernels; must divide dim / 2.
        kernel: Odd side of the large window.
        small_kernel: Odd side of the small window.
        regions: Side of the pooled context.
        impl: Who sums the windows, see `kernels.neighborhood`.

    Example:
        >>> mixing = ContextMixing(16, context_dim=8, heads=4, kernel=7).eval()
        >>> x, context = torch.randn(1, 16, 8, 11), torch.randn(1, 8, 8, 11)
        >>> mixing(x, context, x).shape
        torch.Size([1, 16, 8, 11])
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int,
        heads: int,
        kernel: int,
        small_kernel: int = 5,
        regions: int = 7,
        impl: KernelImpl = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % (2 * heads):
            raise ValueError(f"dim must be a multiple of 2 heads, got {dim} and {heads} heads")
        for name, side in (("kernel", kernel), ("small_kernel", small_kernel)):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 1, got {side}")
        if small_kernel > kernel:
            raise ValueError(f"small_kernel={small_kernel} must not exceed kernel={kernel}")
        if context_dim < 1 or regions < 1:
            raise ValueError(
                f"context_dim and regions must be at least 1, got {context_dim} and {regions}"
            )
        self.dim, self.context_dim, self.heads = dim, context_dim, heads
        self.impl: KernelImpl = impl
        self.kernels, self.regions = (small_kernel, kernel), regions
        half = dim // 2
        self.query = nn.Conv2d(dim, half, 1, bias=False)
        self.query_norm = nn.BatchNorm2d(half)
        self.key = nn.Conv2d(context_dim, half, 1, bias=False)
        self.key_norm = nn.BatchNorm2d(half)
        self.mix = nn.Linear(regions**2, small_kernel**2 + kernel**2)
        self.small_bias = nn.Parameter(torch.zeros(heads, *[2 * small_kernel - 1] * 2))
        self.large_bias = nn.Parameter(torch.zeros(heads, *[2 * kernel - 1] * 2))
        self.small, self.large = Probe(), Probe()
        self.out = nn.Conv2d(dim, dim, 1, bias=False)
        self.out_norm = nn.BatchNorm2d(dim)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        context: Float[Tensor, "b p h w"],
        value: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """Mix the values of each place's windows.

        Args:
            x: What each place asks with.
            context: What the kernels are made of.
            value: What is mixed.
        """
        self._check(x, context, value)
        size = x.shape[2:]
        if min(size) < self.kernels[1]:
            larger = _enlarged(size[0], size[1], self.kernels[1])
            x, context, value = (
                F.interpolate(one, size=larger, mode="bilinear", align_corners=False)
                for one in (x, context, value)
            )
        query, key = self._projected(x, context)
        mixed = context_mixing(
            query,
            key,
            self._groups(value, 2, self.heads),
            *self._mix(),
            self.small_bias,
            self.large_bias,
            impl=self.impl,
            sites=(self.small, self.large),
        )
        joined = mixed.movedim(-1, 3).flatten(1, 3)
        y: Tensor = self.out_norm(self.out(joined))
        return y if y.shape[2:] == size else F.adaptive_avg_pool2d(y, (size[0], size[1]))

    def weights(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b p h w"]
    ) -> tuple[Float[Tensor, "b g h w s2"], Float[Tensor, "b g h w k2"]]:
        """The kernels of every place, small and large, in float32 at least."""
        query, key = self._projected(x, context)
        return context_kernels(query, key, *self._mix(), self.small_bias, self.large_bias)

    def _mix(self) -> tuple[Tensor, Tensor]:
        weight, bias = matrix_and_bias(self.mix)
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    def _groups(self, maps: Tensor, *cuts: int) -> Tensor:
        """(b, channels, h, w) -> (b, *cuts, h, w, channels of a group)."""
        width = self.dim // (2 * self.heads)
        cut = maps.reshape(maps.shape[0], *cuts, width, *maps.shape[2:])
        return cut.movedim(len(cuts) + 1, -1)

    def _projected(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (b, g, h, w, c) and keys (b, g, regions, c)."""
        pooled = F.adaptive_avg_pool2d(context, self.regions)
        query, key = (
            self._groups(maps, self.heads)
            for maps in (self.query_norm(self.query(x)), self.key_norm(self.key(pooled)))
        )
        return query, key.flatten(2, 3)

    def _check(self, x: Tensor, context: Tensor, value: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (batch, {self.dim}, H, W), got {tuple(x.shape)}")
        if value.shape != x.shape:
            raise ValueError(f"value must be {tuple(x.shape)} as x, got {tuple(value.shape)}")
        if context.dim() != 4 or context.shape[1] != self.context_dim:
            raise ValueError(
                f"context must be (batch, {self.context_dim}, H, W), got {tuple(context.shape)}"
            )
        check_real(x=x, context=context, value=value)
        check_type(self.query, x=x, context=context, value=value)
        if 0 in x.shape[2:] or 0 in context.shape[2:]:
            raise ValueError(
                f"x and context must have cells, got {tuple(x.shape)} and {tuple(context.shape)}"
            )

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, kernels={self.kernels}, regions={self.regions}"


def window_map(weights: Float[Tensor, "b g h w k2"], *, kernel: int) -> Float[Tensor, "b g n n"]:
    """Weights of clamped windows as weights of all places."""
    batch, groups, height, width, _ = weights.shape
    steps = torch.arange(kernel, device=weights.device)
    rows = window_starts(height, kernel, device=weights.device)[:, None, None, None]
    columns = window_starts(width, kernel, device=weights.device)[None, :, None, None]
    places = (rows + steps[:, None]) * width + columns + steps  # (h, w, k, k)
    index = places.reshape(1, 1, height * width, kernel**2).expand(batch, groups, -1, -1)
    empty = weights.new_zeros(batch, groups, height * width, height * width)
    return empty.scatter(-1, index, weights.flatten(2, 3))


def context_mixing_from_overlock(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ContMix from OverLoCK's `DynamicConvBlock`; its other layers are left out.

    Raises:
        ValueError: One of them is missing.
    """
    names = {
        "weight_query.0": "query",
        "weight_query.1": "query_norm",
        "weight_key.1": "key",
        "weight_key.2": "key_norm",
        "weight_proj": "mix",
        "dyconv_proj.0": "out",
        "dyconv_proj.1": "out_norm",
    }
    tables = {"rpb1": "small_bias", "rpb2": "large_bias"}
    result = {tables[name]: tensor for name, tensor in state.items() if name in tables}
    found = set(tables) & set(state)
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            found.add(module)
            flat = tensor.flatten(1) if name == "weight_proj.weight" else tensor
            result[f"{names[module]}.{kind}"] = flat
    if missing := {*names, *tables} - found:
        raise ValueError(f"the weights of {sorted(missing)} are missing")
    return result


def _check_window(weights: Tensor, value: Tensor, kernel: int) -> None:
    if value.dim() != 5 or weights.shape != (*value.shape[:4], kernel**2):
        raise ValueError(
            f"value must be (b, g, h, w, c) and weights (b, g, h, w, {kernel**2}), got "
            f"{tuple(value.shape)} and {tuple(weights.shape)}"
        )
    if kernel % 2 == 0 or kernel > min(value.shape[2:4]):
        raise ValueError(
            f"kernel must be odd and at most the sides {tuple(value.shape[2:4])}, got {kernel}"
        )


def _check_kernels(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    small_bias: Tensor,
    large_bias: Tensor,
) -> tuple[int, int]:
    """The sides of both kernels, if everything fits them."""
    check_shape("query", query, (None,) * 5, "batch, groups, height, width, channels")
    batch, groups, height, width, channels = query.shape
    check_shape("key", key, (batch, groups, None, channels), "batch, groups, regions, channels")
    for name, table in (("small_bias", small_bias), ("large_bias", large_bias)):
        side = table.shape[-1]
        if tuple(table.shape) != (groups, side, side) or side % 2 == 0:
            raise ValueError(
                f"{name} must be ({groups}, 2 k - 1, 2 k - 1) for a side k of its window, got "
                f"{tuple(table.shape)}"
            )
    small, large = ((table.shape[-1] + 1) // 2 for table in (small_bias, large_bias))
    numbers = small**2 + large**2
    check_shape("weight", weight, (numbers, key.shape[2]), "numbers of both kernels, regions")
    check_shape("bias", bias, (numbers,), "numbers of both kernels")
    if max(small, large) > min(height, width):
        raise ValueError(
            f"the sides of query must be at least those of the kernels, {small} and {large}, got "
            f"{(height, width)}"
        )
    return small, large


def _enlarged(height: int, width: int, kernel: int) -> tuple[int, int]:
    """Sizes whose shorter side is the kernel."""
    if height < width:
        return kernel, kernel * width // height
    return kernel * height // width, kernel
