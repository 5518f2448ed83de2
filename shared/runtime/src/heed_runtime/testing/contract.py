"""The tests that every recipe gets for free: each raises an `AssertionError` that says why."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from heed_runtime.app import App
from heed_runtime.errors import UsageError
from heed_runtime.recipe import Card
from heed_runtime.run import Run
from heed_runtime.settings import from_dict, load_settings, to_dict, to_yaml

QUICK = ("--trainer.max-steps", "2", "--trainer.batch", "2", "--device", "cpu", "--seed", "3")
"""Settings that make a training short."""


def check_card(app: App, system: str) -> None:
    """The card is complete and names the system as the app does."""
    card: Card = app.recipe(system).card
    assert card.name == system, f"card.name is {card.name!r}, the app says {system!r}"
    for item in dataclasses.fields(card):
        if item.name != "notice":  # a system may need no caution
            assert getattr(card, item.name), f"card.{item.name} is empty"
    code, out, _ = spoken(app, "train", system, "--help")
    assert code == 0
    told = " ".join(out.split())
    for text in (card.title, card.verified, card.notice):
        assert text in told, f"train {system} --help does not say: {text}"


def check_settings(app: App, system: str, tmp_path: Path) -> None:
    """Every preset is valid, survives JSON and its own config.yaml, and builds a model."""
    recipe = app.recipe(system)
    assert recipe.presets, "there is no preset"
    for name, make in recipe.presets.items():
        settings = make()
        assert isinstance(settings, recipe.settings), f"preset {name} is of another class"
        assert from_dict(recipe.settings, json.loads(json.dumps(to_dict(settings)))) == settings
        path = tmp_path / f"{name}.yaml"
        path.write_text(to_yaml(settings, system=system), encoding="utf-8")
        assert load_settings(recipe, file=path) == settings, f"preset {name} is not what it wrote"


def check_sample(app: App, system: str, tmp_path: Path, *, seed: int = 3) -> Path:
    """The sample is found in order by `check`, and the same seed writes the same bytes."""
    roots = [tmp_path / "sample", tmp_path / "again"]
    for root in roots:
        call(app, "sample", system, root, "--seed", seed)
    files = [{p.relative_to(r): p.read_bytes() for p in _files(r)} for r in roots]
    assert files[0] == files[1], "the same seed wrote other data"
    call(app, "check", system, roots[0])
    return roots[0]


def check_life(
    app: App,
    system: str,
    data: Path,
    tmp_path: Path,
    *,
    flags: Sequence[str] = (),
    part: str = ".",
) -> Path:
    """Train, resume, evaluate, predict, explain; every result is written and can be read.

    Each gives the notice of the system's card once. The training is what a newcomer types first,
    without data; nothing in the run names the folder in which it was made before it was put in
    place, and it goes on with the data elsewhere.

    Args:
        app: The program.
        system: The system.
        data: The sample, as `check_sample` made it.
        tmp_path: Where to write.
        flags: Settings that make the model small.
        part: What of the data set is predicted and explained.

    Returns:
        The run.
    """
    run = tmp_path / "run"
    words = (*QUICK, *flags)
    first = noticed(app, system, "train", system, "--out", run, *words)
    assert first["steps"] == 2
    for path in run.glob("*.*"):
        assert b".tmp-" not in path.read_bytes(), f"{path.name} names a temporary folder"
    further = ("--data", data, "--trainer.max-steps", 3)
    again = noticed(app, system, "train", system, "--resume", run, *further)
    assert again["steps"] == 3
    for name in ("config.yaml", "metrics.csv", "metrics.json", "curves.png", "environment.json"):
        assert (run / name).stat().st_size > 0, f"{name} is missing"
    scores = noticed(app, system, "evaluate", run, "--split", "val", "--device", "cpu")
    assert scores["metrics"], "evaluate gave no metrics"
    assert scores["n"] > 0
    assert (run / "evaluation" / "val" / "cases.csv").stat().st_size > 0
    predicted = noticed(
        *(app, system, "predict", run, data / part),
        *("--out", tmp_path / "predicted", "--device", "cpu"),
    )
    assert predicted["n"] > 0
    for name in predicted["files"]:
        assert Path(name).stat().st_size > 0, f"{name} is empty"
    explained = noticed(
        *(app, system, "explain", run, data / part),
        *("--out", tmp_path / "explained", "--device", "cpu"),
    )
    suffixes = {Path(name).suffix for name in explained["files"]}
    assert {".npz", ".png"} <= suffixes, f"explain wrote {suffixes}"
    for name in explained["files"]:
        assert Path(name).stat().st_size > 0, f"{name} is empty"
    return run


def check_export(app: App, run: Path, tmp_path: Path) -> None:
    """Both formats are written and agree with the model at all sizes, or are refused in words."""
    opened = Run.open(run, app)
    recipe = app.recipe(opened.system)
    try:
        exportable = recipe.exportable(opened.settings, opened.load_model(recipe))
        refused: Collection[str] = exportable.refused
    except UsageError:
        refused = ("export", "onnx")
    for suffix, kind in (".pt2", "export"), (".onnx", "onnx"):
        if kind in refused:
            call(app, "export", run, "--out", tmp_path / f"model{suffix}", code=2)
            continue
        found = call(app, "export", run, "--out", tmp_path / f"model{suffix}")
        assert len(found["checks"]) >= 2, "exportable has fewer than two examples"
        shapes = {check["input"] for check in found["checks"]}
        assert len(shapes) >= 2, "the examples are all of one size"
        assert all(check["ok"] for check in found["checks"])


def check_recipe(
    app: App,
    system: str,
    tmp_path: Path,
    *,
    flags: Sequence[str] = (),
    part: str = ".",
    export: bool = True,
) -> None:
    """All of the above, one after the other; `export=False` leaves out what takes longest."""
    check_card(app, system)
    check_settings(app, system, tmp_path)
    data = check_sample(app, system, tmp_path)
    run = check_life(app, system, data, tmp_path, flags=flags, part=part)
    if export:
        check_export(app, run, tmp_path)


def call(app: App, *words: object, code: int = 0) -> dict[str, Any]:
    """Run a command line with `--json`, and return the document that it wrote.

    Raises:
        AssertionError: Another exit code, or standard output is not one JSON document.
    """
    return _documented(app, words, code=code)[0]


def noticed(app: App, system: str, *words: object) -> dict[str, Any]:
    """As `call`, of a command that must give the notice of the system's card, once.

    Raises:
        AssertionError: As of `call`, or standard error holds the notice not once.
    """
    document, err = _documented(app, words)
    if notice := app.recipe(system).card.notice:
        assert err.count(notice) == 1, f"{words[0]} does not give the notice once: {notice}\n{err}"
    return document


def refusal(app: App, *words: object) -> str:
    """Run a command line that must be refused, and return the one line that says why.

    Raises:
        AssertionError: Another exit code than 2, a result, a traceback, or not one line.
    """
    code, out, err = spoken(app, *words)
    assert code == 2, err
    assert out == "", out
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    return lines[0]


def spoken(app: App, *words: object) -> tuple[int, str, str]:
    """Run a command line: its exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.call([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def _documented(app: App, words: Sequence[object], *, code: int = 0) -> tuple[dict[str, Any], str]:
    """The document of a command line, empty if it must fail, and its standard error."""
    got, out, err = spoken(app, *words, "--json", "--quiet")
    told = f"{app.name} {' '.join(map(str, words))}: exit code {got}\n{err}"
    assert got == code, told
    if code:
        return {}, err
    document = json.loads(out)
    assert isinstance(document, dict), told
    return document, err


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())
