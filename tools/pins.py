"""Write the exact versions of everything into the root's `[tool.uv] constraint-dependencies`.

The versions that are there now are dropped, except the ones named on the command line; uv
resolves the newest set, and its names, versions and markers (no index addresses) become the
new constraints.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import tomlkit

ROOT = Path(__file__).parents[1]
UV = os.environ.get("UV", "uv")  # uv names itself to the programs that it runs
EXPORT = (
    "export --quiet --all-packages --all-extras --all-groups"
    " --no-emit-workspace --no-hashes --no-annotate --no-header"
)


def main(kept: list[str]) -> None:
    """Resolve with `kept` as the only constraints and write the result."""
    path = ROOT / "pyproject.toml"
    before = path.read_text()
    document = tomlkit.parse(before)
    try:
        write(document, kept, path)
        (ROOT / "uv.lock").unlink(missing_ok=True)
        lines = subprocess.run(
            [UV, *EXPORT.split()], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        pins = simplest([line for line in lines if "==" in line])
        write(document, pins, path)
    except BaseException:
        path.write_text(before)
        raise
    print(f"{len(pins)} versions written to {path.name}")


def simplest(lines: list[str]) -> list[str]:
    """Keep a line's marker only where a package needs different versions in different places."""
    versions = defaultdict(set)
    for line in lines:
        pin = line.split(" ; ")[0]
        versions[pin.split("==")[0]].add(pin)
    return [
        line if len(versions[line.split("==")[0]]) > 1 else line.split(" ; ")[0] for line in lines
    ]


def write(document: tomlkit.TOMLDocument, constraints: list[str], path: Path) -> None:
    """Replace the constraints in the document and save it."""
    array = tomlkit.array()
    array.extend(sorted(constraints))
    array.multiline(multiline=True)
    document["tool"]["uv"]["constraint-dependencies"] = array
    path.write_text(tomlkit.dumps(document))


if __name__ == "__main__":
    main(sys.argv[1:])
