"""Bi-level routing attention: each region of a grid attends to the few regions most like it.

    q_r, k_r = mean over region r of Q, of K            (all channels, no gradient)
    routes(r) = the topk regions s with the largest q_r . k_s
    O_i = softmax over all j in routes(region of i) of (scale * Q_i . K_j), times V_j, per head
    y = W_out (O + LePE(V))                             LePE: depth-wise convolution of the values

Zhu et al., "BiFormer: vision transformer with bi-level routing attention" (arXiv 2303.08810). All
heads share the routes, and the published scale is dim ** -0.5, not head_dim ** -0.5.

Cost for N cells of width C in R regions: time N C (topk N / R) + R^2 C, so N^2 with a fixed number
of regions and N^(4/3) with R ~ N^(2/3); memory N C + R^2. Gathered keys and values, topk times the
originals, exist in pieces only, unless a gradient needs them; with `gather="torch"` not even then,
and with `gather="flex"` never.

Differs from the published code, where sizes need not divide: what pads the grid takes no part in
the means and is masked; the published code attends to it. `LepeAttention` is the full attention of
the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.attention.axial import check_cell_mask, check_grid
from heed_core.attention.multi_axis import partition, unpartition
from heed_core.attention.multi_head import check_heads
from heed_core.backends import flex
from heed_core.impl import Impl
from heed_core.kernels.gather_attention import gather_attention
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.precision import at_least_float32, without_autocast
from heed_core.sites import Attend
from heed_core.tokens import check_indices, check_some

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Gather = Literal["auto", "torch", "triton", "flex"]
"""How the cells on the routes are reached, see `routed_attention`."""

PIECE_BYTES = 2**20
"""Gathered keys and values that exist at a time where no gradient needs them."""

_Call = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def to_regions(
    x: Shaped[Tensor, "b *spatial c"], regions: Sequence[int]
) -> Shaped[Tensor, "b r n c"]:
    """Split a grid into `prod(regions)` regions of equal size, in row-major order.

    Args:
        x: Grid.
        regions: Their number along each axis (not their size).
    """
    return partition(x, regions, mode="grid").transpose(1, 2)


def from_regions(
    x: Shaped[Tensor, "b r n c"], regions: Sequence[int], spatial: Sequence[int]
) -> Shaped[Tensor, "b *spatial c"]:
    """Put the regions of `to_regions` back."""
    return unpartition(x.transpose(1, 2), regions, spatial, mode="grid")


def region_affinity(
    query: Float[Tensor, "b r n c"],
    key: Float[Tensor, "b r n c"],
    *,
    mask: Bool[Tensor, "b r n"] | None = None,
) -> Float[Tensor, "b r r"]:
    """Products of the regions' mean queries and keys, times c ** -0.5, without gradient.

    Args:
        query: By region.
        key: By region.
        mask: True = the cell counts. A region without any is at -inf for all.
    """
    query, key = at_least_float32(query.detach()), at_least_float32(key.detach())
    if mask is None:
        means = [x.mean(2) for x in (query, key)]
        return _products(means[0], means[1])
    counts = mask.sum(2, keepdim=True)
    hidden = ~mask[..., None]
    totals = [x.masked_fill(hidden, 0).sum(2) for x in (query, key)]
    means = [total / counts.clamp(min=1) for total in totals]
    return _products(means[0], means[1]).masked_fill(counts.mT == 0, -torch.inf)


def region_topk(
    query: Float[Tensor, "b r n c"],
    key: Float[Tensor, "b r n c"],
    *,
    topk: int,
    mask: Bool[Tensor, "b r n"] | None = None,
) -> Int[Tensor, "b r k"]:
    """The regions that each region attends to, by falling affinity.

    Args:
        query: By region.
        key: By region.
        topk: How many, at most all.
        mask: As in `region_affinity`.
    """
    if query.dim() != 4 or query.shape != key.shape:
        raise ValueError(
            "query and key must be (batch, regions, cells, channels) of one size, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    _check_topk(topk, query.shape[1])
    return region_affinity(query, key, mask=mask).topk(topk, dim=-1).indices


def routed_attention(
    query: Float[Tensor, "b r n c"],
    key: Float[Tensor, "b r n c"],
    value: Float[Tensor, "b r n e"],
    routes: Int[Tensor, "b r k"],
    *,
    heads: int,
    mask: Bool[Tensor, "b r n"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
    gather: Gather = "auto",
) -> Float[Tensor, "b r n e"]:
    """Attend from the cells of each region to the cells of the regions on its routes.

    Args:
        query: By region, see `to_regions`.
        key: By region.
        value: By region.
        routes: Regions to attend to; a region named twice counts twice.
        heads: Which the channels are split into.
        mask: True = the cell may be attended to.
        scale: Of the products; (c / heads) ** -0.5 if not given.
        dropout: Probability of dropping a weight.
        impl: Back-end of `attend`.
        gather: "auto" gathers keys and values and calls `attend`; "torch" and "triton" run
            `kernels.gather_attention`, which holds less where gradients are needed; "flex" runs
            torch's FlexAttention with `routed_block_mask`, which copies no key at all.

    Raises:
        ValueError: Shapes that do not fit, or options that `gather` does not have.
        UnsupportedBackend: `gather` cannot run here (FlexAttention: no float64, no gradient on the
            CPU; on CUDA regions of 2, 4, 8 ... times 16 cells).
    """
    _check_gather(gather, impl, dropout)
    shape = query.shape[:3]
    if query.dim() != 4 or key.shape != query.shape or value.shape[:3] != shape:
        raise ValueError(
            "query, key and value must be (batch, regions, cells, channels) of one size, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if routes.dim() != 3 or routes.shape[:2] != shape[:2]:
        raise ValueError(
            f"routes must be (batch {shape[0]}, regions {shape[1]}, topk), got "
            f"{tuple(routes.shape)}"
        )
    check_indices("routes", routes, shape[1], of="regions")
    check_heads(query.shape[3], heads, heads, None)
    check_heads(value.shape[3], heads, heads, None)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True = may be attended to, got {mask.dtype}")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must be {tuple(shape)}, got {tuple(mask.shape)}")

    def call(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        return attend(q, k, v, mask=allowed, scale=scale, dropout=dropout, impl=impl)

    if gather == "flex":
        return _through_blocks(query, key, value, routes, heads, mask, scale)
    if gather != "auto":
        return _through_indices(query, key, value, routes, heads, mask, scale, gather)
    return _routed(query, key, value, routes, heads=heads, mask=mask, call=call, whole=False)


def routed_block_mask(
    routes: Int[Tensor, "b r k"], cells: int, *, mask: Bool[Tensor, "b r n"] | None = None
) -> BlockMask:
    """The routes as FlexAttention takes them: a block per pair of regions, made of the indices.

    For tokens in the order of `to_regions`, flattened. No map of all pairs of cells is made.

    Args:
        routes: Regions to attend to, each named once.
        cells: n, of a region.
        mask: True = the cell may be attended to.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, regions, topk = routes.shape
    chosen = torch.zeros(batch, regions, regions, dtype=torch.bool, device=routes.device)
    chosen.scatter_(2, routes, True)
    real = None if mask is None else mask.flatten(1)

    index = routes.new_zeros(batch, 1, regions, regions, dtype=torch.int32)
    index[..., :topk] = routes.sort(dim=-1).values[:, None]
    count = torch.full_like(index[..., 0], topk)
    nothing = torch.zeros_like(count), torch.zeros_like(index)
    # In a full block `mask_mod` is not asked.
    parts = (*nothing, count, index) if mask is None else (count, index, *nothing)
    length = regions * cells
    return BlockMask.from_kv_blocks(
        *parts,
        BLOCK_SIZE=(cells, cells),
        mask_mod=lambda b, h, i, j: _permitted(chosen, real, cells, b, i, j),
        seq_lengths=(length, length),
    )


