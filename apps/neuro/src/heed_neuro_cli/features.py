"""Compute the features of a subject's images once and keep them on disk.

DATA is a subject's folder (Algonauts 2023 or neutral). The cache is continued where an earlier call
was stopped; one of another network or of other images is refused. Train with `--data.cache`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from heed_neuro.brain_encoder.backbones import BackboneConfig
from heed_neuro.brain_encoder.features import describe
from heed_neuro.brain_encoder.source import FeatureSource
from heed_neuro.brain_encoder.subject import read_subject
from heed_runtime.options import CommonOptions, OutPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App

DataPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The subject, the network, the cache."""

    data: DataPath
    """A subject's folder."""
    out: OutPath
    """The cache, a folder per split."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""


def run(app: App, options: Options) -> Result:
    """Compute split by split."""
    import torch

    subject = read_subject(options.data)
    gpu = torch.cuda.is_available() and options.device != "cpu"
    source = FeatureSource(
        config=options.backbone, cache=options.out, device="cuda" if gpu else "cpu"
    )
    rows: list[Row] = []
    for split, images in subject.images.items():
        with options.terminal.progress(f"features {split}", len(images)) as progress:
            table = source.table(split, images, progress.advance)
        shape = " x ".join(map(str, table.shape))
        rows.append({"split": split, "features": shape, "GB": table.nbytes / 1e9})
    made = describe(source.identity())
    files = sorted(path for path in options.out.rglob("*") if path.is_file())
    return Result(
        title=f"features of {made}",
        tables=[Table(title="", rows=rows)],
        data={"backbone": made, "splits": rows},
        files=files,
    )
