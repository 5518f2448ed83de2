"""Where a network of voxels looked: heights, single points, columns and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, Num, UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn

from heed_core import observe
from heed_core.attention.multi_scale_column import MSCA
from heed_core.sparse import SparseTensor
from heed_lidar.clouds.ply import write_ply
from heed_lidar.curb_labels import ground_heights
from heed_lidar.curbnet import CurbNetConfig
from heed_lidar.cylindrical import collate, voxelise
from heed_lidar.drawing import Caption, Picture, birds_eye
from heed_lidar.pictures import (
    draw_scan,
    draw_values,
    heat_colours,
    shown_region,
    value_limits,
)
from heed_lidar.settings import to_file_frame
from heed_lidar_cli.prediction import StreetPrediction, curb_class
from heed_lidar_cli.street import SegmentationModule
from heed_runtime.recipe import Explanation
from heed_runtime.report import new_figure, style

HEIGHTS_M = tuple(round(-0.2 + 0.1 * step, 1) for step in range(9))
"""Edges of the slices above the road that are flattened in turn."""
RINGS_M = tuple(5.0 * step for step in range(11))
"""Edges of the rings around the sensor in which the scales are compared."""
STRONGEST = 0.01
"""Share of the points that is asked about where no point was predicted as a curb."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The logit that is explained: the mean over some points of one class."""

    rows: Int64[np.ndarray, " k"]
    target: int
    what: str


