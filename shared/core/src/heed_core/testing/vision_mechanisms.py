"""Attention mechanisms of vision networks for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heed_core.attention.axial import (
    MultiAxisAxialAttention,
    RowColumnDecoder,
)
from heed_core.attention.bilevel import BilevelAttention, LepeAttention
from heed_core.attention.enhanced_linear import (
    EnhancedLinearAttention,
    EnhancedLinearBlock,
    LocalWindowBlock,
)
from heed_core.attention.gaussian import DensityAttention, GaussianAttention
from heed_core.attention.multi_axis import MultiAxisAttention, PartitionAttention
from heed_core.attention.multi_axis_mlp import (
    AxisGatedMlp,
    MultiAxisMlp,
)
from heed_core.attention.spectral import SpectralGate
from heed_core.testing import vision_formulas as formula
from heed_core.testing.conformance import (
    Inputs,
    Mechanism,
    Sizes,
    Symmetry,
    Unseen,
    flip,
    permutation,
    shift,
)
from heed_core.testing.vision_sparse_mechanisms import VISION_SPARSE_MECHANISMS

_GRID_AXES = {1: "h", 2: "w"}
_NO_MASK = "the mechanism hides no cell from another"
_NO_DROPOUT = "the mechanism has no dropout"
_ELEMENTWISE = "nothing but element-wise operations, which are not counted"
_NO_WEIGHTS = "gates multiply features: there are no weights of values"
_NO_SOFTMAX = "the mechanism has no softmax site"


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


def _cells(size: int) -> int:
    return size * (size + 2)


def _grid(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, size, size + 2, 8)}


def _fixed_key_biases(module: nn.Module) -> nn.Module:
    """Take the biases of keys out of the parameters.

    They add one number to a row of scores, which a softmax does not see: their gradients are zero,
    and what is computed for them is rounding alone.
    """
    for name, layer in module.named_modules():
        if name.endswith("key"):
            width = cast(Tensor, layer.bias).shape[0]
            del layer.bias
            layer.register_buffer("bias", torch.linspace(-1.0, 1.0, width))
    return module


def _tokens(batch: int, size: int) -> Inputs:
    mask = torch.ones(batch, size, dtype=torch.bool)
    mask[1::2, -2:] = False
    return {"x": torch.randn(batch, size, 8), "padding_mask": mask}


def _loud_padding(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].masked_fill(~inputs["padding_mask"][..., None], 1e4)}


def _turned_layers(x: Tensor) -> Tensor:
    return torch.cat([half.flip(1) for half in x.chunk(2, dim=1)], dim=1)


def _fixed_widths(module: nn.Module) -> nn.Module:
    """Take the widths out of the parameters: drawn at random they would be zero or negative."""
    for name in ("widths", "width"):
        if isinstance(width := getattr(module, name, None), nn.Parameter):
            delattr(module, name)
            fixed = torch.linspace(0.6, 1.9, width.numel()).view(width.shape)
            module.register_buffer(name, fixed)
    return module


def _values(batch: int, size: int) -> Inputs:
    mask = torch.ones(batch, 7, size, dtype=torch.bool)
    mask[:, 2, 1] = mask[:, 6, 2] = False
    return {"x": torch.randn(batch, 7, size), "mask": mask}


def _loud_hidden_values(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].masked_fill(~inputs["mask"], 1e4)}


def _two_grids(batch: int, size: int) -> Inputs:
    x = _windows(batch, size)["x"]
    return {"x": x, "y": torch.randn(*x.shape[:3], 5)}


def _uneven_with_hidden_cells(batch: int, size: int) -> Inputs:
    x = torch.randn(batch, size + 1, size + 3, 8)
    mask = torch.ones(x.shape[:3], dtype=torch.bool)
    mask[:, 1, 2] = False
    return {"x": x, "mask": mask}


def _swapped_in_regions(x: Tensor) -> Tensor:
    """Reverse the order of the cells in each of 2 x 3 regions."""
    split: Tensor = x.reshape(x.shape[0], 2, x.shape[1] // 2, 3, x.shape[2] // 3, *x.shape[3:])
    return split.flip(2, 4).reshape(x.shape)


def _windows(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, 2 * size, 3 * (size + 1), 8)}


def _windows_with_hidden_cells(batch: int, size: int) -> Inputs:
    x = _windows(batch, size)["x"]
    mask = torch.ones(x.shape[:3], dtype=torch.bool)
    mask[:, 1, 2] = False
    return {"x": x, "mask": mask}


def _window_cells(size: int) -> int:
    return 2 * size * 3 * (size + 1)


def _moved_windows(x: Tensor) -> Tensor:
    return x.roll((2, 3), (1, 2))


def _moved_offsets(x: Tensor) -> Tensor:
    """Roll the places between the cells of a grid of 2 x 3."""
    split: Tensor = x.reshape(x.shape[0], 2, x.shape[1] // 2, 3, x.shape[2] // 3, *x.shape[3:])
    return split.roll((1, 1), (2, 4)).reshape(x.shape)


def _moved(name: str, move: Callable[[Tensor], Tensor]) -> Symmetry:
    return Symmetry(
        name=name,
        on_inputs=lambda inputs: {key: move(x) for key, x in inputs.items()},
        on_output=move,
    )


def _grid_with_hidden_cells(batch: int, size: int) -> Inputs:
    mask = torch.ones(batch, size, size + 2, dtype=torch.bool)
    mask[:, 1, 2] = False
    return {**_grid(batch, size), "mask": mask}


def _loud_hidden_cells(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].masked_fill(~inputs["mask"][..., None], 1e4)}


def _without_hidden_cell(output: Tensor) -> Tensor:
    output = output.clone()
    output[:, 1, 2] = 0
    return output


def _grid_and_context(batch: int, size: int) -> Inputs:
    return {**_grid(batch, size), "context": torch.randn(batch, size, size + 2, 8)}


def _loud_from_second_row(inputs: Inputs) -> Inputs:
    x = inputs["x"].clone()
    x[:, 1, 2:] += 1e4
    x[:, 2:] += 1e4
    return {**inputs, "x": x}


def _before_second_row(output: Tensor) -> Tensor:
    return torch.cat([output[:, 0], output[:, 1, :3]], dim=1)


def _both_axes(arguments: tuple[str, ...]) -> tuple[Symmetry, ...]:
    return tuple(make(arguments, axis) for make in (flip, shift) for axis in (1, 2))


_WRONG_GRID = (
    (_spoilt("x", lambda x: x[..., :-1]), "x must be (batch, 2 spatial axes, 8)"),
    (_spoilt("x", lambda x: x[0]), "x must be (batch, 2 spatial axes, 8)"),
)
_WRONG_MASK = (
    (_spoilt("mask", lambda x: x[:, 1:]), "mask must be"),
    (_spoilt("mask", lambda x: x.float()), "mask must be boolean"),
)
_UNEVEN = (_spoilt("x", lambda x: x[:, 1:]), "spatial axis 0 must be a multiple of 2")
_WHOLE = {"h": Sizes(multiple_of=2), "w": Sizes(multiple_of=3)}
"""Divisibility is stated to the exporter: of a free size it would be a guard."""

VISION_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="axial-sum",
        smallest=2,
        build=lambda dropout: MultiAxisAxialAttention(8, heads=2, qkv_bias=False, dropout=dropout),
        inputs=_grid_with_hidden_cells,
        reference=formula.axial,
        size=3,
        tokens=_cells,
        exponent=1.5,
        costly_sizes=(4096, 8192),
        unseen=(Unseen(name="masked", change=_loud_hidden_cells, select=_without_hidden_cell),),
        symmetries=(
            *_both_axes(("x", "mask")),
            permutation(("x", "mask"), axis=1, out_axis=1),
            permutation(("x", "mask"), axis=2, out_axis=2),
        ),
        wrong=(*_WRONG_GRID, *_WRONG_MASK),
        dynamic={"x": _GRID_AXES, "mask": _GRID_AXES},
    ),
    Mechanism(
        name="axial-sequence",
        build=lambda dropout: _fixed_key_biases(
            MultiAxisAxialAttention(8, heads=2, combine="sequence", dropout=dropout)
        ),
        inputs=_grid,
        reference=formula.axial,
        size=3,
        tokens=_cells,
        exponent=1.5,
        costly_sizes=(4096, 8192),
        symmetries=_both_axes(("x",)),
        wrong=_WRONG_GRID,
        dynamic={"x": _GRID_AXES},
        excused={"unseen": "no mask is given here; see axial-sum"},
    ),
    Mechanism(
        name="axial-row-column-decoder",
        build=lambda dropout: _fixed_key_biases(
            RowColumnDecoder(8, heads=2, outer_depth=2, inner_depth=1, dropout=dropout)
        ),
        inputs=_grid_and_context,
        reference=formula.row_column,
        size=3,
        tokens=_cells,
        exponent=1.5,
        costly_sizes=(4096, 8192),
        unseen=(
            Unseen(name="later cells", change=_loud_from_second_row, select=_before_second_row),
        ),
        wrong=(*_WRONG_GRID, (_spoilt("context", lambda x: x[:, 1:]), "context must have")),
        dynamic={"x": _GRID_AXES, "context": _GRID_AXES},
        excused={"symmetry": "the raster order tells all cells apart"},
    ),
    Mechanism(
        name="partition-block",
        build=lambda dropout: PartitionAttention(
            8, heads=2, size=(2, 3), qkv_bias=False, dropout=dropout
        ),
        inputs=_windows_with_hidden_cells,
        reference=formula.partitioned,
        size=2,
        tokens=_window_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        unseen=(Unseen(name="masked", change=_loud_hidden_cells, select=_without_hidden_cell),),
        symmetries=(_moved("shift by whole windows", _moved_windows),),
        wrong=(*_WRONG_GRID, *_WRONG_MASK, _UNEVEN),
        dynamic={"x": _GRID_AXES, "mask": _GRID_AXES},
        limits=_WHOLE,
    ),
    Mechanism(
        name="partition-grid",
        build=lambda dropout: PartitionAttention(
            8, heads=2, size=(2, 3), mode="grid", qkv_bias=False, dropout=dropout
        ),
        inputs=_windows_with_hidden_cells,
        reference=formula.partitioned,
        size=2,
        tokens=_window_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        unseen=(Unseen(name="masked", change=_loud_hidden_cells, select=_without_hidden_cell),),
        symmetries=(_moved("shift of all offsets", _moved_offsets),),
        wrong=(*_WRONG_GRID, *_WRONG_MASK, _UNEVEN),
        dynamic={"x": _GRID_AXES, "mask": _GRID_AXES},
        limits=_WHOLE,
    ),
    Mechanism(
        name="multi-axis",
        build=lambda dropout: _fixed_key_biases(
            MultiAxisAttention(8, heads=2, size=(2, 3), hidden=12, dropout=dropout)
        ),
        inputs=_windows,
        reference=formula.multi_axis,
        size=1,
        tokens=_window_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        wrong=(*_WRONG_GRID, _UNEVEN),
        dynamic={"x": _GRID_AXES},
        limits=_WHOLE,
        excused={
            "unseen": "no mask is given here; see partition-block",
            "symmetry": "shifting windows reorders the grids, and the bias tells their cells apart",
        },
    ),
    Mechanism(
        name="bilevel-uneven",
        build=lambda dropout: BilevelAttention(
            8, heads=2, regions=(2, 3), topk=2, qkv_bias=False, lepe_kernel=3, dropout=dropout
        ),
        inputs=_uneven_with_hidden_cells,
        reference=formula.bilevel,
        size=2,
        tokens=lambda size: (size + 1) * (size + 3),
        exponent=2.0,
        costly_sizes=(128, 256),
        unseen=(Unseen(name="masked", change=_loud_hidden_cells, select=_without_hidden_cell),),
        wrong=(*_WRONG_GRID, *_WRONG_MASK),
        excused={
            "symmetry": "a convolution with zeros around tells cells apart",
            "exported-size": "padding depends on the size; see bilevel-plain",
        },
    ),
    Mechanism(
        name="bilevel-plain",
        build=lambda dropout: BilevelAttention(
            8,
            heads=2,
            regions=(2, 3),
            topk=2,
            qkv_bias=False,
            lepe_kernel=None,
            dropout=dropout,
        ),
        inputs=_windows,
        reference=formula.bilevel,
        size=2,
        tokens=_window_cells,
        exponent=2.0,
        costly_sizes=(128, 256),
        symmetries=(
            _moved("order of the cells in regions", _swapped_in_regions),
            flip(("x",), 1),
            flip(("x",), 2),
        ),
        wrong=_WRONG_GRID,
        dynamic={"x": _GRID_AXES},
        limits=_WHOLE,
        excused={"unseen": "no mask is given here; see bilevel-uneven"},
    ),
    Mechanism(
        name="lepe-attention",
        build=lambda dropout: LepeAttention(8, heads=2, lepe_kernel=3, dropout=dropout),
        inputs=_grid,
        reference=formula.lepe_attention,
        size=3,
        tokens=_cells,
        exponent=2.0,
        costly_sizes=(128, 256),
        wrong=_WRONG_GRID,
        dynamic={"x": _GRID_AXES},
        excused={
            "unseen": _NO_MASK,
            "symmetry": "a convolution with zeros around tells cells apart",
        },
    ),
    Mechanism(
        name="enhanced-linear",
        build=lambda dropout: EnhancedLinearAttention(8, heads=2, denominator_min=6.0),
        inputs=_tokens,
        reference=formula.enhanced_linear,
        exponent=1.0,
        unseen=(
            Unseen(name="padding", change=_loud_padding, select=lambda output: output[:, :-2]),
        ),
        symmetries=(permutation(("x", "padding_mask"), axis=1, out_axis=1),),
        wrong=(
            (_spoilt("x", lambda x: x[..., :-1]), "x must be (batch, tokens, 8)"),
            (_spoilt("x", lambda x: x[0]), "x must be (batch, tokens, 8)"),
            (_spoilt("padding_mask", lambda x: x[:, 1:]), "padding_mask must be"),
            (_spoilt("padding_mask", lambda x: x.float()), "padding_mask must be boolean"),
        ),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"eval-deterministic": _NO_DROPOUT, "observe": _NO_SOFTMAX},
    ),
    Mechanism(
        name="enhanced-linear-block",
        build=lambda dropout: EnhancedLinearBlock(
            8, heads=2, kernel=3, hidden=12, denominator_min=6.0, dropout=dropout
        ),
        inputs=_grid,
        reference=formula.enhanced_block,
        size=3,
        tokens=_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        wrong=_WRONG_GRID,
        dynamic={"x": _GRID_AXES},
        excused={
            "unseen": "convolutions see every cell",
            "symmetry": "convolutions with zeros around tell cells apart",
            "observe": _NO_SOFTMAX,
        },
    ),
    Mechanism(
        name="local-window-block",
        build=lambda dropout: _fixed_key_biases(
            LocalWindowBlock(8, heads=2, size=(2, 3), hidden=12, dropout=dropout)
        ),
        inputs=_grid,
        reference=formula.local_window,
        size=3,
        tokens=_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        wrong=_WRONG_GRID,
        excused={
            "unseen": "convolutions see every cell",
            "symmetry": "convolutions with zeros around tell cells apart",
            "exported-size": "padding depends on the size",
        },
    ),
    Mechanism(
        name="spectral-gate",
        build=lambda dropout: SpectralGate(4, grid=(3, 4)),
        inputs=lambda batch, size: {"x": torch.randn(batch, 3, 4, 4)},
        reference=formula.spectral,
        exponent=1.0,
        symmetries=(shift(("x",), 1), shift(("x",), 2)),
        wrong=(
            (_spoilt("x", lambda x: x[:, 1:]), "x must be (batch, 3, 4, 4)"),
            (_spoilt("x", lambda x: x[0]), "x must be (batch, 3, 4, 4)"),
        ),
        excused={
            "unseen": _NO_MASK,
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
            "cost": "the grid is part of the weights, and transforms are not counted",
            "exported-size": "the grid is part of the weights",
        },
    ),
    Mechanism(
        name="gaussian",
        smallest=3,
        build=lambda dropout: _fixed_widths(GaussianAttention(axis=1, heads=2, gaussians=3)),
        inputs=_values,
        reference=formula.gaussian,
        exponent=1.0,
        unseen=(Unseen(name="masked", change=_loud_hidden_values),),
        symmetries=(permutation(("x", "mask"), axis=2, out_axis=2),),
        wrong=(
            (_spoilt("x", lambda x: x[:, :3]), "mask must be"),
            (_spoilt("x", lambda x: x[0, 0]), "x must have a batch axis and an axis 1"),
            *_WRONG_MASK,
        ),
        dynamic={"x": {2: "n"}, "mask": {2: "n"}},
        excused={
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
            "cost": _ELEMENTWISE,
        },
    ),
    Mechanism(
        name="density",
        build=lambda dropout: _fixed_widths(DensityAttention(4, heads=2)),
        inputs=lambda batch, size: {"x": torch.randn(batch, 2 * size, 4)},
        reference=formula.density,
        exponent=1.0,
        wrong=(
            (_spoilt("x", lambda x: x[..., :-1]), "x must be (batch, layers, 4)"),
            (_spoilt("x", lambda x: x[:, 1:]), "heads=2 must divide the number of layers"),
        ),
        symmetries=(
            Symmetry(
                name="order of the layers of a head",
                on_inputs=lambda inputs: {"x": _turned_layers(inputs["x"])},
                on_output=_turned_layers,
            ),
        ),
        dynamic={"x": {1: "n"}},
        limits={"n": Sizes(multiple_of=2)},
        excused={
            "unseen": _NO_MASK,
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
            "cost": _ELEMENTWISE,
        },
    ),
    Mechanism(
        name="axis-gated-mlp",
        build=lambda dropout: AxisGatedMlp(8, size=(2, 3), dropout=dropout),
        inputs=_windows,
        reference=lambda module, inputs: formula.axis_mlp(module, inputs["x"]),
        size=2,
        tokens=_window_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        symmetries=(_moved("shift by whole blocks", _moved_windows),),
        wrong=(*_WRONG_GRID, _UNEVEN),
        dynamic={"x": _GRID_AXES},
        limits=_WHOLE,
        excused={"unseen": _NO_MASK, "observe": _NO_WEIGHTS},
    ),
    Mechanism(
        name="multi-axis-mlp",
        build=lambda dropout: MultiAxisMlp(8, block=(2, 3), grid=(2, 1), dropout=dropout),
        inputs=_windows,
        reference=formula.multi_axis_mlp,
        size=1,
        tokens=_window_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        wrong=(*_WRONG_GRID, _UNEVEN),
        dynamic={"x": _GRID_AXES},
        limits=_WHOLE,
        excused={
            "unseen": _NO_MASK,
            "symmetry": "shifting blocks reorders grids, whose places have their own weights",
            "observe": _NO_WEIGHTS,
        },
    ),
    Mechanism(
        name="cross-gating",
        build=formula.Crossed,
        inputs=_two_grids,
        reference=formula.cross_gating,
        size=1,
        tokens=_window_cells,
        exponent=1.0,
        costly_sizes=(64, 128),
        wrong=(
            *_WRONG_GRID,
            (_spoilt("y", lambda y: y[..., 1:]), "y must be (batch 2, 2 spatial axes, 5)"),
            (_spoilt("y", lambda y: y[:, 1:]), "y must cover"),
        ),
        dynamic={"x": _GRID_AXES, "y": _GRID_AXES},
        limits=_WHOLE,
        excused={
            "unseen": _NO_MASK,
            "symmetry": "shifting blocks reorders grids, whose places have their own weights",
            "observe": _NO_WEIGHTS,
        },
    ),
    *VISION_SPARSE_MECHANISMS,
)
"""The vision mechanisms of `heed_core.attention`."""
