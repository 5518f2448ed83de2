"""Vision mechanisms written out from their formulas, slowly: what the suite compares with."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from heed_core.attention.axial import (
    AxialAttention,
    AxialBlock,
    MultiAxisAxialAttention,
    RowColumnDecoder,
)
from heed_core.attention.bilevel import BilevelAttention, LepeAttention
from heed_core.attention.enhanced_linear import (
    EnhancedLinearAttention,
    EnhancedLinearBlock,
    LocalConcentration,
    LocalWindowBlock,
)
from heed_core.attention.gaussian import DensityAttention, GaussianAttention
from heed_core.attention.multi_axis import MultiAxisAttention, PartitionAttention, PartitionBlock
from heed_core.attention.multi_axis_mlp import (
    AxisGatedMlp,
    CrossGating,
    MultiAxisGate,
    MultiAxisMlp,
)
from heed_core.attention.spectral import SpectralGate
from heed_core.testing.conformance import (
    Inputs,
)
from heed_core.testing.oracle import naive_attention


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer by its formula."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    rows = (x[..., None, :] * weight).sum(-1)
    return rows if bias is None else rows + bias


def layer_norm(layer: nn.Module, x: Tensor, eps: float = 1e-5) -> Tensor:
    """A layer norm by its formula."""
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / spread * cast(Tensor, layer.weight) + cast(Tensor, layer.bias)


def along(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Axial attention of a grid (b, H, W, c), line by line."""
    module = cast(AxialAttention, module)
    if module.axis == 0:
        turned = None if mask is None else mask.transpose(1, 2)
        return along_rows(module, x.transpose(1, 2), turned).transpose(1, 2)
    return along_rows(module, x, mask)