def explain_network(module: SegmentationModule, prediction: StreetPrediction) -> Explanation:
    """Maps, curves and arrays of one scan.

    * `height`: every slice of 10 cm above the local road is pressed down to the road in turn; how
      much the mean curb logit of the curb points falls.
    * `gradient`: gradient x input of that logit for each point, summed over its features.
    * `columns`, `channels`: of every column of the finest level, how evenly the channel attention
      weighs (entropy over that of even weights) and which channel it weighs most.
    * `scales`: how much each scale of the finest pyramids contributes, by range.

    The last two need multi-scale channel attention. A scan without points gives no maps. What has a
    value per point is also written as a coloured cloud, in the coordinates of the input's file.
    """
    arrays: dict[str, np.ndarray] = {"curb_score": prediction.curb_score}
    figures: dict[str, Figure | Picture] = {"prediction": _draw_prediction(module, prediction)}
    clouds: dict[str, Callable[[Path], object]] = {}
    if len(prediction.scan):
        question = ask(module, prediction)
        parts = [_heights(module, prediction, question), _gradient(module, prediction, question)]
        if any(isinstance(part, MSCA) for part in module.model.modules()):
            parts += [_attention(module, prediction)]
        for part in parts:
            arrays.update(part.arrays)
            figures.update(part.figures)
            clouds.update({f"{name}.ply": write for name, write in part.clouds.items()})
    return Explanation(name=prediction.name, arrays=arrays, figures=figures, files=clouds)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of explanation."""

    arrays: Mapping[str, np.ndarray]
    figures: Mapping[str, Figure | Picture]
    clouds: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    """Name -> what writes a coloured cloud."""


def ask(module: SegmentationModule, prediction: StreetPrediction) -> Question:
    """About the curb points; without any, about those that are most like a curb."""
    names = module.settings.data.label_map.names
    curb = curb_class(module.settings.data.label_map)
    if curb is None:
        target = int(np.bincount(prediction.first, minlength=len(names))[1:].argmax()) + 1
        rows = np.flatnonzero(prediction.first == target)
        return Question(rows=rows, target=target, what=f"{len(rows)} points of {names[target]}")
    rows = np.flatnonzero(prediction.first == curb)
    if len(rows):
        return Question(rows=rows, target=curb, what=f"{len(rows)} curb points")
    count = max(1, round(STRONGEST * len(prediction.curb_score)))
    rows = np.sort(np.argsort(prediction.curb_score, kind="stable")[-count:])
    return Question(rows=rows, target=curb, what=f"the {count} points most like a curb")


def logit_of(
    module: SegmentationModule, features: Float[Tensor, "n 9"], cells: np.ndarray, asked: Question
) -> Float[Tensor, ""]:
    """The mean logit of the question."""
    index = collate([(np.zeros((len(cells), 9), np.float32), cells)]).index.to(module.device)
    found = module.model(features, index, batch_size=1)
    rows = torch.from_numpy(asked.rows).to(module.device)
    logits: Tensor = found.logits[found.voxel_of_point[rows], asked.target]
    return logits.float().mean()


def _draw_prediction(module: SegmentationModule, prediction: StreetPrediction) -> Picture:
    label_map = module.settings.data.label_map
    pictures = draw_scan(
        prediction.scan.cloud.xyz,
        prediction.classes,
        names=label_map.names,
        colours=label_map.colours,
        curbs=[curb.polyline for curb in prediction.curbs],
        title=prediction.name,
    )
    return pictures["birds-eye"]


def _voxels(
    module: SegmentationModule, prediction: StreetPrediction, xyz: Float64[np.ndarray, "n 3"]
) -> tuple[Float32[np.ndarray, "n 9"], np.ndarray]:
    """Voxels of all points; those outside of the grid lie in its border cells."""
    grid = replace(module.settings.model.grid, out_of_range="clip")
    return voxelise(xyz, prediction.scan.cloud.intensity, grid)


def occlusion(
    module: SegmentationModule, prediction: StreetPrediction, asked: Question
) -> tuple[Float64[np.ndarray, " s"], Int64[np.ndarray, " s"]]:
    """How much the logit falls when a slice of heights is pressed down to the road.

    Returns:
        The fall, and the number of points that are moved; one entry per slice of `HEIGHTS_M`.
    """
    xyz = prediction.scan.cloud.xyz
    height = xyz[:, 2] - ground_heights(xyz, xyz)

    def logit(points: Float64[np.ndarray, "n 3"]) -> float:
        features, cells = _voxels(module, prediction, points)
        return float(logit_of(module, torch.from_numpy(features).to(module.device), cells, asked))

    with torch.no_grad():
        whole = logit(xyz)
        falls, counts = [], []
        for low, high in pairwise(HEIGHTS_M):
            inside = (height >= low) & (height < high)
            flat = xyz.copy()
            flat[inside, 2] -= height[inside]
            falls.append(whole - logit(flat) if inside.any() else 0.0)
            counts.append(int(inside.sum()))
    return np.array(falls), np.array(counts)


def _heights(module: SegmentationModule, prediction: StreetPrediction, asked: Question) -> Part:
    falls, counts = occlusion(module, prediction, asked)
    with style():
        figure = new_figure(width_in=6.4, height_in=3.6)
        axes = figure.subplots()
        middles = 100 * (np.array(HEIGHTS_M[:-1]) + np.array(HEIGHTS_M[1:])) / 2
        axes.bar(middles, falls, width=8)
        axes.axhline(0, color="black", lw=0.8)
        axes.set(
            xlabel="height above the road of the slice that is flattened (cm)",
            ylabel="fall of the logit",
            title=f"{prediction.name}: mean logit of {asked.what}",
        )
    arrays = {
        "height_edges_m": np.array(HEIGHTS_M),
        "height_logit_fall": falls,
        "height_points": counts,
    }
    return Part(arrays=arrays, figures={"height": figure})


def _gradient(module: SegmentationModule, prediction: StreetPrediction, asked: Question) -> Part:
    xyz = prediction.scan.cloud.xyz
    features, cells = _voxels(module, prediction, xyz)
    with torch.enable_grad():
        entering = torch.from_numpy(features).to(module.device).requires_grad_()
        logit = logit_of(module, entering, cells, asked)
        (gradient,) = torch.autograd.grad(logit, entering)
    share = (gradient * entering).sum(dim=1).detach().cpu().numpy() * len(asked.rows)
    values = share.astype(np.float64)
    drawn = draw_values(
        xyz,
        values,
        name="gradient x input",
        signed=True,
        title=f"{prediction.name}: what raises the logit of {asked.what}",
    )
    colours = heat_colours(values, limits=value_limits(values, signed=True), signed=True)
    return Part(
        arrays={"gradient_x_input": share},
        figures={"gradient": drawn["birds-eye"]},
        clouds={"gradient": _cloud(module, prediction, colours, gradient_x_input=share)},
    )


def _cloud(
    module: SegmentationModule,
    prediction: StreetPrediction,
    colours: UInt8[np.ndarray, "n 3"],
    **values: Num[np.ndarray, " n"],
) -> Callable[[Path], object]:
    """What writes the points with colours and values."""
    cloud = prediction.scan.cloud
    xyz = to_file_frame(cloud.xyz, module.settings.data, origin=cloud.origin)
    return partial(write_ply, xyz=xyz, colours=colours, attributes=values)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the attention blocks of the finest level did."""

    cells: Int64[np.ndarray, "v 3"]
    """The occupied voxels."""
    weights: Mapping[str, Float32[np.ndarray, "m c"]]
    """Block -> weight of each channel in each column, rows of a column summing to 1."""
    shares: Mapping[str, Float32[np.ndarray, "v s"]]
    """Block -> part of each scale in the pyramid's sum, in each voxel; rows sum to 1."""


