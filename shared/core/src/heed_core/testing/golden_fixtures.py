"""Stored numbers of other implementations: a folder with `fixture.safetensors` and `meta.json`.

Tensors are named `input.*`, `weights.*` (the other implementation's names), `output.*`,
`output64.*` (its float64 run) and `grad.*`, `grad64.*`, the gradients of
`sum(output.y * input.loss_weight)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GoldenFixture:
    """The numbers of one folder, and how far a computation may be from them."""

    tensors: Mapping[str, Tensor]
    measured: Mapping[str, Mapping[str, float]]
    """Of an output or gradient: the largest float32 error of the stored run, the largest value."""
    worst_relative: float
    """The largest of these errors relative to the largest value."""

    @classmethod
    def load(cls, folder: Path) -> GoldenFixture:
        """Read a folder."""
        from safetensors.torch import load_file

        tolerance = json.loads((folder / "meta.json").read_text())["tolerance"]
        return cls(
            tensors=load_file(folder / "fixture.safetensors"),
            measured=tolerance["measured"],
            worst_relative=tolerance["worst_relative"],
        )

    def input(self, name: str, dtype: torch.dtype) -> Tensor:
        """A leaf that records its gradient."""
        return self.tensors[f"input.{name}"].clone().to(dtype).requires_grad_()

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The weights whose names begin with a prefix, without it."""
        start = f"weights.{prefix}"
        return {k.removeprefix(start): x for k, x in self.tensors.items() if k.startswith(start)}

    def loss(self, output: Tensor) -> Tensor:
        """The loss whose gradients are stored."""
        return (output * self.tensors["input.loss_weight"].to(output.dtype)).sum()

    def check(self, name: str, found: Tensor) -> None:
        """Compare an output, or with `grad.` in front a gradient, in the type of `found`.

        Raises:
            AssertionError: Another shape, or farther off than the stored run's own rounding allows.
        """
        gradient = name.startswith("grad.")
        exact = self.tensors.get(
            name.replace("grad.", "grad64.") if gradient else f"output64.{name}"
        )
        stored = self.tensors[name if gradient else f"output.{name}"]
        if found.dtype == torch.float64 and exact is not None:
            wanted, allowed = exact, 1e-10 * max(1.0, float(exact.abs().max()))
        else:
            most = float(stored.abs().max())
            error = self.measured.get(name, {}).get("max_abs_diff", self.worst_relative * most)
            wanted, allowed = stored, 20 * error + 1e-6 * most
        assert found.shape == wanted.shape, f"{name}: {tuple(found.shape)}, {tuple(wanted.shape)}"
        off = float((found.detach().double() - wanted.double()).abs().max())
        assert off <= allowed, f"{name}: {off:.2e} off, {allowed:.2e} allowed"
