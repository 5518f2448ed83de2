"""The READMEs tell the truth: their commands run as typed, their tables match the recipes."""

import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from heed_runtime.app import App

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*/README.md"))]
PROJECTS = {
    project["name"]: project
    for project in (
        tomllib.loads(path.read_text())["project"] for path in ROOT.glob("*/*/pyproject.toml")
    )
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def name_of(page: Path) -> str:
    return str(page.parent.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]


def commands(page: Path) -> list[str]:
    """The lines of shell blocks that are commands, without their comments."""
    lines = [line for kind, text in blocks(page) if kind == "" for line in text.splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_readme_run_as_typed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        program, *words = command.split()
        if program.startswith("tools/"):
            assert os.access(ROOT / program, os.X_OK), command
        elif program == "pip":
            check_install(command)
        elif program == "uv":
            assert "heed-" in command
        else:
            said = io.StringIO()
            with redirect_stdout(said), redirect_stderr(said):
                code = app_of(program).call(words)
            assert code == 0, f"{command}\n{said.getvalue()}"


def app_of(program: str) -> App:
    """What the installed command `program` calls; here without a new process for each command."""
    targets = {
        name: target.removesuffix(":main").partition(":")
        for project in PROJECTS.values()
        for name, target in project.get("scripts", {}).items()
    }
    module, _, _ = targets[program]
    return importlib.import_module(module).APP


def check_install(command: str) -> None:
    """An install command names a member, and an extra that it has."""
    for word in command.split()[2:]:
        name, _, extra = word.rstrip("]").partition("[")
        assert name in PROJECTS, command
        assert not extra or extra in PROJECTS[name]["optional-dependencies"], command


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_python_of_a_readme_runs(page: Path, tmp_path: Path):
    for kind, text in blocks(page):
        if kind == "python":
            finished = subprocess.run(
                [sys.executable, "-c", text],
                cwd=tmp_path,
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert finished.returncode == 0, f"{text}\n{finished.stderr}"


def test_the_tables_of_systems_are_what_the_recipes_say():
    finished = subprocess.run(
        [sys.executable, "tools/docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_readme_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
