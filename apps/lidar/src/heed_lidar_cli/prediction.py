"""From scores of one scan to classes, curbs and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from heed_core.errors import InputError
from heed_lidar.clouds.ply import write_ply
from heed_lidar.curves import Curb, fit_curbs, revert_dropped
from heed_lidar.drawing import write_png
from heed_lidar.labels import CURB, OTHERS, LabelMap, write_labels
from heed_lidar.map_files import write_csv, write_geojson, write_osm
from heed_lidar.pictures import draw_scan
from heed_lidar.scans import Scan, raw_by_row
from heed_lidar.settings import to_file_frame
from heed_lidar_cli.settings import NetworkData, Output, StreetData


@dataclass(frozen=True, kw_only=True)
class StreetPrediction:
    """What is said of one scan."""

    name: str
    scan: Scan
    classes: Int64[np.ndarray, " n"]
    """Of each point, as written: curb points that lie on no curve have another class."""
    first: Int64[np.ndarray, " n"]
    """Of each point, before curves were fitted."""
    curb_score: Float[np.ndarray, " n"]
    """Of each point, 0 to 1: how much it is a curb."""
    curbs: tuple[Curb, ...]
    """In the frame of the scan's points."""


def curb_class(label_map: LabelMap) -> int | None:
    """The number of the class of curbs; None where the classes hold none."""
    return label_map.names.index(CURB) if CURB in label_map.names else None


def finish(
    scan: Scan, probabilities: Float[np.ndarray, "n c"], data: NetworkData
) -> StreetPrediction:
    """Choose classes, fit curves to the curb points and clean these.

    Args:
        scan: The points.
        probabilities: Of each class. A row of zeros stands for a point that is not classified.
        data: How curves are fitted.
    """
    first = probabilities.argmax(axis=1).astype(np.int64)
    classes = first
    curb = curb_class(data.label_map)
    score = np.zeros(len(scan), dtype=np.float32)
    curbs: tuple[Curb, ...] = ()
    if curb is not None:
        score = probabilities[:, curb]
        rows = np.flatnonzero(first == curb)
        fit = fit_curbs(scan.cloud.xyz[rows], score[rows], data.curves)
        curbs = fit.curbs
        if data.clean:
            classes = _reverted(first, rows[~fit.kept], probabilities, curb=curb, data=data)
    return StreetPrediction(
        name=scan.name, scan=scan, classes=classes, first=first, curb_score=score, curbs=curbs
    )


def _reverted(
    first: Int64[np.ndarray, " n"],
    dropped: Int64[np.ndarray, " m"],
    probabilities: Float[np.ndarray, "n c"],
    *,
    curb: int,
    data: NetworkData,
) -> Int64[np.ndarray, " n"]:
    if data.revert == "second":
        return revert_dropped(first, dropped, scores=probabilities, curb=curb)
    names = data.label_map.names
    if OTHERS not in names:
        raise InputError(
            f"the labels {data.labels!r} have no class {OTHERS!r} ({', '.join(names)})",
            remedy="use --data.revert second",
        )
    return revert_dropped(first, dropped, others=names.index(OTHERS))


def write_files(prediction: StreetPrediction, out: Path, data: StreetData) -> list[Path]:
    """Write what the settings ask for, as `<name>.label`, `<name>_curbs.csv` ...; the paths.

    None is named as a file of points `<name>` of any format may be.
    """
    (out / prediction.name).parent.mkdir(parents=True, exist_ok=True)
    files = _Files(prediction, out / prediction.name, data)
    writers: dict[Output, Callable[[], Path]] = {
        "label": files.label,
        "ply": files.ply,
        "csv": files.csv,
        "geojson": files.geojson,
        "osm": files.osm,
        "birds-eye": lambda: files.picture("birds-eye"),
        "view": lambda: files.picture("view"),
    }
    return [writers[kind]() for kind in data.write]


class _Files:
    """The files of one scan; points and curbs are in the coordinates of the input's file."""

    def __init__(self, prediction: StreetPrediction, stem: Path, data: StreetData) -> None:
        self.prediction, self.stem, self.data = prediction, stem, data
        self.cloud, self.label_map = prediction.scan.cloud, data.label_map
        self._pictures: dict[str, np.ndarray] = {}

    def label(self) -> Path:
        path = self._path(".label")
        write_labels(path, raw_by_row(self.prediction.classes, self.cloud, self.label_map))
        return path

    def ply(self) -> Path:
        path = self._path("_classes.ply")
        classes = self.prediction.classes
        write_ply(
            path,
            to_file_frame(self.cloud.xyz, self.data, origin=self.cloud.origin),
            colours=self.label_map.colours[classes],
            attributes={
                "class": classes.astype(np.uint8),
                "curb_score": self.prediction.curb_score.astype(np.float32),
            },
        )
        return path

    def csv(self) -> Path:
        return write_csv(self._curbs(), self._path("_curbs.csv"), frame=self.prediction.name)

    def geojson(self) -> Path:
        return write_geojson(
            self._curbs(),
            self._path("_curbs.geojson"),
            origin=self.data.earth,
            frame=self.prediction.name,
            stamp=self.cloud.stamp,
            frame_id=self.cloud.frame_id,
            crs="map" if any(self.cloud.origin) else "sensor",
        )

    def osm(self) -> Path:
        earth = self.data.earth
        assert earth is not None
        return write_osm(self._curbs(), self._path("_curbs.osm"), origin=earth)

    def picture(self, kind: str) -> Path:
        if not self._pictures:
            self._pictures = dict(
                draw_scan(
                    self.cloud.xyz,
                    self.prediction.classes,
                    names=self.label_map.names,
                    colours=self.label_map.colours,
                    curbs=[curb.polyline for curb in self.prediction.curbs],
                    title=self.prediction.name,
                )
            )
        path = self._path(f"_{kind}.png")
        write_png(path, self._pictures["perspective" if kind == "view" else kind])
        return path

    def _path(self, suffix: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{suffix}")

    def _curbs(self) -> Sequence[Curb]:
        def placed(curb: Curb) -> Curb:
            line = to_file_frame(curb.polyline, self.data, origin=self.cloud.origin)
            return replace(curb, polyline=line)

        return [placed(curb) for curb in self.prediction.curbs]