def _permitted(
    chosen: Tensor, real: Tensor | None, cells: int, b: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    routed = chosen[b, i // cells, j // cells]
    return routed if real is None else routed & real[b, j]


class BilevelAttention(nn.Module):
    """Bi-level routing attention with its projections and local position encoding.

    The site is `attend`: weights (b * regions, heads, n, topk * n), the keys by falling affinity of
    their region.

    Args:
        dim: Channels of a cell, in and out.
        heads: Heads.
        regions: Their number along each axis of the grid; sizes that do not divide are padded.
        topk: Regions that a region attends to.
        qkv_bias: Whether queries, keys and values have a bias.
        scale: Of the products; dim ** -0.5 if not given.
        lepe_kernel: Odd side of the depth-wise convolution of the values; None leaves it out.
        dropout: Probability of dropping a weight in training.
        impl: Back-end of `attend`.
        gather: As in `routed_attention`; with something attached to the site, `attend` runs.

    Example:
        >>> attention = BilevelAttention(32, heads=2, regions=(3, 3), topk=2)
        >>> attention(torch.randn(1, 12, 10, 32)).shape
        torch.Size([1, 12, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        regions: Sequence[int],
        topk: int,
        qkv_bias: bool = True,
        scale: float | None = None,
        lepe_kernel: int | None = 5,
        dropout: float = 0.0,
        impl: Impl = "auto",
        gather: Gather = "auto",
    ) -> None:
        super().__init__()
        _check_gather(gather, impl, dropout)
        check_heads(dim, heads, heads, None)
        if not 1 <= len(regions) <= 3 or min(regions) < 1:
            raise ValueError(f"regions must be positive for 1 to 3 axes, got {tuple(regions)}")
        total = 1
        for count in regions:
            total *= count
        _check_topk(topk, total)
        self.dim, self.heads, self.regions, self.topk = dim, heads, tuple(regions), topk
        self.gather: Gather = gather
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.lepe = None if lepe_kernel is None else depthwise(dim, lepe_kernel, len(regions))
        self.attend = Attend(
            scale=dim**-0.5 if scale is None else scale, dropout=dropout, impl=impl
        )
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, mask: Bool[Tensor, " b *spatial"] | None = None
    ) -> Float[Tensor, "b *spatial c"]:
        """Attend along the routes; `mask` is True where a cell may be attended to."""
        check_grid(x, self.dim, axes=len(self.regions), layer=self.query)
        if mask is not None:
            check_cell_mask(mask, x)
        spatial = x.shape[1:-1]
        padded, counted = self._padded(x, mask)
        cells = to_regions(padded, self.regions)
        query, key, value = self.query(cells), self.key(cells), self.value(cells)
        real = None
        if counted is not None:
            real = to_regions(counted[..., None], self.regions)[..., 0]
        routes = region_topk(query, key, topk=self.topk, mask=real)

        mixed = self._mixed(query, key, value, routes, real)
        y = _cropped(from_regions(mixed, self.regions, padded.shape[1:-1]), spatial)
        if self.lepe is not None:
            values = _cropped(from_regions(value, self.regions, padded.shape[1:-1]), spatial)
            if mask is not None:
                values = values.masked_fill(~mask[..., None], 0)
            y = y + self.lepe(values.movedim(-1, 1)).movedim(1, -1)
        return cast(Tensor, self.out(y))

    def _mixed(
        self, query: Tensor, key: Tensor, value: Tensor, routes: Tensor, mask: Tensor | None
    ) -> Tensor:
        watched = self.attend.attachments is not None
        scale, gather = self.attend.scale, "auto" if watched else self.gather
        if gather == "flex":
            return _through_blocks(query, key, value, routes, self.heads, mask, scale)
        if gather != "auto":
            return _through_indices(query, key, value, routes, self.heads, mask, scale, gather)

        def call(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
            return cast(Tensor, self.attend(q, k, v, mask=allowed))

        return _routed(
            query, key, value, routes, heads=self.heads, mask=mask, call=call, whole=watched
        )

    def _padded(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pad at the end of each axis; the mask is False there."""
        missing = [-size % count for size, count in zip(x.shape[1:-1], self.regions, strict=True)]
        if not any(missing):
            return x, mask
        ends = [side for size in reversed(missing) for side in (0, size)]
        if mask is None:
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return F.pad(x, [0, 0, *ends]), F.pad(mask, ends, value=False)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, regions={self.regions}, topk={self.topk}"


class LepeAttention(nn.Module):
    """Full attention of all cells plus a depth-wise convolution, as in BiFormer's last stage.

    The site is `attend`: weights (b, heads, N, N), cells in row-major order.

    Args:
        dim: Channels of a cell, in and out.
        heads: Heads.
        axes: Spatial axes of the grid, 1 to 3.
        qkv_bias: Whether queries, keys and values have a bias.
        lepe_kernel: Odd side of the convolution.
        lepe_of: What it convolves: the layer's "input", as published weights need, or the "value".
        dropout: Probability of dropping a weight in training.
        impl: Back-end of `attend`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        axes: int = 2,
        qkv_bias: bool = False,
        lepe_kernel: int = 5,
        lepe_of: Literal["input", "value"] = "input",
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, None)
        if lepe_of not in ("input", "value"):
            raise ValueError(f"lepe_of must be 'input' or 'value', got {lepe_of!r}")
        self.dim, self.heads, self.spatial_axes, self.lepe_of = dim, heads, axes, lepe_of
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.lepe = depthwise(dim, lepe_kernel, axes)
        self.attend = Attend(dropout=dropout, impl=impl)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Attend from every cell to every cell."""
        check_grid(x, self.dim, axes=self.spatial_axes, layer=self.query)
        check_some(x=x)
        tokens = x.flatten(1, -2)
        value = self.value(x)
        query, key, values = (
            y.reshape(*tokens.shape[:2], self.heads, self.dim // self.heads).transpose(1, 2)
            for y in (self.query(tokens), self.key(tokens), value)
        )
        mixed: Tensor = self.attend(query, key, values)
        source = x if self.lepe_of == "input" else value
        local = self.lepe(source.movedim(-1, 1)).movedim(1, -1)
        joined = mixed.transpose(1, 2).reshape(x.shape)
        return cast(Tensor, self.out(joined + local))


def depthwise(dim: int, kernel: int, axes: int) -> nn.Module:
    """A depth-wise convolution that keeps the size, of a map with 1 to 3 spatial axes."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 1, got {kernel}")
    if axes not in (1, 2, 3):
        raise ValueError(f"axes must be 1, 2 or 3, got {axes}")
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return make(dim, dim, kernel, padding=kernel // 2, groups=dim)


def attention_from_biformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of BiFormer's attentions, routed or of the last stage.

    Both published layouts of the routed one are known: `qkv.qkv`, `wo`, and `qkv_linear`,
    `output_linear` with trailing axes of 1.

    Raises:
        ValueError: A name that they do not have.
    """
    packed = ("qkv.qkv", "qkv_linear", "qkv")
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "lepe":
            result[name] = tensor
        elif module in packed:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"{part}.{kind}"] = _without_ones(rows)
        elif module in ("wo", "output_linear", "proj"):
            result[f"out.{kind}"] = _without_ones(tensor)
        else:
            raise ValueError(f"{name!r} is no weight of an attention of BiFormer")
    return result


def _products(query: Tensor, key: Tensor) -> Tensor:
    with without_autocast(query):
        return query @ key.mT * float(query.shape[-1] ** -0.5)


def _without_ones(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 2 else tensor


def _check_topk(topk: int, regions: int) -> None:
    if not 1 <= topk <= regions:
        raise ValueError(f"topk must be between 1 and the {regions} regions, got {topk}")


def _cropped(x: Tensor, spatial: Sequence[int]) -> Tensor:
    for axis, size in enumerate(spatial, start=1):
        x = x.narrow(axis, 0, size)
    return x


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    *,
    heads: int,
    mask: Tensor | None,
    call: _Call,
    whole: bool,
) -> Tensor:
    """Attend along routes, in pieces of regions unless `whole` or a gradient is needed."""
    regions = query.shape[1]
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    if whole or needs_grad or torch.compiler.is_compiling():
        return _along_routes(query, key, value, routes, heads, mask, call)
    gathered = routes.shape[2] * (key[:, 0].numel() + value[:, 0].numel()) * key.element_size()
    step = max(1, PIECE_BYTES // max(gathered, 1))
    if step >= regions:
        return _along_routes(query, key, value, routes, heads, mask, call)
    output = query.new_empty(*query.shape[:3], value.shape[3])
    for start in range(0, regions, step):
        piece = slice(start, start + step)
        output[:, piece] = _along_routes(
            query[:, piece], key, value, routes[:, piece], heads, mask, call
        )
    return output


def _through_indices(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
    gather: KernelImpl,
) -> Tensor:
    """The same by the indices of the cells on the routes."""
    cells = query.shape[2]

    def by_head(x: Tensor) -> Tensor:
        """(b, r, n, c) -> (b, h, r, n, d)."""
        return x.reshape(*x.shape[:3], heads, x.shape[3] // heads).movedim(3, 1)

    index = routes[..., None] * cells + torch.arange(cells, device=routes.device)
    bias = None
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        bias = hidden.flatten(1)[:, None].expand(-1, heads, -1)
    mixed = gather_attention(
        by_head(query),
        by_head(key).flatten(2, 3),
        by_head(value).flatten(2, 3),
        index.flatten(2)[:, None],
        bias=bias,
        scale=scale,
        impl=gather,
    )
    return mixed.movedim(1, 3).flatten(3)


def _through_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The same by blocks of FlexAttention."""
    batch, regions, cells, width = query.shape

    def by_head(x: Tensor) -> Tensor:
        """(b, r, n, c) -> (b, h, r n, d)."""
        return x.reshape(batch, regions * cells, heads, x.shape[3] // heads).transpose(1, 2)

    mixed = flex.run_blocks(
        *(by_head(x) for x in (query, key, value)),
        block_mask=routed_block_mask(routes, cells, mask=mask),
        scale=(width // heads) ** -0.5 if scale is None else scale,
    )
    return mixed.transpose(1, 2).reshape(batch, regions, cells, value.shape[3])


def _check_gather(gather: Gather, impl: Impl, dropout: float) -> None:
    if gather not in get_args(Gather):
        raise ValueError(f"gather must be one of {get_args(Gather)}, got {gather!r}")
    if gather != "auto" and (dropout or impl != "auto"):
        raise ValueError(
            f"gather={gather!r} has no dropout and does not run `attend`: dropout must be 0 and "
            f"impl 'auto', got {dropout} and {impl!r}"
        )


def _along_routes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    heads: int,
    mask: Tensor | None,
    call: _Call,
) -> Tensor:
    batch, asking, cells, _ = query.shape
    first = torch.arange(batch, device=routes.device) * key.shape[1]
    rows = (routes + first[:, None, None]).flatten()

    def gathered(x: Tensor) -> Tensor:
        """(b, r, n, ...) -> (b * r, k * n, ...)."""
        picked = x.flatten(0, 1).index_select(0, rows)
        return picked.reshape(batch * asking, routes.shape[2] * cells, *x.shape[3:])

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)

    allowed = None if mask is None else gathered(mask)[:, None, None]
    mixed = call(
        by_head(query.flatten(0, 1)), by_head(gathered(key)), by_head(gathered(value)), allowed
    )
    return mixed.transpose(1, 2).reshape(batch, asking, cells, value.shape[3])
