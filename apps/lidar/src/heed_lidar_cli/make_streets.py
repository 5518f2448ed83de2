"""Make a data set of ray-cast streets with true labels and curb lines, of any size and sensor.

It has the layout and the classes of 3D-Curb, as what `sample` writes: the sequences 00, 02 and 11
are its training, validation and test scans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from heed_core.errors import InputError
from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_runtime.files import atomic_folder
from heed_runtime.options import CommonOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App

SEQUENCES = {"train": "00", "val": "02", "test": "11"}
"""Of each split, in the official split of 3D-Curb."""
MOST_SCANS = 100_000


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """How many scans, of which streets, by which sensor."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder to make; it is written as a whole or not at all."""
    train: int = 64
    """Scans for training."""
    val: int = 16
    """Scans for validation."""
    test: int = 16
    """Scans for the test."""
    frames_per_street: int = 1
    """Consecutive scans of one street; merge needs several."""
    frame_step_m: float = 2.0
    """Way between two of them."""
    curb_height_m: float | None = None
    """Height of every curb. None: 0.06 to 0.18 at random."""
    sensor: Sensor = field(default_factory=Sensor)
    seed: int = 0
    """The same seed makes the same scans, and a larger set begins with those of a smaller one."""

    def __post_init__(self) -> None:
        for split in SEQUENCES:
            if not 0 <= getattr(self, split) <= MOST_SCANS:
                raise ValueError(
                    f"{split} must be within 0..{MOST_SCANS}, got {getattr(self, split)}"
                )
        if not any(self.counts.values()):
            raise ValueError("train, val and test are all 0: there is nothing to make")
        _ = self.scenes

    @property
    def counts(self) -> dict[str, int]:
        """Scans of each split."""
        return {split: getattr(self, split) for split in SEQUENCES}

    @property
    def scenes(self) -> SceneSet:
        """What is written."""
        return SceneSet(
            sequences={SEQUENCES[split]: count for split, count in self.counts.items() if count},
            frames_per_street=self.frames_per_street,
            frame_step_m=self.frame_step_m,
            sensor=self.sensor,
            curb_height_m=self.curb_height_m,
            seed=self.seed,
        )


def run(app: App, options: Options) -> Result:
    """Draw the streets and cast the rays, scan by scan."""
    if options.out.is_dir() and any(options.out.iterdir()):
        raise InputError("is not empty", path=options.out, remedy="choose another folder")
    total = sum(options.counts.values())
    with (
        options.terminal.progress("make", total) as progress,
        atomic_folder(options.out) as folder,
    ):
        write_scenes(folder, options.scenes, on_scan=lambda _: progress.advance())
    rows: list[Row] = [
        {"split": split, "sequence": SEQUENCES[split], "scans": count}
        for split, count in options.counts.items()
        if count
    ]
    return Result(
        title=f"{total} made scans",
        tables=[Table(title="", rows=rows)],
        data={"n": total, "folder": str(options.out), "splits": rows},
        files=[options.out],
    )
