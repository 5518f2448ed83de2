"""A fault, and what is quoted of a library's, is one short line."""

import pytest

from heed_core.errors import InputError, reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("bad byte\nat 7"), "bad byte"),
        (ValueError("\n\r\n bad byte\r\nat 7"), "bad byte"),
        (ValueError("x" * 500), "x" * 120),
        (EOFError(), "EOFError"),
        (OSError("\x1b[1mdo\x1b[0m this \x1b[38;5;9monly\x1b[m [1m"), "do this only [1m"),
        (OSError("\x1b[0m"), "OSError"),
        (OSError("  \n"), "OSError"),
        (OSError("cannot read 'a/b.png'"), "cannot read"),
        (OSError("'a/b.png'"), "OSError"),
    ],
)
def test_the_reason_of_a_fault(error: Exception, reason: str) -> None:
    assert reason_of(error, "a/b.png") == reason


def test_what_a_damaged_file_holds_breaks_no_line() -> None:
    fault = InputError("has no column 'x1', but x\x0b, \x1b[2Jy\x85, z\u2028", path="a.csv")
    assert str(fault) == "a.csv: has no column 'x1', but x ,  [2Jy , z "
    assert len(str(fault).splitlines()) == 1
