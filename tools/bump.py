"""Give every member one new version: its own, and what it requires of its siblings."""

import re
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
LINES = (
    (r'^version = "{old}"$', 'version = "{new}"'),
    (r'^__version__ = "{old}"$', '__version__ = "{new}"'),
    (r'"(heed-[\w-]+(?:\[[\w,]+\])?)~={old}"', r'"\1~={new}"'),
)
"""Where a version stands, and what takes its place."""


def main(words: list[str]) -> int:
    """Write the version that the command line names."""
    try:
        (word,) = words
        new = Version(word)
    except (ValueError, InvalidVersion):
        print("error: name one version, such as 0.2.0: tools/bump VERSION", file=sys.stderr)
        return 2
    changed = [path for path in files(ROOT) if bump(path, str(new))]
    print(f"{new}: {len(changed)} files")
    return 0


def files(root: Path) -> list[Path]:
    """Every file of a member in which its version stands."""
    members = [path.parent for path in root.glob("*/*/pyproject.toml")]
    inits = [path for member in members for path in member.glob("src/*/__init__.py")]
    return sorted([*(member / "pyproject.toml" for member in members), *inits])


def bump(path: Path, new: str) -> bool:
    """Replace the version in one file; whether it changed."""
    before = after = path.read_text()
    for pattern, put in LINES:
        wanted = re.compile(pattern.format(old=r"[^\"]+"), re.MULTILINE)
        after = wanted.sub(put.format(new=new), after)
    if after != before:
        path.write_text(after)
    return after != before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
