"""The table of prompts: what findings are asked and denied with, several texts per finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from heed_core.errors import InputError
from heed_medical.more.settings import MoreData
from heed_medical.pictures.records import read_rows


def with_prompt_file(data: MoreData) -> MoreData:
    """The settings with the rows of `prompt_file` among their prompts and denials.

    Raises:
        InputError: The file is no table with the columns finding and prompt; a row names no
            finding, an unknown one or one that the settings name too, or says nothing.
    """
    path = data.prompt_file
    if path is None:
        return data
    table = read_rows(path)
    finding, prompt = table.need("finding"), table.need("prompt")
    denial = table.column(["denial"])
    found: dict[str, dict[str, list[str]]] = {"prompts": {}, "denials": {}}
    for place, row in table.numbered():
        texts = {"prompts": row[prompt], "denials": row[denial] if denial else ""}
        _check_row(row[finding], texts, data, place)
        for kind, text in texts.items():
            if text:
                found[kind].setdefault(row[finding], []).append(text)
    if not found["prompts"] and not found["denials"]:
        raise InputError("holds no row", path=path)
    return replace(
        data,
        prompt_file=None,
        prompts=(*data.prompts, *_joined(found["prompts"])),
        denials=(*data.denials, *_joined(found["denials"])),
    )


def _check_row(finding: str, texts: Mapping[str, str], data: MoreData, place: str) -> None:
    """Refuse a row that cannot be used."""
    if not finding:
        raise InputError("names no finding", place=place)
    if data.labels and finding not in data.labels:
        known = ", ".join(data.labels)
        raise InputError(f"names {finding!r}, which is none of the findings {known}", place=place)
    if finding in data.asked:
        raise InputError(f"names {finding!r}, which --data.prompts names too", place=place)
    if not any(texts.values()):
        raise InputError("has no prompt", place=place)
    if any("|" in text for text in texts.values()):
        raise InputError("has '|' in a prompt", place=place, remedy="give each text its own row")


def _joined(texts: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{finding}={'|'.join(some)}" for finding, some in texts.items()]
