"""Fill eccNET from a file of VGG16 weights: torchvision's names or Keras's.

* `.pth`, `.pt`, `.safetensors` with torchvision's names (`features.0.weight`, `classifier.6.bias`);
* `.h5` of Keras (`block1_conv1` ... `predictions`), old or new layout, as a model or its weights;
* `.safetensors` with Keras's names (`block1_conv1.kernel`, `block1_conv1.bias`).

Kernels of Keras are (height, width, in, out), those of torch (out, in, height, width); the first
dense layer of Keras counts pixels before channels. Nothing is executed or unpickled.
"""

from __future__ import annotations

import re
from pathlib import Path

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from heed_core.checkpoints import State, fill, read_state
from heed_core.errors import InputError, reason_of
from heed_gaze.eccnet.network import CONVS, EccNet

CONV_NAMES = tuple(f"block{b}_conv{c}" for b, n in enumerate(CONVS, 1) for c in range(1, n + 1))
_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_DENSE = {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "predictions"}
HDF5 = (".h5", ".hdf5", ".keras.h5")


def load_weights(network: EccNet, path: Path) -> None:
    """Copy the weights of a file into the network; a classifier in the file may be left over.

    Raises:
        InputError: The file cannot be read, is of other names or shapes, or does not fit the
            normalisation of the network (`weights`).
    """
    state = _read_hdf5(path) if path.suffix in HDF5 else read_state(path)
    keras = any(name.startswith("block1_conv1.kernel") for name in state)
    if keras != (network.config.weights == "keras-caffe"):
        right = "keras-caffe" if keras else "torchvision"
        raise InputError(
            f"has the names of {'Keras' if keras else 'torchvision'}, but the pictures would be "
            f"normalised for {network.config.weights!r}",
            path=path,
            remedy=f"set --model.weights {right}",
        )
    found = _from_keras(state, network) if keras else _from_torchvision(state)
    if network.classifier is None:
        found = {name: x for name, x in found.items() if not name.startswith("classifier.")}
    fill(network, found, lambda name: name, path=path)


def _own(conv: str) -> str:
    return f"blocks.{int(conv[5]) - 1}.{conv}"


def _from_torchvision(state: State) -> State:
    names = {f"features.{n}": _own(c) for n, c in zip(_TORCHVISION, CONV_NAMES, strict=True)}
    found = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        found[f"{names.get(module, module)}.{kind}"] = tensor
    return found


def _from_keras(state: State, network: EccNet) -> State:
    dense = {theirs: ours for ours, theirs in _DENSE.items()}
    found = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        ours = _own(module) if module in CONV_NAMES else dense.get(module, module)
        if kind == "kernel" and module == "fc1":
            tensor = _pixels_last(tensor, network)
        found[f"{ours}.{'weight' if kind == 'kernel' else kind}"] = _turned(tensor)
    return found


def _turned(kernel: Tensor) -> Tensor:
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(kernel.ndim)
    return kernel if axes is None else kernel.permute(axes).contiguous()


def _pixels_last(kernel: Tensor, network: EccNet) -> Tensor:
    """Rows of the first dense layer in torch's order: channel, row, column."""
    side, channels = network.config.map_side, network.config.widths[-1]
    if kernel.ndim != 2 or kernel.shape[0] != side * side * channels:
        return kernel  # `fill` tells that its shape is wrong
    ordered = kernel.view(side, side, channels, -1).permute(2, 0, 1, 3)
    return ordered.reshape(kernel.shape).contiguous()


def _read_hdf5(path: Path) -> State:
    """Kernels and biases by layer, whatever the layout: the last name of a layer's group counts."""
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="give a .h5, .safetensors or .pth file")
    wanted = re.compile(rf"({'|'.join((*CONV_NAMES, *_DENSE.values()))})(?=/|_W|_b|$)")
    found: dict[str, np.ndarray] = {}

    def visit(name: str, item: object) -> None:
        layers = wanted.findall(name)
        if isinstance(item, h5py.Dataset) and layers and "optimizer" not in name:
            values = item[()]
            kind = "kernel" if values.ndim > 1 else "bias"
            found[f"{layers[0]}.{kind}"] = np.asarray(values, dtype=np.float32)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except OSError as error:
        raise InputError(
            f"cannot be read as HDF5 ({reason_of(error)})",
            path=path,
            remedy="copy the file again",
        ) from None
    if not found:
        raise InputError(
            "holds no layer of VGG16 (block1_conv1 ...)", path=path, remedy="give VGG16's weights"
        )
    return {name: torch.from_numpy(values) for name, values in found.items()}
