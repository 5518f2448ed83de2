"""Weights that others trained: official checkpoints of Cylinder3D.

`heed_core.checkpoints` says which files can be read.

| official | ours |
| --- | --- |
| `cylinder_3d_generator.PPmodel.{0; 1, 2; 4, 5; 7, 8; 10}` | `points.norm; points.layers.{0..3}` |
| `cylinder_3d_generator.fea_compression.0` | `points.compress` |
| `cylinder_3d_spconv_seg.downCntx`, `.ReconNet`, `.logits` | `stem`, `context`, `head` |
| `.resBlock2` to `5`: `conv1 bn0, conv1_2 bn0_2` | `down.0` to `3`: `body.first.0`, `.1` |
| `.resBlock2` to `5`: `conv2 bn1, conv3 bn2; pool` | `body.second.0`, `.1`; `pool` |
| `.upBlock0` to `3`: `trans_dilao trans_bn; up_subm` | `up.0` to `3`: `mix`; `unpool` |
| `.upBlock0` to `3`: `conv1 bn1, conv2 bn2, conv3 bn3` | `body.0`, `.1`, `.2` |

A convolution of spconv 2.x is (out, kernel, in), as ours; one of 1.x is (kernel, in, out). The
layout is read off the shapes. A file in the layout of 1.x was trained with the neighbours that
`legacy` describes, and fits only a network with `legacy_rulebooks`.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from heed_core.checkpoints import State, fill, read_state
from heed_core.errors import InputError
from heed_lidar.cylinder3d.legacy import BorrowedNeighbours
from heed_lidar.cylinder3d.network import CylindricalNetwork

PREFIX = re.compile(r"^(module\.)?((cylinder_3d_generator|cylinder_3d_spconv_seg|point|seg)\.)?")


def load_official(network: CylindricalNetwork, path: Path | str) -> None:
    """Fill a network from an official checkpoint.

    Args:
        network: Of the checkpoint's classes and width.
        path: The checkpoint.

    Raises:
        InputError: The file cannot be read; its names or shapes are not those of this network; or
            it was trained with other neighbours than this network has.
    """
    load_official_state(network, read_state(path), path=path)


def load_official_state(
    network: CylindricalNetwork, state: Mapping[str, Tensor], *, path: Path | str | None = None
) -> None:
    """Fill a network from tensors under the official names.

    Args:
        network: Of the checkpoint's classes and width.
        state: The tensors.
        path: The file to name in errors.

    Raises:
        InputError: As for `load_official`; the network is then unchanged.
    """
    found = {PREFIX.sub("", name): tensor for name, tensor in state.items()}
    own = {official_name(name): tensor for name, tensor in network.state_dict().items()}
    version_1 = _of_version_1(found, own)
    if version_1 and not _borrows(network):
        raise InputError(
            "these weights have the layout of spconv 1.x, where convolutions ran with the "
            "neighbours of other kernels",
            path=path,
            remedy="build the network with legacy_rulebooks=True",
        )
    found = {n: _in_our_layout(t, version_1=version_1) for n, t in found.items()}
    fill(network, found, official_name, path=path)


def official_name(name: str) -> str:
    """The official name of one of our parameters or buffers, without its prefix.

    Example:
        >>> official_name("down.0.body.second.1.norm.weight")
        'resBlock2.bn2.weight'
    """
    for pattern, rename in _RULES:
        if match := pattern.fullmatch(name):
            return rename(*match.groups())
    raise ValueError(f"{name!r} is no weight of this network")


def _of_version_1(found: State, own: State) -> bool:
    """Whether all convolutions fit as (kernel, in, out), and not all as (out, kernel, in)."""
    convs = [
        (tensor.shape, own[name].shape)
        for name, tensor in found.items()
        if tensor.ndim == 5 and name in own
    ]
    return any(have != want for have, want in convs) and all(
        (have[4], *have[:4]) == tuple(want) for have, want in convs
    )


def _in_our_layout(tensor: Tensor, *, version_1: bool) -> Tensor:
    if tensor.ndim != 5:
        return tensor
    if version_1:
        return tensor.movedim(-1, 0).contiguous()
    if math.prod(tensor.shape[1:4]) == 1:
        # A kernel of one cell is stored as (out, in), but spconv 2.x reads the memory as (in, out).
        out_channels, in_channels = tensor.shape[0], tensor.shape[4]
        return tensor.reshape(in_channels, out_channels).T.reshape(tensor.shape).clone()
    return tensor


def _borrows(network: CylindricalNetwork) -> bool:
    return any(isinstance(part, BorrowedNeighbours) for part in network.modules())


_BRANCH = {
    ("first", "0", "conv"): "conv1",
    ("first", "0", "norm"): "bn0",
    ("first", "1", "conv"): "conv1_2",
    ("first", "1", "norm"): "bn0_2",
    ("second", "0", "conv"): "conv2",
    ("second", "0", "norm"): "bn1",
    ("second", "1", "conv"): "conv3",
    ("second", "1", "norm"): "bn2",
}
_SUFFIX = ("", "_2", "_3")


def _block(level: str | None) -> str:
    return "downCntx" if level is None else f"resBlock{int(level) + 2}"


_RULES: tuple[tuple[re.Pattern[str], Callable[..., str]], ...] = (
    (re.compile(r"points\.norm\.(.+)"), lambda rest: f"PPmodel.0.{rest}"),
    (
        re.compile(r"points\.layers\.(\d)\.(?:([01])\.)?(\w+)"),
        lambda layer, part, rest: f"PPmodel.{3 * int(layer) + int(part or 0) + 1}.{rest}",
    ),
    (re.compile(r"points\.compress\.(.+)"), lambda rest: f"fea_compression.0.{rest}"),
    (
        re.compile(r"(?:stem|down\.(\d)\.body)\.(first|second)\.([01])\.(conv|norm)\.(.+)"),
        lambda level, *parts: f"{_block(level)}.{_BRANCH[parts[:3]]}.{parts[3]}",
    ),
    (re.compile(r"down\.(\d)\.pool\.(.+)"), lambda level, rest: f"{_block(level)}.pool.{rest}"),
    (re.compile(r"up\.(\d)\.mix\.conv\.(.+)"), lambda n, rest: f"upBlock{n}.trans_dilao.{rest}"),
    (re.compile(r"up\.(\d)\.mix\.norm\.(.+)"), lambda n, rest: f"upBlock{n}.trans_bn.{rest}"),
    (re.compile(r"up\.(\d)\.unpool\.(.+)"), lambda n, rest: f"upBlock{n}.up_subm.{rest}"),
    (
        re.compile(r"up\.(\d)\.body\.(\d)\.(conv|norm)\.(.+)"),
        lambda n, i, kind, rest: f"upBlock{n}.{kind.replace('norm', 'bn')}{int(i) + 1}.{rest}",
    ),
    (re.compile(r"down\.(\d)\.body\.((?:conv|bn).+)"), lambda n, rest: f"{_block(n)}.{rest}"),
    (re.compile(r"up\.(\d)\.body\.((?:conv|bn).+)"), lambda n, rest: f"upBlock{n}.{rest}"),
    (
        re.compile(r"context\.(convs|norms)\.(\d)\.(.+)"),
        lambda kind, i, rest: f"ReconNet.{_gate(kind, int(i))}.{rest}",
    ),
    (re.compile(r"head\.(.+)"), lambda rest: f"logits.{rest}"),
)


def _gate(kind: str, index: int) -> str:
    return f"{'conv1' if kind == 'convs' else 'bn0'}{_SUFFIX[index]}"
