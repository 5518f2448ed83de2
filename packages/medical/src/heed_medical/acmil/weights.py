"""Weights of the official ACMIL checkpoints.

A file is a `.safetensors` or a state dict saved by torch. Official names beside ours:

| official | ours |
| --- | --- |
| `dimreduction.fc1` | `reduce` |
| `attention.attention_V.0`, `attention_U.0`, `attention_weights` | `pool.tanh`, `.gate`, `.score` |
| `classifier.T.fc`, `Slide_classifier.fc` | `branch_heads.T`, `head` |
| `classifier.fc` of the networks with one classifier | `head` |
| `q`, `sub_attention.T.q_proj`, `k_proj`, `v_proj` | `pool.queries`, `pool.branches.T.query` ... |
| `sub_attention.T.out_proj`, `layer_norm` | `pool.branches.T.read_out.project`, `.norm` |
| `bag_attention.v_proj`, `out_proj`, `layer_norm` | `pool.bag_value`, `pool.bag_read_out...` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from heed_core.checkpoints import fill, read_state
from heed_medical.acmil.network import MULTI_BRANCH, BagClassifier

NAMED = ("acmil-ga", "acmil-mha", "gated", "mha")
"""The networks that the official code has."""
_PARTS = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "read_out.project": "out_proj",
    "read_out.norm": "layer_norm",
}


def load_official(model: BagClassifier, path: Path) -> None:
    """Fill a network from an official checkpoint.

    Raises:
        InputError: The file cannot be read, or its names or shapes are not those of this network.
        ValueError: The official code has no such network.
    """
    load_official_state(model, read_state(path), path=path)


def load_official_state(
    model: BagClassifier, state: Mapping[str, Tensor], *, path: Path | None = None
) -> None:
    """Fill a network from official names and tensors; nothing changes if they do not fit.

    Raises:
        InputError: Names or shapes are not those of this network.
        ValueError: The official code has no such network.
    """
    fill(model, state, lambda name: official_name(model, name), path=path)


def official_name(model: BagClassifier, name: str) -> str:
    """The official name of one of our tensors.

    Raises:
        ValueError: The official code has no such network.
    """
    kind = model.config.kind
    if kind not in NAMED:
        raise ValueError(f"there are no official weights of kind={kind!r}, only of {NAMED}")
    several = kind in MULTI_BRANCH
    stem, _, leaf = name.rpartition(".")
    fixed = {
        "reduce": "dimreduction.fc1",
        "pool.tanh": "attention.attention_V.0",
        "pool.gate": "attention.attention_U.0",
        "pool.score": "attention.attention_weights",
        "pool.bag_value": "bag_attention.v_proj",
        "pool.bag_read_out.project": "bag_attention.out_proj",
        "pool.bag_read_out.norm": "bag_attention.layer_norm",
        "head": "Slide_classifier.fc" if several else "classifier.fc",
    }
    if name == "pool.queries":
        return "q"
    if stem in fixed:
        return f"{fixed[stem]}.{leaf}"
    if match := re.fullmatch(r"branch_heads\.(\d+)", stem):
        return f"classifier.{match[1]}.fc.{leaf}"
    match = re.fullmatch(r"pool\.branches\.(\d+)\.(.+)", stem)
    assert match is not None, name
    owner = f"sub_attention.{match[1]}" if several else "attention"
    return f"{owner}.{_PARTS[match[2]]}.{leaf}"
