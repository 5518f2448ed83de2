"""Write what is generated: the tables of systems in the READMEs, the catalogue of mechanisms.

    python tools/docs.py            write them
    python tools/docs.py --check    exit 1 if one is not what the code says

A generated part of a README stands between `<!-- systems -->` and `<!-- /systems -->`.
"""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import catalogue

from heed_runtime.app import App

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- systems -->\n).*?(<!-- /systems -->)", re.DOTALL)
HEADER = (
    "| system | package | command | paper | architecture | trained here on | reproduced |",
    "|---|---|---|---|---|---|---|",
)


def apps() -> list[App]:
    """The apps of the workspace, by the scripts that they own."""
    found = []
    for file in sorted(ROOT.glob("apps/*/pyproject.toml")):
        for target in tomllib.loads(file.read_text())["project"]["scripts"].values():
            found.append(importlib.import_module(target.split(":")[0]).APP)
    return found


def table(chosen: list[App]) -> str:
    """The table of the systems of some apps."""
    rows = []
    for app in chosen:
        for name in app.systems:
            card = app.recipe(name).card
            cells = [
                card.title,
                app.name,
                f"`{app.name} train {name}`",
                card.paper,
                card.verified,
                card.trained,
                card.reproduced,
            ]
            rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join([*HEADER, *rows]) + "\n"


def pages() -> dict[Path, str]:
    """Every page with a generated part, and what it should be."""
    wanted = {ROOT / "README.md": apps()}
    for app in apps():
        domain = app.name.removeprefix("heed-")
        wanted[ROOT / "packages" / domain / "README.md"] = [app]
    readmes = {path: with_table(path.read_text(), chosen) for path, chosen in wanted.items()}
    return {**readmes, catalogue.PAGE: catalogue.page()}


def with_table(page: str, chosen: list[App]) -> str:
    """The page with its generated part renewed."""
    return PART.sub(lambda part: part[1] + table(chosen) + part[2], page)


def main(arguments: list[str]) -> int:
    """Write or check the pages."""
    stale = {
        path: text
        for path, text in pages().items()
        if not path.is_file() or path.read_text() != text
    }
    for path, text in stale.items():
        if "--check" not in arguments:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'stale' if '--check' in arguments else 'written'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