def finest_blocks(model: nn.Module) -> dict[str, MSCA]:
    """The attention blocks that see the voxels as they are: of the first and the last level."""
    blocks = {name: part for name, part in model.named_modules() if isinstance(part, MSCA)}
    heights = {name: block.attention.column for name, block in blocks.items()}
    tallest = max(heights.values())
    names = [name for name in blocks if heights[name] == tallest]
    return {name: blocks[name] for name in (names[0], names[-1])}


def look(module: SegmentationModule, prediction: StreetPrediction) -> Seen:
    """Run the network on a scan and keep what its finest attention blocks did."""
    features, cells = _voxels(module, prediction, prediction.scan.cloud.xyz)
    batch = collate([(features, cells)]).to(module.device)
    blocks = finest_blocks(module.model)
    probes = [f"{name}.attention.probe" for name in blocks]
    with torch.no_grad(), _scales(blocks) as scales, observe(module.model, probes) as record:
        found = module.model(batch.points, batch.index, batch_size=1)
    return Seen(
        cells=found.coords[:, 1:].cpu().numpy().astype(np.int64),
        weights={
            name: record[probe][0, 0].float().cpu().numpy()
            for name, probe in zip(blocks, probes, strict=True)
        },
        shares={name: pyramid_shares(block, scales[name]) for name, block in blocks.items()},
    )


