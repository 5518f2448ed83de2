"""Data sets that are given as the table that lists them, in place of their folder."""

from __future__ import annotations

from pathlib import Path

from heed_core.errors import InputError

TABLE_ENDS = (".csv", ".csv.gz", ".jsonl", ".ndjson")
"""Of the names of tables."""


def is_table(path: Path) -> bool:
    """Whether a file is a csv, csv.gz or jsonl by its name."""
    return path.name.lower().endswith(TABLE_ENDS)


def folder_and_table(
    root: Path, table: str, *, option: str, layout: str = "auto"
) -> tuple[Path, str]:
    """The folder of a data set and its table, whichever of the two the user gave as the data.

    Args:
        root: What the user gave.
        table: The table that the settings name, relative to the folder; empty: none.
        option: The flag that names it, for messages.
        layout: The layout of the settings; a table is in the layout `table` alone.

    Returns:
        Folder and name of a table; anything else as it was given.

    Raises:
        InputError: The data are a table, and the settings name another table or layout.
    """
    if not (root.is_file() and is_table(root)):
        return root, table
    if table and (root.parent / table).resolve() != root.resolve():
        raise InputError(
            f"is a table, and {option} names another ({table})",
            path=root,
            remedy=f"give the folder of the data, or leave {option} out",
        )
    if layout not in ("auto", "table"):
        raise InputError(
            f"is a table and not in the layout {layout}",
            path=root,
            remedy="add --data.layout table, or give the folder of the data",
        )
    return root.parent, root.name