def along_rows(module: AxialAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Axial attention along rows, row by row."""
    query, key, value = (
        linear(layer, x).view(*x.shape[:-1], module.heads, module.head_dim)
        for layer in (module.query, module.key, module.value)
    )
    rows = []
    for row in range(x.shape[1]):
        allowed = None if mask is None else mask[:, row, None, None]
        mixed = naive_attention(
            query[:, row].transpose(1, 2),
            key[:, row].transpose(1, 2),
            value[:, row].transpose(1, 2),
            mask=allowed,
            causal=module.causal,
        )
        rows.append(mixed.transpose(1, 2).flatten(2))
    return linear(module.out, torch.stack(rows, dim=1))


def axial(module: nn.Module, inputs: Inputs) -> Tensor:
    """Axial attention along both axes."""
    module = cast(MultiAxisAxialAttention, module)
    x, mask = inputs["x"], inputs.get("mask")
    if module.combine == "sequence":
        for axis in module.axes:
            x = along(axis, x, mask)
        return x
    return along(module.axes[0], x, mask) + along(module.axes[1], x, mask)


def axial_block(module: nn.Module, x: Tensor) -> Tensor:
    """A block of the Axial Transformer."""
    module = cast(AxialBlock, module)
    x = x + along(module.attention, layer_norm(module.attention_norm, x))
    hidden = linear(module.expand, layer_norm(module.feed_norm, x))
    return x + linear(module.contract, hidden / (1 + (-1.702 * hidden).exp()))


def row_column(module: nn.Module, inputs: Inputs) -> Tensor:
    """The outer and the inner decoder."""
    module = cast(RowColumnDecoder, module)
    x, context = inputs["x"], inputs["context"]
    above = x + context
    for block in module.outer:
        above = axial_block(block, above)
    y = context.clone()
    y[:, 1:] = y[:, 1:] + above[:, :-1]
    y[:, :, 1:] = y[:, :, 1:] + x[:, :, :-1]
    for block in module.inner:
        y = axial_block(block, y)
    return y


def window_bias(module: PartitionAttention) -> Tensor | None:
    """bias[h, i, j] = table[offset of i from j], by the definition."""
    if module.relative_bias is None:
        return None
    high, wide = module.size
    cells = [(r, c) for r in range(high) for c in range(wide)]
    rows = [
        [(r - a + high - 1) * (2 * wide - 1) + c - b + wide - 1 for a, b in cells] for r, c in cells
    ]
    return module.relative_bias.table[torch.tensor(rows)].permute(2, 0, 1)


def group_slices(
    size: tuple[int, ...], mode: str, spatial: torch.Size
) -> list[tuple[slice, slice]]:
    """Where the cells of each block or grid are."""
    (high, wide), (H, W) = size, spatial
    if mode == "block":
        return [
            (slice(r, r + high), slice(c, c + wide))
            for r in range(0, H, high)
            for c in range(0, W, wide)
        ]
    return [
        (slice(r, None, H // high), slice(c, None, W // wide))
        for r in range(H // high)
        for c in range(W // wide)
    ]


def partitioned(module: nn.Module, inputs: Inputs) -> Tensor:
    """Attention within blocks or grids, group by group."""
    module = cast(PartitionAttention, module)
    x, mask = inputs["x"], inputs.get("mask")
    y = torch.zeros_like(x)
    for rows, columns in group_slices(module.size, module.mode, x.shape[1:3]):
        cells = x[:, rows, columns]
        tokens = cells.flatten(1, 2)
        query, key, value = (
            linear(layer, tokens).view(*tokens.shape[:2], module.heads, -1).transpose(1, 2)
            for layer in (module.query, module.key, module.value)
        )
        allowed = None if mask is None else mask[:, rows, columns].flatten(1)[:, None, None]
        mixed = naive_attention(query, key, value, mask=allowed, bias=window_bias(module))
        joined = linear(module.out, mixed.transpose(1, 2).flatten(2))
        y[:, rows, columns] = joined.view(cells.shape)
    return y


def partition_block(module: nn.Module, x: Tensor) -> Tensor:
    """A block of MaxViT."""
    module = cast(PartitionBlock, module)
    normed = layer_norm(module.attention_norm, x)
    x = x + partitioned(module.attention, {"x": normed})
    hidden = linear(module.expand, layer_norm(module.feed_norm, x))
    return x + linear(module.contract, tanh_gelu(hidden))


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    bent: Tensor = ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()
    return 0.5 * x * (1 + bent)


def multi_axis(module: nn.Module, inputs: Inputs) -> Tensor:
    """Block attention, then grid attention."""
    module = cast(MultiAxisAttention, module)
    return partition_block(module.grid, partition_block(module.block, inputs["x"]))


def depthwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A depth-wise convolution of a grid (b, H, W, c) with zeros around, tap by tap."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    side, reach = weight.shape[-1], weight.shape[-1] // 2
    y = bias.expand(x.shape)
    batch, high, wide, width = x.shape
    around = x.new_zeros(batch, high + 2 * reach, wide + 2 * reach, width)
    around[:, reach : reach + high, reach : reach + wide] = x
    for r in range(side):
        for c in range(side):
            y = y + weight[:, 0, r, c] * around[:, r : r + high, c : c + wide]
    return y


def bilevel(module: nn.Module, inputs: Inputs) -> Tensor:
    """Bi-level routing, cell by cell."""
    module = cast(BilevelAttention, module)
    x, mask = inputs["x"], inputs.get("mask")
    batch, high, wide, _ = x.shape
    mask = torch.ones(x.shape[:3], dtype=torch.bool) if mask is None else mask
    query, key, value = (linear(layer, x) for layer in (module.query, module.key, module.value))
    tall, broad = (
        -(-size // count) for size, count in ((high, module.regions[0]), (wide, module.regions[1]))
    )
    regions = [
        [
            (r, c)
            for r in range(i * tall, min((i + 1) * tall, high))
            for c in range(j * broad, min((j + 1) * broad, wide))
        ]
        for i in range(module.regions[0])
        for j in range(module.regions[1])
    ]
    y = torch.zeros_like(x)
    for b in range(batch):
        counted = [[cell for cell in cells if mask[b][cell]] for cells in regions]
        means = [
            [
                torch.stack([t[b][cell].detach().double() for cell in cells]).mean(0)
                for t in (query, key)
            ]
            for cells in counted
        ]
        for region, cells in enumerate(regions):
            order = sorted(
                range(len(regions)), key=lambda s: -float((means[region][0] * means[s][1]).sum())
            )
            seen = [cell for s in order[: module.topk] for cell in counted[s]]
            q, k, v = (
                torch.stack([t[b][cell] for cell in chosen])
                .view(1, len(chosen), module.heads, -1)
                .transpose(1, 2)
                for t, chosen in ((query, cells), (key, seen), (value, seen))
            )
            mixed = naive_attention(q, k, v, scale=module.dim**-0.5)
            for place, cell in enumerate(cells):
                y[b][cell] = mixed[0, :, place].flatten()
    if module.lepe is not None:
        y = y + depthwise(module.lepe, value.masked_fill(~mask[..., None], 0))
    return linear(module.out, y)


def lepe_attention(module: nn.Module, inputs: Inputs) -> Tensor:
    """Full attention and a convolution of the input."""
    module = cast(LepeAttention, module)
    x = inputs["x"]
    tokens = x.flatten(1, 2)
    query, key, value = (
        linear(layer, tokens).view(*tokens.shape[:2], module.heads, -1).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    )
    mixed = naive_attention(query, key, value).transpose(1, 2).reshape(x.shape)
    return linear(module.out, mixed + depthwise(module.lepe, x))


def enhanced_linear(module: nn.Module, inputs: Inputs) -> Tensor:
    """Enhanced linear attention, query by query."""
    module = cast(EnhancedLinearAttention, module)
    x, mask = inputs["x"], inputs.get("padding_mask")
    query, key, value = (
        linear(layer, x).view(*x.shape[:2], module.heads, -1)
        for layer in (module.query, module.key, module.value)
    )
    rows = []
    for b in range(x.shape[0]):
        seen = [j for j in range(x.shape[1]) if mask is None or bool(mask[b, j])]
        for i in range(x.shape[1]):
            for h in range(module.heads):
                shares = [(query[b, i, h].relu() * key[b, j, h].relu()).sum() for j in seen]
                total = torch.stack(shares).sum().clamp(min=module.denominator_min)
                parts = [s * value[b, j, h] for s, j in zip(shares, seen, strict=True)]
                mixed = torch.stack(parts).sum(0)
                rows.append(module.temperature[h, 0] * mixed / total)
    return linear(module.out, torch.stack(rows).reshape(*x.shape[:2], -1))


def gelu(x: Tensor) -> Tensor:
    """GELU by the error function."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def local_concentration(module: nn.Module, x: Tensor) -> Tensor:
    """Convolution, GELU, norm, convolution."""
    module = cast(LocalConcentration, module)
    hidden = gelu(depthwise(module.first, x))
    norm = module.norm
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    return depthwise(module.second, hidden)


def enhanced_block(module: nn.Module, inputs: Inputs) -> Tensor:
    """The global block of L2ViT."""
    module = cast(EnhancedLinearBlock, module)
    x = inputs["x"] + depthwise(module.positions, inputs["x"])
    normed = layer_norm(module.attention_norm, x).flatten(1, 2)
    x = x + enhanced_linear(module.attention, {"x": normed}).view(x.shape)
    x = x + local_concentration(module.local, layer_norm(module.local_norm, x))
    hidden = gelu(linear(module.expand, layer_norm(module.feed_norm, x)))
    return x + linear(module.contract, hidden)


def local_window(module: nn.Module, inputs: Inputs) -> Tensor:
    """The local block of L2ViT; what fills windows up takes part."""
    module = cast(LocalWindowBlock, module)
    x = inputs["x"] + depthwise(module.positions, inputs["x"])
    normed = layer_norm(module.attention_norm, x)
    high, wide = x.shape[1:3]
    rows, columns = module.size
    filled = normed.new_zeros(
        len(x),
        (high + rows - 1) // rows * rows,
        (wide + columns - 1) // columns * columns,
        module.dim,
    )
    filled[:, :high, :wide] = normed
    x = x + partitioned(module.attention, {"x": filled})[:, :high, :wide]
    x = x + depthwise(module.later_positions, x)
    hidden = gelu(linear(module.expand, layer_norm(module.feed_norm, x)))
    return x + linear(module.contract, hidden)


def spectral(module: nn.Module, inputs: Inputs) -> Tensor:
    """Circular convolution with the kernel, which is summed up wave by wave."""
    module = cast(SpectralGate, module)
    x, (high, wide) = inputs["x"], module.grid
    real, imaginary = module.weight.unbind(-1)
    u, v = torch.arange(high).double()[:, None], torch.arange(wide // 2 + 1).double()
    counted = torch.where((v == 0) | (2 * v == wide), 1, 2)[:, None]
    kernel = {}
    for p in range(high):
        for q in range(wide):
            angle = (2 * torch.pi * (u * p / high + v * q / wide))[..., None]
            cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            waves = counted * (real * cosine - imaginary * sine)
            kernel[p, q] = waves.sum((0, 1)) / (high * wide)
    y = torch.zeros_like(x)
    for (p, q), tap in kernel.items():
        y = y + tap * x.roll((p, q), (1, 2))
    return y


def gaussian(module: nn.Module, inputs: Inputs) -> Tensor:
    """Products of Gaussians, as sums of logarithms, line by line."""
    module = cast(GaussianAttention, module)
    x, mask = inputs["x"], inputs["mask"]
    y = torch.zeros_like(x)
    each = x.shape[1] // module.heads
    for h in range(module.heads):
        stop = x.shape[1] if h == module.heads - 1 else (h + 1) * each
        for b in range(x.shape[0]):
            for column in range(x.shape[2]):
                seen = [i for i in range(h * each, stop) if bool(mask[b, i, column])]
                values = x[b, seen, column]
                mean = values.mean()
                variance = (values - mean).square().sum() / (len(seen) - 1) + 1e-8
                logarithms = torch.zeros_like(values)
                for offset, width in zip(module.offsets[h], module.widths[h], strict=True):
                    spread = width.square() * variance
                    away = (values - mean - offset).square()
                    logarithms = logarithms - 0.5 * away / spread - width.square().log() / 2
                shares = (logarithms - logarithms.max().detach()).exp()
                y[b, seen, column] = values * shares / shares.sum()
    return y


def density(module: nn.Module, inputs: Inputs) -> Tensor:
    """The density form, head by head."""
    module = cast(DensityAttention, module)
    x = inputs["x"]
    each = x.shape[1] // module.heads
    parts = []
    for h in range(module.heads):
        values = x[:, h * each : (h + 1) * each]
        mean = values.mean(1, keepdim=True)
        variance = (values - mean).square().mean(1, keepdim=True) + 1e-8 + 1e-5
        away = (values - mean - module.offset[h]).square() / variance
        parts.append(values * (-0.5 * away / module.width[h]).exp())
    return torch.cat(parts, dim=1)


def mixed_places(layer: nn.Module, x: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """A linear layer over the places of each block or grid, one group at a time."""
    y = torch.zeros_like(x)
    for rows, columns in group_slices(size, mode, x.shape[1:3]):
        cells = x[:, rows, columns]
        places = cells.flatten(1, 2)
        mixed = (cast(Tensor, layer.weight)[..., None] * places[:, None]).sum(2)
        y[:, rows, columns] = (mixed + cast(Tensor, layer.bias)[:, None]).view(cells.shape)
    return y


def axis_mlp(module: nn.Module, x: Tensor) -> Tensor:
    """A gated MLP along blocks or grids."""
    module = cast(AxisGatedMlp, module)
    hidden = tanh_gelu(linear(module.expand, layer_norm(module.norm, x, 1e-6)))
    u, v = hidden.chunk(2, dim=-1)
    v = mixed_places(module.mix, layer_norm(module.gate_norm, v, 1e-6), module.size, module.mode)
    return x + linear(module.contract, u * (v + 1))


def multi_axis_mlp(module: nn.Module, inputs: Inputs) -> Tensor:
    """Half of the channels along grids, half along blocks."""
    module = cast(MultiAxisMlp, module)
    x = inputs["x"]
    u, v = tanh_gelu(linear(module.expand, layer_norm(module.norm, x, 1e-6))).chunk(2, dim=-1)
    joined = torch.cat([axis_mlp(module.grid, u), axis_mlp(module.block, v)], dim=-1)
    return x + linear(module.contract, joined)


def gating_weights(module: nn.Module, x: Tensor) -> Tensor:
    """Gates from grids and blocks."""
    module = cast(MultiAxisGate, module)
    u, v = tanh_gelu(linear(module.expand, layer_norm(module.norm, x, 1e-6))).chunk(2, dim=-1)
    u = mixed_places(module.grid_mix, u, module.grid_size, "grid")
    v = mixed_places(module.block_mix, v, module.block_size, "block")
    return linear(module.contract, torch.cat([u, v], dim=-1))


class Crossed(nn.Module):
    """Cross-gating with both results in one tensor."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gating = CrossGating(4, x_dim=8, y_dim=5, block=(2, 3), grid=(2, 1), dropout=dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate."""
        return torch.cat(self.gating(x, y), dim=-1)


def cross_gating(module: nn.Module, inputs: Inputs) -> Tensor:
    """Two grids that gate each other."""
    gating = cast(Crossed, module).gating
    x_skip, y_skip = linear(gating.x_in, inputs["x"]), linear(gating.y_in, inputs["y"])
    x = tanh_gelu(linear(gating.x_expand, layer_norm(gating.x_norm, x_skip, 1e-6)))
    y = tanh_gelu(linear(gating.y_expand, layer_norm(gating.y_norm, y_skip, 1e-6)))
    by_x, by_y = gating_weights(gating.x_gate, x), gating_weights(gating.y_gate, y)
    y = linear(gating.y_out, y * by_x) + y_skip
    return torch.cat([linear(gating.x_out, x * by_y) + y + x_skip, y], dim=-1)
