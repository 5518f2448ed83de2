"""Show versions, devices, back-ends and why each is or is not used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heed_runtime import __version__
from heed_runtime.options import CommonOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    import torch

    from heed_runtime.app import App

INFRASTRUCTURE = ("heed-core", "heed-runtime", "torch", "triton", "lightning", "numpy")

OPTIONAL = {
    "transformers": "observe and steer models of Hugging Face (heed-core[transformers])",
    "tensorboard": "--trainer.logger tensorboard",
    "onnxruntime": "export --format onnx",
    "spconv-cu120": "sparse convolutions (heed-core[sparse])",
}
"""Libraries that a part of the program needs, and which part."""


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """No flags but the common ones."""


def run(app: App, options: Options) -> Result:
    """Versions, devices, attention back-ends, the domain's own tables, optional libraries."""
    tables = [
        Table(title="versions", rows=_versions(app)),
        Table(title="devices", rows=_devices()),
        Table(title="attention back-ends", rows=_backends()),
        *(Table(title=title, rows=_diagnosis(where)) for title, where in app.diagnoses.items()),
        Table(title="optional libraries", rows=_optional(app)),
    ]
    data = {table.title.replace(" ", "_").replace("-", "_"): table.rows for table in tables}
    return Result(title=f"{app.name} {__version__}", tables=tables, data=data)


def _versions(app: App) -> list[Row]:
    scripts = importlib.metadata.entry_points(group="console_scripts", name=app.name)
    owners = [script.dist.name for script in scripts if script.dist is not None]
    names = dict.fromkeys([*INFRASTRUCTURE, *owners, *_requirements(owners)])
    rows: list[Row] = [{"name": "python", "version": platform.python_version()}]
    rows += [{"name": name, "version": version} for name in names if (version := _version(name))]
    return [*rows, {"name": "platform", "version": platform.platform()}]


def _requirements(distributions: list[str]) -> list[str]:
    """What the app's own distributions and the members among these ask for, without extras."""
    found: dict[str, None] = {}
    waiting = list(distributions)
    while waiting:
        for line in importlib.metadata.requires(waiting.pop()) or []:
            name = re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0]
            if "extra ==" in line or name in found:
                continue
            found[name] = None
            if name.startswith("heed-") and _version(name):
                waiting.append(name)
    return list(found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Row]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows: list[Row] = [
        {
            "device": "cpu",
            "usable": "yes",
            "what": f"{platform.machine()}, {cores} cores, torch uses {torch.get_num_threads()}",
        }
    ]
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        why = f"no usable GPU or driver (torch is built {built})"
        return [*rows, {"device": "cuda", "usable": "no", "what": why}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory_gib = facts.total_memory / 2**30
        what = f"{facts.name}, {memory_gib:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        rows.append({"device": f"cuda:{index}", "usable": "yes", "what": what})
    return rows


def _backends() -> list[Row]:
    """Which back-end `attend` picks for a common call on each device, and why not the others."""
    import torch

    calls = [("cpu", torch.float32, False), ("cpu", torch.float32, True)]
    if torch.cuda.is_available():
        calls += [("cuda", dtype, grad) for dtype in _cuda_dtypes() for grad in (False, True)]
    return [row for device, dtype, grad in calls for row in _explain(device, dtype, grad=grad)]


def _cuda_dtypes() -> list[torch.dtype]:
    import torch

    return [torch.float32, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16]


def _explain(device: str, dtype: torch.dtype, *, grad: bool) -> list[Row]:
    import torch

    from heed_core.attend import explain_dispatch

    x = torch.zeros(1, 2, 128, 64, device=device, dtype=dtype, requires_grad=grad)
    call = f"{device}, {str(dtype).removeprefix('torch.')}, {'training' if grad else 'inference'}"
    return [
        {
            "call": call,
            "back-end": report.name,
            "used": "yes" if report.chosen else "no",
            "why": report.reason or "the first that can",
        }
        for report in explain_dispatch(x, x, x)
    ]


def _diagnosis(where: str) -> list[Row]:
    module, _, function = where.partition(":")
    rows: list[Row] = getattr(importlib.import_module(module), function)()
    return rows


def _optional(app: App) -> list[Row]:
    return [
        {"library": name, "installed": _version(name) or "no", "needed for": purpose}
        for name, purpose in (OPTIONAL | dict(app.libraries)).items()
    ]
