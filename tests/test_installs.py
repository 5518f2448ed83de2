"""Each member installs alone, from its wheel, and brings nothing of another domain."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = os.environ.get("UV", "uv")
CONSTRAINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"][
    "constraint-dependencies"
]
NEEDS = {
    "heed-core": {"heed-core"},
    "heed-runtime": {"heed-core", "heed-runtime"},
    "heed-medical": {"heed-core", "heed-medical"},
    "heed-medical-cli": {"heed-core", "heed-runtime", "heed-medical", "heed-medical-cli"},
    "heed-lidar": {"heed-core", "heed-lidar"},
    "heed-lidar-cli": {"heed-core", "heed-runtime", "heed-lidar", "heed-lidar-cli"},
    "heed-gaze": {"heed-core", "heed-gaze"},
    "heed-gaze-cli": {"heed-core", "heed-runtime", "heed-gaze", "heed-gaze-cli"},
    "heed-neuro": {"heed-core", "heed-neuro"},
    "heed-neuro-cli": {"heed-core", "heed-runtime", "heed-neuro", "heed-neuro-cli"},
}
FOREIGN = {
    "heed-core": {"lightning", "tyro", "matplotlib", "monai", "nibabel", "transformers"},
    "heed-runtime": {"monai", "nibabel", "pydicom", "transformers", "spconv-cu120", "open3d"},
    "heed-medical": {"lightning", "tyro", "rich", "spconv-cu120", "open3d", "transformers"},
    "heed-medical-cli": {"spconv-cu120", "open3d", "laspy"},
    "heed-lidar": {"lightning", "tyro", "rich", "matplotlib", "monai", "nibabel", "open3d"},
    "heed-lidar-cli": {"monai", "nibabel", "pydicom", "albumentations", "transformers"},
    "heed-gaze": {"lightning", "tyro", "rich", "monai", "nibabel", "transformers", "himalaya"},
    "heed-gaze-cli": {"monai", "nibabel", "pydicom", "transformers", "himalaya", "spconv-cu120"},
    "heed-neuro": {"lightning", "tyro", "rich", "monai", "transformers", "timm", "nilearn"},
    "heed-neuro-cli": {"monai", "pydicom", "nilearn", "openpyxl", "spconv-cu120", "open3d"},
}
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:  # one that names the extra to install
        if type(error).__name__ != "MissingExtra":
            raise
    print(module.name)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    finished = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheels")
    run(UV, "build", "--quiet", "--all-packages", "--wheel", "--no-sources", "--out-dir", out)
    (out / "constraints.txt").write_text("\n".join(CONSTRAINTS))
    return out


def test_every_member_is_listed_here():
    members = {
        tomllib.loads(path.read_text())["project"]["name"]
        for path in ROOT.glob("*/*/pyproject.toml")
    }
    assert members == set(NEEDS) == set(FOREIGN)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_a_member_installs_alone_and_every_module_imports(name: str, wheels: Path, tmp_path: Path):
    run(UV, "venv", "--quiet", "--python", "3.11", tmp_path / "env")
    python = tmp_path / "env/bin/python"
    pip = [
        UV,
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "--constraints",
        wheels / "constraints.txt",
    ]
    run(*pip, *[wheel for wheel in wheels.glob("*.whl") if distribution(wheel) in NEEDS[name]])
    listed = json.loads(run(UV, "pip", "list", "--python", python, "--format", "json"))
    installed = {entry["name"] for entry in listed}
    assert {found for found in installed if found.startswith("heed-")} == NEEDS[name]
    assert not installed & FOREIGN[name]
    assert run(python, "-c", IMPORT_ALL, name.replace("-", "_"), cwd=tmp_path)
    if name.endswith("-cli"):
        assert "train" in run(
            tmp_path / "env/bin" / name.removesuffix("-cli"), "--help", cwd=tmp_path
        )


def distribution(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-")


def test_resolving_one_domain_brings_nothing_of_another(tmp_path: Path):
    requirement = tmp_path / "pyproject.toml"
    for name, foreign in FOREIGN.items():
        requirement.write_text(
            '[project]\nname = "user"\nversion = "0"\nrequires-python = ">=3.11"\n'
            + f'dependencies = ["{name}"]\n'
            + "[tool.uv]\nenvironments = [\"sys_platform == 'linux'\"]\n"
            + f"constraint-dependencies = {json.dumps(CONSTRAINTS)}\n"
            + "[tool.uv.sources]\n"
            + "".join(
                f"{tomllib.loads((path / 'pyproject.toml').read_text())['project']['name']}"
                f' = {{ path = "{path}", editable = true }}\n'
                for path in (file.parent for file in ROOT.glob("*/*/pyproject.toml"))
            )
        )
        listed = run(UV, "pip", "compile", "--quiet", "--no-annotate", "--no-header", requirement)
        resolved = {line.split("==")[0].strip() for line in listed.splitlines() if "==" in line}
        assert "torch" in resolved
        assert not resolved & foreign, name


@pytest.mark.slow
def test_the_oldest_versions_that_members_allow_go_together(tmp_path: Path):
    for path in (ROOT / "pyproject.toml", *ROOT.glob("*/*/pyproject.toml")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        settings = path.read_text()
        copy.write_text(re.sub(r"constraint-dependencies = \[.*?\n\]\n", "", settings, flags=re.S))
    assert "constraint-dependencies" not in (tmp_path / "pyproject.toml").read_text()
    run(UV, "lock", "--quiet", "--resolution", "lowest-direct", cwd=tmp_path)
    packages = tomllib.loads((tmp_path / "uv.lock").read_text())["package"]
    versions = {package["name"]: package["version"] for package in packages}
    for name, oldest in {"torch": "2.6.0", "monai": "1.5.0"}.items():
        assert versions[name] == oldest
