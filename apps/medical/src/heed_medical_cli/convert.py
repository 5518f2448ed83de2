"""Convert slide features from any layout that acmil reads to another: clam, trident, acmil ...

Labels, patients and splits go along: beside the features in labels.csv and splits.csv (split.json
for acmil). DATA is a folder or file in the layout of CLAM, TRIDENT or ACMIL, of pt, npy or npz
files, or a csv with a row per patch. acmil keeps float16 (float32 for a bag with a feature beyond
65504); pt and npy lose the coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from heed_core.errors import InputError
from heed_medical.bags.files import read_bag
from heed_medical.bags.listing import known_bags
from heed_medical.bags.settings import BagData
from heed_medical.bags.writing import BagLayout, Read, label_numbers, write_bags
from heed_runtime.files import atomic_folder
from heed_runtime.options import CommonOptions, Flag, OutPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The flags."""

    data_path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """The features, and what else lies with them."""
    to: BagLayout
    """The layout that is written."""
    out: OutPath
    """The folder for it."""
    encoder: str = "features"
    """The name of the encoder in the names of files (trident, acmil)."""
    data: BagData = field(default_factory=BagData)
    """How DATA is read."""
    overwrite: Flag = False
    """Replace the folder."""

    def __post_init__(self) -> None:
        if not self.encoder or "/" in self.encoder:
            raise ValueError(f"encoder must be a name without '/', got {self.encoder!r}")


def run(app: App, options: Options) -> Result:
    """Convert bag by bag; the folder appears when it is complete.

    Raises:
        InputError: There is no bag, or one cannot be read.
    """
    files = known_bags(options.data_path, options.data)
    rows: list[Row] = []
    skipped: list[str] = []
    with (
        atomic_folder(options.out, overwrite=options.overwrite, used=[options.data_path]) as folder,
        options.terminal.progress("convert", len(files)) as progress,
    ):

        def read() -> Iterator[Read]:
            for file in files:
                progress.advance()
                try:
                    bag = read_bag(
                        file, in_dim=options.data.in_dim, patch_size=options.data.patch_size
                    )
                except InputError as error:
                    if options.data.on_error == "stop":
                        raise
                    skipped.append(str(error))
                    continue
                size = dict(zip(("patches", "channels"), bag.features.shape, strict=True))
                rows.append({"slide": file.name, "label": file.label, "split": file.split, **size})
                yield file, bag

        write_bags(read(), folder, options.to, encoder=options.encoder)
        if not rows:
            raise InputError("holds no bag that can be read", path=options.data_path)
    tables = [Table(title="", rows=rows)]
    if skipped:
        tables.append(Table(title="skipped", rows=[{"why": line} for line in skipped]))
    numbers = label_numbers(files) if options.to == "acmil" else {}
    return Result(
        title=f"{len(rows)} slides as {options.to}, {len(skipped)} skipped",
        tables=tables,
        data={"slides": rows, "skipped": skipped, "labels": numbers},
        files=[options.out],
    )
