"""Build the Markdown pages of all members into one site; a warning is an error.

The pages stay where people of the repository read them. A copy of each, at the same place under a
temporary folder, is what Sphinx reads; there a link to a folder leads to the folder's page.
"""

import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
FIRST = ("README.md", "shared/core/README.md", "shared/core/MECHANISMS.md")
"""The order of the first pages; the others follow by name."""
OPTIONS = {
    "project": "heed",
    "extensions": "myst_parser",
    "root_doc": "README",
    "html_theme": "furo",
    "html_title": "heed",
    "myst_heading_anchors": "3",
}


def main(words: list[str]) -> int:
    """Write the site, and say where it begins."""
    out = Path(words[0]) if words else ROOT / "runs" / "site"
    if out.exists():
        print(f"error: {out} exists; remove it, or name another folder", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write(source, pages())
        settings = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        code = build_main(["-W", "-q", "-C", "-b", "html", *settings, folder, str(out)])
    if code:
        shutil.rmtree(out, ignore_errors=True)
        return code
    print(f"wrote {out / 'README.html'}")
    return 0


def pages() -> list[str]:
    """The tracked pages, those that come first first."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    others = sorted(page for page in listed if "/tests/" not in page and page not in FIRST)
    return [*FIRST, *others]


def write(source: Path, chosen: list[str]) -> None:
    """Copy the pages, their links turned to pages, with a table of contents after the first."""
    for page in chosen:
        text = (ROOT / page).read_text()
        text = LINK.sub(lambda link, page=page: f"]({target(page, link[1], chosen)}", text)
        if page == FIRST[0]:
            names = "\n".join(name.removesuffix(".md") for name in chosen[1:])
            text += f"\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        (source / page).write_text(text)


def target(page: str, link: str, chosen: list[str]) -> str:
    """A link of a page; to a folder that has a page: to that page."""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return posixpath.join(link, "README.md") if f"{place}/README.md" in chosen else link


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
