"""Make features of whole slides: tissue, tiles, a frozen encoder.

Reads slides (svs, tif, ndpi and others that tiffslide opens) and plain pictures, and writes
h5_files/SLIDE.h5 (features, coords) and thumbnails/SLIDE.png, which acmil reads. A slide whose
features are there already is not read again, so that a stopped extraction goes on where it was;
h5_files/settings.yaml says how they were made, and a folder of other settings is refused.
With --tiles the folders hold tiles that were cut already: each folder of pictures is the bag of a
slide, its name is that of the folder, and names such as 1024_2048.png or s_x1024_y2048.png say
where the tiles lie.
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
from heed_medical.slides.features import FOLDER, Extracted, extract, extract_tiles, find_slides
from heed_medical.slides.tiles import TileFolder, find_tile_folders
from heed_medical.slides.tiling import Tiling
from heed_medical.slides.tissue import TissueSearch
from heed_runtime.app import App
from heed_runtime.files import write_yaml
from heed_runtime.options import CommonOptions, Flag
from heed_runtime.recipe import Row, Table
from heed_runtime.settings import read_yaml
from heed_runtime.terminal import Result

SETTINGS = "settings.yaml"


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The flags."""

    slides: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SLIDE")]
    """Slides and pictures, or folders of them; with --tiles folders of tiles."""
    encoder: str
    """A .pt2 file of torch.export, or the name of a timm model."""
    out: Path
    """Where to write."""
    weights: Path | None = None
    """Weights of the timm model. None: untrained ones, from a fixed seed, to try things out."""
    tiles: Flag = False
    """Pictures are tiles of slides, not slides: those of a folder are one bag."""
    tiling: Tiling = field(default_factory=Tiling)
    tissue: TissueSearch = field(default_factory=TissueSearch)
    batch: int = 64
    """Tiles that are encoded at a time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the encoder computes."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a slide that cannot be read does: stop, or be skipped and listed."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.tiles and Tiling(tile=self.tiling.tile) != self.tiling:
            raise ValueError("tiles leaves only tiling.tile to choose: the others have no effect")
        if self.tiles and self.tissue != TissueSearch():
            raise ValueError("tissue has no effect with tiles, which are all used")


def run(app: App, options: Options) -> Result:
    """Extract the features of all slides.

    Raises:
        InputError: There is no slide, one cannot be read, or features that were made with other
            settings are in the folder.
    """
    slides: list[Path] | list[TileFolder]
    slides = find_tile_folders(options.slides) if options.tiles else find_slides(options.slides)
    encoder = load_encoder(options.encoder, weights=options.weights, device=options.device)
    _keep_settings(options)
    if options.weights is None and not options.encoder.endswith(".pt2"):
        options.terminal.warn(
            f"warning: {options.encoder} is untrained: its features serve to try things out, no "
            "more; give trained weights by --weights FILE"
        )
    rows: list[Row] = []
    skipped: list[str] = []
    with options.terminal.progress("features", len(slides)) as progress:
        for slide in slides:
            try:
                rows.append(_one(slide, options, encoder))
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
        **_cutting(options),
    }
    if not any(path.parent.glob("*.h5")):
        write_yaml(path, used, comment="How the features in this folder were made.")
        return
    if not path.exists():
        raise InputError(
            "holds features that were made elsewhere", path=path.parent, remedy="give another --out"
        )
    before = read_yaml(path)
    for name in used | before:
        if before.get(name) != used.get(name):
            raise InputError(
                f"the features there were made with {name} {before.get(name)}, "
                f"not {used.get(name)}",
                path=path,
                remedy="give another --out or the same settings",
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cutting(options: Options) -> dict[str, object]:
    """The settings that decide on the pixels of a tile."""
    if options.tiles:
        return {"tiles": True, "tiling.tile": options.tiling.tile}
    return {
        **{f"tiling.{key}": value for key, value in asdict(options.tiling).items()},
        **{f"tissue.{key}": value for key, value in asdict(options.tissue).items()},
    }


def _one(slide: Path | TileFolder, options: Options, encoder: Encoder) -> Row:
    """The line of one slide, whose features are written if they are not there."""
    name = slide.name if isinstance(slide, TileFolder) else slide.stem
    if (options.out / FOLDER / f"{name}.h5").exists():
        return {"slide": name, "patches": None, "channels": None, "state": "kept"}
    found = _extract(slide, options, encoder)
    return {
        "slide": name,
        "patches": found.patches,
        "channels": found.dim,
        "state": "written",
    }


def _extract(slide: Path | TileFolder, options: Options, encoder: Encoder) -> Extracted:
    tiling, batch = options.tiling, options.batch
    if isinstance(slide, TileFolder):
        return extract_tiles(slide, options.out, encoder, side=tiling.tile, batch=batch)
    return extract(slide, options.out, encoder, tiling=tiling, tissue=options.tissue, batch=batch)
