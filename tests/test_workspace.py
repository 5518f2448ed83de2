"""The house keeps its order: versions in lock-step, layers, tracked files."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMBERS = sorted(
    path.parent
    for floor in ("shared", "packages", "apps")
    for path in ROOT.glob(f"{floor}/*/pyproject.toml")
)
ROOT_SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def settings_of(member: Path) -> dict:
    return tomllib.loads((member / "pyproject.toml").read_text())


def module_of(member: Path) -> str:
    return settings_of(member)["tool"]["uv"]["build-backend"]["module-name"]


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_layers_are_kept():
    finished = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout


def test_a_new_member_cannot_be_forgotten():
    linter = ROOT_SETTINGS["tool"]["importlinter"]
    layered = re.findall(r"\w+", " ".join(linter["contracts"][0]["layers"]))
    for member in MEMBERS:
        assert module_of(member) in linter["root_packages"]
        assert module_of(member) in layered
        assert str(member.relative_to(ROOT) / "src") in ROOT_SETTINGS["tool"]["mypy"]["mypy_path"]
        assert settings_of(member)["project"]["name"] in ROOT_SETTINGS["tool"]["uv"]["sources"]


def test_all_members_have_one_version_and_require_each_other_at_it():
    versions = {settings_of(member)["project"]["version"] for member in MEMBERS}
    assert len(versions) == 1
    version = versions.pop()
    for member in MEMBERS:
        project = settings_of(member)["project"]
        init = member / "src" / module_of(member) / "__init__.py"
        assert f'__version__ = "{version}"' in init.read_text()
        requirements = [
            *project["dependencies"],
            *chain.from_iterable(project.get("optional-dependencies", {}).values()),
        ]
        siblings = [line for line in requirements if line.startswith("heed-")]
        assert all(
            re.fullmatch(rf"heed-[\w-]+(\[[\w,]+\])?~={re.escape(version)}", line)
            for line in siblings
        )


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_every_member_is_typed_licensed_and_described(member: Path):
    assert (member / "src" / module_of(member) / "py.typed").exists()
    assert settings_of(member)["project"]["license"] == "Apache-2.0"
    assert len((member / "README.md").read_text().splitlines()) > 10


def test_the_top_level_holds_what_the_architecture_names():
    allowed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "packages",
        "shared",
        "apps",
        "tests",
        "tools",
    }
    names = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in names if not name.startswith(".")} <= allowed


def test_no_file_names_a_package_index_or_a_path_of_one_machine():
    index = re.compile(r"https?://\S+/simple\b|--(extra-)?index-url|find-links")
    home = re.compile(r"(?<![\w/.])/(root|work|home/\w+)/\w+")
    for path in tracked_files():
        if path == Path(__file__) or path.suffix not in {
            ".py",
            ".md",
            ".toml",
            ".yaml",
            ".json",
            ".sh",
            "",
        }:
            continue
        text = path.read_text()
        assert not index.search(text), path
        assert not home.search(text), path


def test_no_tests_folder_is_a_package():
    assert not [
        path for path in tracked_files() if path.name == "__init__.py" and "tests" in path.parts
    ]
