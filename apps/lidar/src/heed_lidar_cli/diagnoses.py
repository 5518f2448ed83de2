"""What `doctor` shows of this domain."""

from __future__ import annotations

import torch

from heed_core.dispatch import BackendReport, UnsupportedBackend
from heed_core.sparse import explain_backends
from heed_lidar.drawing3d import why_not_open3d
from heed_runtime.recipe import Row


def sparse_backends() -> list[Row]:
    """Which back-end runs sparse convolutions on each device, and why not the others."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [row for device in devices for row in _rows(device)]


def renderers() -> list[Row]:
    """What `view --renderer` can be here, and why not."""
    why = why_not_open3d()
    return [
        {"renderer": "own", "usable": "yes", "why": "needs neither a display nor OpenGL"},
        {"renderer": "open3d", "usable": "no" if why else "yes", "why": why or "it drew a point"},
    ]


def _rows(device: str) -> list[Row]:
    """Of one device; where the environment names no back-end, that first."""
    call = f"{device}, float32"
    try:
        reports = explain_backends(device, torch.float32)
    except UnsupportedBackend as error:
        wrong: Row = {"call": call, "back-end": "auto", "used": "no", "why": str(error)}
        could = explain_backends(device, torch.float32, "reference")
        return [wrong, *({**wrong, "back-end": r.name, "why": _could(r)} for r in could)]
    return [
        {
            "call": call,
            "back-end": report.name,
            "used": "yes" if report.chosen else "no",
            "why": report.reason or "what auto takes",
        }
        for report in reports
    ]


def _could(report: BackendReport) -> str:
    return "can run" if report.usable else report.reason
