"""What a domain adds to the grammar: verbs of its own, and libraries that `doctor` lists."""

import json
import sys
from pathlib import Path

import pytest

from heed_runtime.app import App, Verb
from heed_runtime.testing import APP

VIEW = '''"""Count the letters of a file.

More about it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from heed_core.errors import InputError
from heed_runtime.options import CommonOptions, Flag
from heed_runtime.recipe import Table
from heed_runtime.terminal import Result


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The flags."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """What to read."""
    twice: Flag = False
    """Count each letter twice."""


def run(app, options):
    if not options.file.exists():
        raise InputError("no such file", path=options.file)
    n = len(options.file.read_text()) * (1 + options.twice)
    return Result(title="letters", tables=[Table(title="", rows=[{"n": n}])], data={"n": n})
'''


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    (tmp_path / "heed_letters.py").write_text(VIEW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "heed_letters", raising=False)
    return App(
        name="heed-letters",
        about="Letters.",
        systems=APP.systems,
        verbs={"count": Verb(module="heed_letters", arguments="FILE")},
        libraries={"no-such-library": "counting faster"},
    )


def test_a_verb_of_the_domain_is_listed_without_being_imported(
    app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.call(["--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["count", "FILE", "Count", "the", "letters", "of", "a", "file."] in lines
    assert "heed_letters" not in sys.modules


def test_a_verb_of_the_domain_runs_as_any_other(
    app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.txt").write_text("abc")
    assert app.call(["count", str(tmp_path / "f.txt"), "--twice", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 6, "files": []}
    assert app.call(["count", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: heed-letters count" in shown
    assert "More about it." in shown
    for words, said in (
        (["count", "no.txt"], "no.txt: no such file"),
        (["count"], "missing: FILE"),
        (["cuont"], "did you mean 'count'?"),
        (["count", "f", "--thrice"], "unknown flag --thrice"),
    ):
        assert app.call(words) == 2
        assert said in capsys.readouterr().err


def test_a_verb_of_every_app_is_not_replaced() -> None:
    with pytest.raises(ValueError, match="'train', which every app has"):
        App(name="a", about="", systems={}, verbs={"train": Verb(module="b")})


def test_doctor_shows_the_tables_of_the_domain(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diagnosing.py").write_text("def weather():\n    return [{'sky': 'blue'}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    app = App(name="a", about="", systems={}, diagnoses={"the sky": "diagnosing:weather"})
    assert app.call(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["the_sky"] == [{"sky": "blue"}]


def test_doctor_lists_the_libraries_of_the_domain(
    app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.call(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["optional_libraries"]
    assert {
        "library": "no-such-library",
        "installed": "no",
        "needed for": "counting faster",
    } in rows
