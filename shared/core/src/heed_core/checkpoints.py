"""Weights in other people's files: read them safely, fill a network from their names.

A file is a `.safetensors`, or a state dict saved by torch (`.pt`, `.pth`, `.bin`, `.tar`), bare or
under one of the usual keys ("state_dict", "model", ...), with or without the "module." that
`DataParallel` prepends. Only tensors are read: a file that holds other Python objects is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from heed_core.errors import InputError, MissingExtra, reason_of

State = dict[str, Tensor]
"""Tensors by name."""

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net")
MOST_NAMES_SHOWN = 20
BATCH_COUNTER = "num_batches_tracked"  # of no effect in inference, absent from old checkpoints


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of names and values: equal for equal weights, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        rows = tensor.detach().cpu().contiguous().flatten()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_state(path: Path | str) -> State:
    """The tensors of a weights file by name, on the CPU, free of wrappers.

    Raises:
        InputError: No such file, not a weights file, or one that holds more than tensors.
        MissingExtra: A `.safetensors` file without the library safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="give a .safetensors or .pth file")
    try:
        loaded = _parse(path)
    except MissingExtra:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            "is no plain state dict: it is damaged or holds other Python objects than tensors",
            path=path,
            remedy="save model.state_dict() again, best as .safetensors",
        ) from error
    except Exception as error:  # torch's reader lets anything escape from a damaged file
        reason = reason_of(error)
        raise InputError(
            f"cannot be read as weights ({reason})", path=path, remedy="copy the file again"
        ) from error
    tensors = _tensors(loaded)
    if not tensors:
        raise InputError(
            "holds no state dict (names and tensors)", path=path, remedy="save model.state_dict()"
        )
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def fill(
    module: nn.Module,
    found: Mapping[str, Tensor],
    rename: Callable[[str], str],
    *,
    path: Path | str | None = None,
) -> None:
    """Copy tensors into a module if names and shapes agree exactly; else change nothing.

    Args:
        module: Its parameters and buffers are filled.
        found: The tensors under their own names.
        rename: From a name in the module to the name in `found`.
        path: The file to name in errors.

    Raises:
        InputError: Names or shapes are not those of this network.
    """
    own = module.state_dict()
    names = {name: rename(name) for name in own}
    missing = [
        theirs
        for theirs in names.values()
        if theirs not in found and not theirs.endswith(BATCH_COUNTER)
    ]
    unexpected = sorted(set(found) - set(names.values()))
    mismatched = [
        f"{theirs} {tuple(found[theirs].shape)} for {tuple(own[name].shape)}"
        for name, theirs in names.items()
        if theirs in found and found[theirs].shape != own[name].shape
    ]
    problems = [
        f"{len(entries)} {kind} ({_shortened(entries)})"
        for kind, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", mismatched),
        )
        if entries
    ]
    if problems:
        raise InputError(
            "the weights are not those of this network: " + ", ".join(problems),
            path=path,
            remedy="build the network with the settings that the weights were made with",
        )
    module.load_state_dict({n: found.get(theirs, own[n]) for n, theirs in names.items()})


def _parse(path: Path) -> object:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise MissingExtra("safetensors", "safetensors") from None
        return load_file(path)
    with warnings.catch_warnings():  # of an unusual pickle version; what matters is raised
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(loaded: object) -> State:
    if not isinstance(loaded, Mapping):
        return {}
    for key in WRAPPERS:
        if isinstance(loaded.get(key), Mapping):
            return _tensors(loaded[key])
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _shortened(entries: list[str]) -> str:
    shown = ", ".join(entries[:MOST_NAMES_SHOWN])
    return shown if len(entries) <= MOST_NAMES_SHOWN else f"{shown}, ..."
