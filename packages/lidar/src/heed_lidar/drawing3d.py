"""Pictures and windows by open3d, an extra: `heed_lidar.drawing` draws without it.

Off screen, open3d needs a variable of the environment before it is imported and kills the process
where OpenGL is missing. So it runs in a process of its own, and what it cannot do is an answer.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from heed_core.errors import InputError, MissingExtra
from heed_lidar.drawing import BACKGROUND, Line, Picture

EXTRA = "heed-lidar[open3d]"
TIME_LIMIT_S = 120


@cache
def why_not_open3d() -> str | None:
    """The reason why open3d cannot draw off screen here, None where it can; found out once."""
    if importlib.util.find_spec("open3d") is None:
        return f"it is not installed ({EXTRA})"
    dot, grey = np.zeros((1, 3)), np.full((1, 3), 128, np.uint8)
    drawn = _render(dot, grey, (-3, 0, 0), (1, 0, 0), 60.0, (64, 48), 3.0, ())
    return drawn if isinstance(drawn, str) else None


def open3d_perspective(
    xyz: Float[np.ndarray, "n 3"],
    colours: UInt8[np.ndarray, "n 3"],
    *,
    eye: tuple[float, float, float] = (-14.0, 0.0, 9.0),
    look_at: tuple[float, float, float] = (12.0, 0.0, -1.5),
    fov_deg: float = 60.0,
    size: tuple[int, int] = (1200, 700),
    point_px: float = 2.5,
    polylines: Sequence[Line] = (),
) -> Picture:
    """The view that `heed_lidar.drawing.perspective` gives, drawn by open3d.

    Args:
        xyz: Metres: x forward, y left, z up.
        colours: Of the points.
        eye: Where the pinhole is, metres.
        look_at: What is in the middle of the picture.
        fov_deg: Horizontal angle of view.
        size: Width and height in pixels.
        point_px: Diameter of a point.
        polylines: Lines in space.

    Raises:
        RuntimeError: open3d cannot draw here; says why.
    """
    drawn = _render(xyz, colours, eye, look_at, fov_deg, size, point_px, polylines)
    if isinstance(drawn, str):
        raise RuntimeError(f"open3d cannot draw here: {drawn}")
    return drawn


def show(
    xyz: Float[np.ndarray, "n 3"],
    colours: UInt8[np.ndarray, "n 3"],
    *,
    polylines: Sequence[Line] = (),
    title: str = "",
) -> None:
    """Open a window in which a person can turn the cloud; comes back when it is closed.

    Raises:
        MissingExtra: open3d is not installed.
        InputError: There is no display.
    """
    try:
        import open3d as o3d  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("open3d", EXTRA) from error
    headless = not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if sys.platform == "linux" and headless:
        raise InputError("there is no display to open a window on", remedy="write pictures instead")
    shapes = [_cloud(o3d, xyz, colours), *(_line_set(o3d, line) for line in polylines)]
    o3d.visualization.draw_geometries(shapes, window_name=title)


def _render(
    xyz: Float[np.ndarray, "n 3"],
    colours: UInt8[np.ndarray, "n 3"],
    eye: Sequence[float],
    look_at: Sequence[float],
    fov_deg: float,
    size: tuple[int, int],
    point_px: float,
    polylines: Sequence[Line],
) -> Picture | str:
    """Draw in another process: the picture, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.npz", Path(folder) / "picture.png"
        data: dict[str, Any] = {f"line{k}": line.points for k, line in enumerate(polylines)}
        inks = np.array([line.colour for line in polylines], np.uint8).reshape(-1, 3)
        camera = np.array([eye, look_at], float)
        view = np.array([fov_deg, *size, point_px])
        np.savez(job, xyz=xyz, colours=colours, camera=camera, view=view, inks=inks, **data)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "heed_lidar.drawing3d", str(job), str(out)],
                env={**os.environ, "EGL_PLATFORM": "surfaceless"},
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"it did not finish in {TIME_LIMIT_S} seconds"
        if done.returncode or not out.is_file():
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return last[0]
        with Image.open(out) as picture:
            return np.asarray(picture.convert("RGB"))


def _draw_job(job: Path, out: Path) -> None:
    """What the other process does."""
    import open3d as o3d

    with np.load(job) as given:
        data = dict(given)
    fov_deg, width, height, point_px = data["view"]
    renderer = o3d.visualization.rendering.OffscreenRenderer(int(width), int(height))
    scene = renderer.scene
    scene.view.set_post_processing(False)
    scene.set_background(np.array([*BACKGROUND, 255]) / 255)
    flat = o3d.visualization.rendering.MaterialRecord()
    flat.shader, flat.point_size = "defaultUnlit", float(point_px)
    scene.add_geometry("points", _cloud(o3d, data["xyz"], data["colours"]), flat)
    thin = o3d.visualization.rendering.MaterialRecord()
    thin.shader, thin.line_width = "unlitLine", 2.5
    for number, ink in enumerate(data["inks"]):
        red, green, blue = (int(part) for part in ink)
        line = Line(points=data[f"line{number}"], colour=(red, green, blue))
        scene.add_geometry(f"line{number}", _line_set(o3d, line), thin)
    eye, look_at = data["camera"]
    horizontal = o3d.visualization.rendering.Camera.FovType.Horizontal
    scene.camera.set_projection(fov_deg, width / height, 0.3, 500.0, horizontal)
    scene.camera.look_at(look_at, eye, (0, 0, 1))
    o3d.io.write_image(str(out), renderer.render_to_image())


def _cloud(
    o3d: ModuleType, xyz: Float[np.ndarray, "n 3"], colours: UInt8[np.ndarray, "n 3"]
) -> Any:
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(xyz))
    cloud.colors = o3d.utility.Vector3dVector(colours / 255)
    return cloud


def _line_set(o3d: ModuleType, line: Line) -> Any:
    pairs = np.stack([np.arange(len(line.points) - 1), np.arange(1, len(line.points))], -1)
    lines = o3d.geometry.LineSet(
        o3d.utility.Vector3dVector(line.points), o3d.utility.Vector2iVector(pairs)
    )
    lines.paint_uniform_color(np.array(line.colour) / 255)
    return lines


if __name__ == "__main__":
    _draw_job(Path(sys.argv[1]), Path(sys.argv[2]))