@contextmanager
def _scales(blocks: Mapping[str, MSCA]) -> Iterator[dict[str, list[list[Tensor]]]]:
    """Collect what each plane of each scale gives while the network runs."""
    found: dict[str, list[list[Tensor]]] = {
        name: [[] for _ in block.scales] for name, block in blocks.items()
    }

    def keep(into: list[Tensor]) -> object:
        def hook(_module: nn.Module, _inputs: object, output: SparseTensor) -> None:
            into.append(output.features)

        return hook

    handles = [
        plane.register_forward_hook(keep(found[name][number]))  # type: ignore[arg-type]
        for name, block in blocks.items()
        for number, planes in enumerate(block.scales)
        for plane in planes.children()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def pyramid_shares(block: MSCA, planes: Sequence[Sequence[Tensor]]) -> Float32[np.ndarray, "v s"]:
    """How much of the pyramid's weighted sum comes from each scale, in each voxel.

    The sum W_f [T_1; T_3; T_5] with T_1 = X_1 + X_3 + X_5, T_3 = X_3 + X_5, T_5 = X_5 is linear in
    the scales: X_s is weighed by the blocks of W_f up to its own. The share is the length of its
    part over the sum of the lengths of all parts.
    """
    weight = block.fuse.weight.detach()
    count = len(planes)
    parts = weight.reshape(weight.shape[0], count, -1)  # (o, scale, o)
    lengths = []
    for number, features in enumerate(planes):
        summed = torch.stack(list(features)).sum(dim=0)
        taken = parts[:, : number + 1].sum(dim=1)
        lengths.append((summed @ taken.T).norm(dim=1))
    stacked = torch.stack(lengths, dim=1)
    share = stacked / stacked.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return np.asarray(share.float().cpu().numpy(), dtype=np.float32)


def entropy_of(weights: Float32[np.ndarray, "m c"]) -> Float64[np.ndarray, " m"]:
    """Entropy of each row over that of even weights: 1 where all channels weigh the same."""
    values = weights.astype(np.float64)
    logs = np.log(values, out=np.zeros_like(values), where=values > 0)
    return np.asarray(-(values * logs).sum(axis=1) / np.log(values.shape[1]))


def _attention(module: SegmentationModule, prediction: StreetPrediction) -> Part:
    seen = look(module, prediction)
    _, cells = _voxels(module, prediction, prediction.scan.cloud.xyz)
    columns, of_point = np.unique(cells[:, :2], axis=0, return_inverse=True)
    of_point = of_point.reshape(-1)
    arrays: dict[str, np.ndarray] = {"column_cells": columns, "ring_edges_m": np.array(RINGS_M)}
    figures: dict[str, Figure | Picture] = {}
    clouds: dict[str, Callable[[Path], object]] = {}
    rings = {name: _by_range(module, seen, shares) for name, shares in seen.shares.items()}
    for name, weights in seen.weights.items():
        block = name.removesuffix(".body").replace(".", "")
        entropy, top = entropy_of(weights), weights.argmax(axis=1)
        arrays |= {
            f"{block}_column_entropy": entropy,
            f"{block}_column_channel": top,
            f"{block}_scale_share": rings[name],
        }
        title = f"{prediction.name}: channel attention of {block}"
        evenness, channel = entropy[of_point], top[of_point]
        drawn = draw_values(
            prediction.scan.cloud.xyz, evenness, name="entropy (1: even)", title=title
        )
        figures[f"columns_{block}"] = drawn["birds-eye"]
        figures[f"channels_{block}"] = _draw_channels(prediction, channel, title)
        entropies = heat_colours(evenness, limits=value_limits(evenness))
        values = {"entropy": evenness.astype(np.float32), "channel": channel}
        clouds[f"columns_{block}"] = _cloud(module, prediction, entropies, **values)
        channels = channel_table(channel)[channel]
        clouds[f"channels_{block}"] = _cloud(module, prediction, channels, **values)
    config = module.settings.model
    assert isinstance(config, CurbNetConfig)
    figures["scales"] = _draw_scales(prediction, rings, config.scales)
    return Part(arrays=arrays, figures=figures, clouds=clouds)


def _by_range(
    module: SegmentationModule, seen: Seen, shares: Float32[np.ndarray, "v s"]
) -> Float64[np.ndarray, "r s"]:
    """Mean share of each scale in every ring; NaN for a ring without voxels."""
    grid = module.settings.model.grid
    rho = grid.low[0] + (seen.cells[:, 0] + 0.5) * grid.cell[0]
    ring = np.digitize(rho, RINGS_M) - 1
    rows = []
    for number in range(len(RINGS_M) - 1):
        inside = ring == number
        rows.append(
            shares[inside].mean(axis=0) if inside.any() else np.full(shares.shape[1], np.nan)
        )
    return np.array(rows, dtype=np.float64)


def _most_frequent(channel: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " k"]:
    numbers, counts = np.unique(channel, return_counts=True)
    return np.asarray(numbers[np.argsort(-counts, kind="stable")], dtype=np.int64)


def channel_table(channel: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "k 3"]:
    """Colour of each channel: those that most points have differ, the others are grey."""
    order = _most_frequent(channel)
    table = np.full((int(channel.max()) + 1, 3), 110, dtype=np.uint8)
    table[order[: len(CHANNEL_COLOURS)]] = CHANNEL_COLOURS[: len(order)]
    return table


def _draw_channels(
    prediction: StreetPrediction, channel: Int64[np.ndarray, " n"], title: str
) -> Picture:
    legend = [
        (f"channel {number}", (int(r), int(g), int(b)))
        for number, (r, g, b) in zip(_most_frequent(channel), CHANNEL_COLOURS, strict=False)
    ]
    xyz = prediction.scan.cloud.xyz
    caption = Caption(title=f"{title}: the strongest", legend=legend)
    return birds_eye(
        xyz, channel_table(channel)[channel], region=shown_region(xyz), caption=caption
    )


CHANNEL_COLOURS: UInt8[np.ndarray, "k 3"] = np.array(
    [
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
        *((0, 114, 178), (213, 94, 0), (204, 121, 167), (190, 190, 190)),
    ],
    dtype=np.uint8,
)
"""Of the channels that most columns weigh most; all others are grey."""


def _draw_scales(
    prediction: StreetPrediction,
    rings: Mapping[str, Float64[np.ndarray, "r s"]],
    scales: Sequence[int],
) -> Figure:
    middles = (np.array(RINGS_M[:-1]) + np.array(RINGS_M[1:])) / 2
    with style():
        figure = new_figure(width_in=4.2 * len(rings), height_in=3.4)
        for axes, (name, share) in zip(
            figure.subplots(1, len(rings), squeeze=False)[0], rings.items(), strict=True
        ):
            for number, scale in enumerate(scales):
                axes.plot(middles, share[:, number], marker="o", ms=3, label=f"scale {scale}")
            axes.set(
                xlabel="range (m)",
                ylabel="share in the pyramid",
                ylim=(0, 1),
                title=name.removesuffix(".body").replace(".", ""),
            )
            axes.legend(fontsize=7)
        figure.suptitle(prediction.name, fontsize=9)
    return figure
