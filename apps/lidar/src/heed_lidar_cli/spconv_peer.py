"""The networks of this app on spconv's own modules, one rulebook per layer: a peer for `bench`.

It is what a user of spconv writes: `SubMConv3d`, `SparseConv3d` and `SparseInverseConv3d`, a key
for each strided convolution and its inverse, none for the others. The weights are those of the
network that it is made from, so that both give the same logits.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor, nn

from heed_core.attention.column import ColumnAttention, column_attention
from heed_core.attention.multi_scale_column import MSCA
from heed_core.sparse import CAB, SparseConv3d, SparseInverseConv3d, SubMConv3d, unique_voxels
from heed_core.sparse.blocks import NEGATIVE_SLOPE, ConvActNorm
from heed_lidar.cylinder3d.network import (
    AsymmetricBody,
    CylindricalNetwork,
    DimensionContext,
)

Cells = Any
"""A `spconv.pytorch.SparseConvTensor`: the library has no types."""
Layer = Callable[[Cells], Cells]


class SpconvPeer(nn.Module):
    """A network with its convolutions replaced by those of spconv.

    Args:
        network: Gives layers and weights; its norms and linear layers are used as they are.
        native: Use the algorithm that also runs on the CPU.

    Raises:
        ModuleNotFoundError: spconv is not installed.
    """

    def __init__(self, network: CylindricalNetwork, *, native: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():  # of its own deprecated imports
            warnings.simplefilter("ignore")
            import spconv.pytorch as library  # type: ignore[import-untyped]

        # its tensors ask torch.fx whether it traces, and torch warns of the question
        logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
        self.library, self.native = library, native
        self.network = network
        self.convolutions = nn.ModuleList()
        self.keys: dict[SparseConv3d, str] = {}
        self.stem = self._layer(network.stem)
        self.downs = [(self._layer(d.body), self._strided(d.pool)) for d in network.down]  # type: ignore[arg-type]
        self.ups = [
            (self._layer(up.mix), self._inverse(up.unpool, down.pool), self._layer(up.body))  # type: ignore[arg-type]
            for up, down in zip(network.up, reversed(list(network.down)), strict=True)
        ]
        self.context = self._context(network.context)
        self.head = self._submanifold(network.head)

    def forward(
        self, points: Float[Tensor, "p 9"], index: Int32[Tensor, "p 4"]
    ) -> Float[Tensor, "p c"]:
        """The logits of each point's voxel."""
        grid = self.network.grid
        coords, voxel_of_point, _ = unique_voxels(index, grid.shape)
        features = self.network.points(points, voxel_of_point, len(coords))
        x = self.library.SparseConvTensor(features, coords.int().contiguous(), list(grid.shape), 1)
        x = self.stem(x)
        skips = []
        for body, pool in self.downs:
            skip = body(x)
            skips.append(skip)
            x = pool(skip)
        for mix, unpool, body in self.ups:
            skip = skips.pop()
            x = body(skip.replace_feature(unpool(mix(x)).features + skip.features))
        logits: Tensor = self.head(self.context(x)).features[voxel_of_point]
        return logits

    def _layer(self, module: nn.Module) -> Layer:
        if isinstance(module, SubMConv3d):
            return self._submanifold(module)
        if isinstance(module, CAB | ConvActNorm):
            return self._normed(module)
        if isinstance(module, AsymmetricBody):
            first, second = self._layer(module.first), self._layer(module.second)
            return lambda x: _sum(first(x), second(x))
        if isinstance(module, MSCA):
            return self._multi_scale(module)
        if isinstance(module, nn.Sequential):
            layers = [self._layer(part) for part in module]

            def in_turn(x: Cells) -> Cells:
                for layer in layers:
                    x = layer(x)
                return x

            return in_turn
        raise TypeError(f"no peer for {type(module).__name__}")

    def _made(self, kind: str, ours: nn.Module, kernel: tuple[int, ...], **options: Any) -> Layer:
        """A convolution of the library with our weights; its bias is added here."""
        weight, bias = ours.get_parameter("weight"), dict(ours.named_parameters()).get("bias")
        if self.native:
            options["algo"] = self.library.ConvAlgo.Native
        made = getattr(self.library, kind)(
            weight.shape[-1], weight.shape[0], kernel, bias=False, **options
        )
        with torch.no_grad():
            made.weight.copy_(weight)
        self.convolutions.append(made)
        if bias is None:
            return lambda x: made(x)
        return lambda x: (y := made(x)).replace_feature(y.features + bias)

    def _submanifold(self, ours: SubMConv3d) -> Layer:
        window = ours.window
        return self._made("SubMConv3d", ours, window.kernel, dilation=window.dilation)

    def _strided(self, ours: SparseConv3d) -> Layer:
        window = ours.window
        key = self.keys.setdefault(ours, f"strided{len(self.keys)}")
        options = {"stride": window.stride, "padding": window.padding, "indice_key": key}
        return self._made("SparseConv3d", ours, window.kernel, **options)

    def _inverse(self, ours: SparseInverseConv3d, of: SparseConv3d) -> Layer:
        key = self.keys[of]
        return self._made("SparseInverseConv3d", ours, of.window.kernel, indice_key=key)

    def _normed(self, block: CAB | ConvActNorm) -> Layer:
        conv = block.conv
        layer = self._submanifold(conv) if isinstance(conv, SubMConv3d) else self._strided(conv)

        def normed(x: Cells) -> Cells:
            y = layer(x)
            return y.replace_feature(block.norm(F.leaky_relu(y.features, NEGATIVE_SLOPE)))

        return normed

    def _context(self, block: DimensionContext) -> Layer:
        convs = [self._layer(conv) for conv in block.convs]

        def context(u: Cells) -> Cells:
            gates = [
                torch.sigmoid(norm(conv(u).features))
                for conv, norm in zip(convs, block.norms, strict=True)
            ]
            gate = torch.stack(gates).sum(dim=0)
            return u.replace_feature(torch.cat([gate * u.features, u.features], dim=1))

        return context

    def _multi_scale(self, block: MSCA) -> Layer:
        scales = [[self._layer(plane) for plane in planes.children()] for planes in block.scales]
        attention = self._column_attention(block.attention)

        def multi_scale(x: Cells) -> Cells:
            levels: list[Tensor] = []
            for planes in reversed(scales):
                level = torch.stack([plane(x).features for plane in planes]).sum(dim=0)
                levels.insert(0, level + levels[0] if levels else level)
            fused = F.leaky_relu(block.fuse(torch.cat(levels, dim=1)), NEGATIVE_SLOPE)
            return x.replace_feature(block.fuse_norm(fused) + attention(x))

        return multi_scale

    def _column_attention(self, block: ColumnAttention) -> Callable[[Cells], Tensor]:
        squeeze = self._normed(block.squeeze)
        collapse = block.squeeze.conv
        assert isinstance(collapse, SparseConv3d)
        expand = self._inverse(block.expand, collapse)

        def attention(x: Cells) -> Tensor:
            squeezed = squeeze(x)
            hidden = F.leaky_relu(block.encode(squeezed.features), NEGATIVE_SLOPE)
            scores: Tensor = block.decode(hidden)
            values = expand(squeezed.replace_feature(scores)).features
            width = x.spatial_shape[1]
            keys = [
                (c.indices[:, 0].long() * x.spatial_shape[0] + c.indices[:, 1]) * width
                + c.indices[:, 2]
                for c in (x, squeezed)
            ]
            sorted_keys, order = keys[1].sort()
            column = order[torch.searchsorted(sorted_keys, keys[0])]
            return column_attention(values, scores, column, attn_norm=block.attn_norm)

        return attention


def _sum(x: Cells, y: Cells) -> Cells:
    return x.replace_feature(x.features + y.features)
