"""What draws the pictures of scans: our own renderer anywhere, open3d where it can."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_lidar import drawing3d
from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli import APP, diagnoses, view
from heed_runtime.testing.contract import spoken

WITHOUT_GL = """
import sys
BLOCKED = {"open3d", "OpenGL", "pyglet", "vispy", "moderngl", "glfw", "vtk", "pyvista"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Blocked())
from heed_lidar_cli import APP
code = APP.call(sys.argv[1:])
assert "open3d" not in sys.modules
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "libGL" not in maps and "libEGL" not in maps
sys.exit(code)
"""


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    sensor = Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0)
    write_scenes(root, SceneSet(sequences={"00": 1}, sensor=sensor))
    return root / "sequences" / "00" / "velodyne" / "000000.bin"


def test_pictures_need_neither_a_display_nor_opengl(scan: Path, tmp_path: Path):
    hidden = {"DISPLAY", "WAYLAND_DISPLAY", "EGL_PLATFORM", "LIBGL_DRIVERS_PATH", "MPLBACKEND"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    words = ["view", str(scan), "--out", str(tmp_path), "--quiet", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GL, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for name in json.loads(done.stdout)["files"]:
        with Image.open(name) as picture:
            assert picture.format == "PNG"
            assert np.asarray(picture).std() > 5


def test_a_renderer_that_cannot_draw_is_refused_and_told_of_by_doctor(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (view, diagnoses):
        monkeypatch.setattr(module, "why_not_open3d", lambda: "no Vulkan")
    code, out, err = spoken(APP, "view", scan, "--out", tmp_path / "out", "--renderer", "open3d")
    assert (code, out) == (2, "")
    assert "error: open3d cannot draw here: no Vulkan; use --renderer own" in err
    assert not (tmp_path / "out").exists()
    assert [(row["renderer"], row["usable"]) for row in diagnoses.renderers()] == [
        ("own", "yes"), ("open3d", "no"),
    ]  # fmt: skip
    assert diagnoses.renderers()[1]["why"] == "no Vulkan"
    code, _, err = spoken(APP, "view", scan, "--window", "--renderer", "open3d")
    assert (code, "renderer has no effect with window" in err) == (2, True)


def test_open3d_that_is_not_installed_is_told_so(monkeypatch: pytest.MonkeyPatch):
    drawing3d.why_not_open3d.cache_clear()
    monkeypatch.setattr(drawing3d.importlib.util, "find_spec", lambda name: None)
    assert drawing3d.why_not_open3d() == "it is not installed (heed-lidar[open3d])"
    drawing3d.why_not_open3d.cache_clear()


@pytest.mark.slow
def test_open3d_draws_the_view_with_the_legend_of_our_own(scan: Path, tmp_path: Path):
    if (why := drawing3d.why_not_open3d()) is not None:
        pytest.skip(f"open3d cannot draw here: {why}")
    drawn = {}
    for renderer in ("own", "open3d"):
        out = tmp_path / renderer
        code, _, err = spoken(APP, "view", scan, "--out", out, "--renderer", renderer)
        assert code == 0, err
        maps = (out / "000000_birds-eye.png").read_bytes()
        with Image.open(out / "000000_view.png") as picture:
            drawn[renderer] = maps, np.asarray(picture).astype(int)
    assert drawn["own"][0] == drawn["open3d"][0]
    own, other = (picture for _, picture in drawn.values())
    assert own.shape == other.shape
    different = np.abs(own - other).max(-1) > 40
    assert 0 < different.mean() < 0.5
    title = np.s_[:40, :200]
    lit = [(picture[title].min(-1) > 120) for picture in (own, other)]
    assert lit[0].sum() > 20
    assert (lit[0] == lit[1]).mean() > 0.98
