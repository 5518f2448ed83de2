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

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.kernels.neighborhood import wants_triton, window_starts, window_sum
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.precision import at_least_float32, without_autocast
from heed_core.sites import Probe
from heed_core.tokens import check_real


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
        weights = self.weights(x, context)
        batch, _, height, width = value.shape
        each = self.dim // (2 * self.heads)
        halves = value.reshape(batch, 2, self.heads, each, height, width).movedim(3, -1).unbind(1)
        mixed = [
            neighborhood_av(weight.to(half.dtype), half, kernel=kernel, impl=self.impl)
            for weight, half, kernel in zip(weights, halves, self.kernels, strict=True)
        ]
        for probe, weight, kernel in zip(
            (self.small, self.large), weights, self.kernels, strict=True
        ):
            probe(lambda weight=weight, kernel=kernel: window_map(weight, kernel=kernel))
        joined = torch.stack(mixed, dim=1).movedim(-1, 3).flatten(1, 3)
        y: Tensor = self.out_norm(self.out(joined))
        return y if y.shape[2:] == size else F.adaptive_avg_pool2d(y, (size[0], size[1]))

    def weights(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b p h w"]
    ) -> tuple[Float[Tensor, "b g h w s2"], Float[Tensor, "b g h w k2"]]:
        """The kernels of every place, small and large, in float32 at least."""
        query = self.query_norm(self.query(x)) * (self.dim / self.heads) ** -0.5
        pooled = F.adaptive_avg_pool2d(context, self.regions)
        key = self.key_norm(self.key(pooled))
        height, width = x.shape[2:]
        with without_autocast(x):
            q, k = (
                at_least_float32(one).reshape(
                    one.shape[0], self.heads, self.dim // (2 * self.heads), places
                )
                for one, places in ((query, height * width), (key, self.regions**2))
            )
            affinity = q.mT @ k  # (b, g, h * w, regions ** 2)
            weight, bias = at_least_float32(self.mix.weight), at_least_float32(self.mix.bias)
            logits = F.linear(affinity, weight, bias)
            logits = logits.reshape(*logits.shape[:2], height, width, logits.shape[-1])
            sides = [side**2 for side in self.kernels]
            small, large = torch.split(logits, sides, dim=-1)
            small = small + clamped_relative_bias(self.small_bias, height, width)
            large = large + clamped_relative_bias(self.large_bias, height, width)
            return small.softmax(-1), large.softmax(-1)

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


def _enlarged(height: int, width: int, kernel: int) -> tuple[int, int]:
    """Sizes whose shorter side is the kernel."""
    if height < width:
        return kernel, kernel * width // height
    return kernel * height // width, kernel
