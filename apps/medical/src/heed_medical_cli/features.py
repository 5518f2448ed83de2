"""Make features of whole slides: tissue, tiles, a frozen encoder.

Reads slides (svs, tif, ndpi and others that tiffslide opens) and plain pictures, and writes
h5_files/SLIDE.h5 (features, coords) and thumbnails/SLIDE.png, which acmil reads. A slide whose
features are there already is not read again, so that a stopped extraction goes on where it was;
h5_files/settings.yaml says how they were made, and a folder of other settings is refused.
The encoder is a .pt2 file of torch.export, or a timm model with weights from a file; nothing is
downloaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from heed_core.errors import InputError
from heed_medical.slides.encoding import Encoder, load_encoder
from heed_medical.slides.features import FOLDER, extract, find_slides
from heed_medical.slides.tiling import Tiling
from heed_medical.slides.tissue import TissueSearch
from heed_runtime.app import App
from heed_runtime.files import write_yaml
from heed_runtime.options import CommonOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.settings import read_yaml
from heed_runtime.terminal import Result

SETTINGS = "settings.yaml"


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The flags."""

    slides: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SLIDE")]
    """Slides and pictures, or folders of them."""
    encoder: str
    """A .pt2 file of torch.export, or the name of a timm model."""
    out: Path
    """Where to write."""
    weights: Path | None = None
    """Weights of the timm model. None: untrained ones, from a fixed seed, to try things out."""
    tiling: Tiling = field(default_factory=Tiling)
    tissue: TissueSearch = field(default_factory=TissueSearch)
    batch: int = 64
    """Tiles that are encoded at a time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the encoder computes."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a slide that cannot be read does: stop, or be skipped and listed."""


def run(app: App, options: Options) -> Result:
    """Extract the features of all slides.

    Raises:
        InputError: There is no slide, one cannot be read, or features that were made with other
            settings are in the folder.
    """
    paths = find_slides(options.slides)
    encoder = load_encoder(options.encoder, weights=options.weights, device=options.device)
    _keep_settings(options)
    rows: list[Row] = []
    skipped: list[str] = []
    with options.terminal.progress("features", len(paths)) as progress:
        for path in paths:
            try:
                rows.append(_one(path, options, encoder))
            except InputError as error:
                if options.on_error == "stop":
                    raise
                skipped.append(str(error))
            progress.advance()
    lost: list[Row] = [{"why": line} for line in skipped]
    return Result(
        title=f"features of {len(rows)} slides, {len(skipped)} skipped",
        tables=[Table(title=t, rows=r) for t, r in (("", rows), ("skipped", lost)) if r],
        data={"slides": rows, "skipped": skipped},
        files=[options.out],
    )


def _keep_settings(options: Options) -> None:
    """Write down what decides on the features, or refuse a folder of features made otherwise."""
    path = options.out / FOLDER / SETTINGS
    program = options.encoder.endswith(".pt2")
    weights = Path(options.encoder) if program else options.weights
    used = {
        "encoder": Path(options.encoder).name,
        "weights_sha256": None if weights is None else _sha256(weights),
        **{f"tiling.{key}": value for key, value in asdict(options.tiling).items()},
        **{f"tissue.{key}": value for key, value in asdict(options.tissue).items()},
    }
    if not any(path.parent.glob("*.h5")):
        write_yaml(path, used, comment="How the features in this folder were made.")
        return
    if not path.exists():
        raise InputError(
            "holds features that were made elsewhere", path=path.parent, remedy="give another --out"
        )
    before = read_yaml(path)
    for name, value in used.items():
        if before.get(name) != value:
            raise InputError(
                f"the features there were made with {name} {before.get(name)}, not {value}",
                path=path,
                remedy="give another --out or the same settings",
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one(path: Path, options: Options, encoder: Encoder) -> Row:
    """The line of one slide, whose features are written if they are not there."""
    if (options.out / FOLDER / f"{path.stem}.h5").exists():
        return {"slide": path.stem, "patches": None, "channels": None, "state": "kept"}
    found = extract(
        path,
        options.out,
        encoder,
        tiling=options.tiling,
        tissue=options.tissue,
        batch=options.batch,
    )
    return {
        "slide": path.stem,
        "patches": found.patches,
        "channels": found.dim,
        "state": "written",
    }
