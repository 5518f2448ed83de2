"""What `doctor` shows of this domain."""

from __future__ import annotations

import torch

from heed_core.sparse import explain_backends
from heed_runtime.recipe import Row


def sparse_backends() -> list[Row]:
    """Which back-end runs sparse convolutions on each device, and why not the others."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        {
            "call": f"{device}, float32",
            "back-end": report.name,
            "used": "yes" if report.chosen else "no",
            "why": report.reason or "what auto takes",
        }
        for device in devices
        for report in explain_backends(device, torch.float32)
    ]
