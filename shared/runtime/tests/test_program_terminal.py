import json
import logging
import re
import warnings
from pathlib import Path

import pytest

from heed_runtime.errors import USER, UsageError, guard, nearest, user_fault
from heed_runtime.recipe import Table
from heed_runtime.terminal import NOTICE, Result, Terminal, logging_to, rows_of

RESULT = Result(
    title="two cases",
    tables=[Table(title="scores", rows=[{"case": "a" * 90, "dice": 0.123456}, {"case": "[b]"}])],
    data={"dice": float("nan"), "n": 2},
    files=[Path("out/a.csv"), Path("out/b.png")],
)


def test_tables_go_to_standard_output_and_the_last_line_names_the_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Terminal().show(RESULT)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == "two cases"
    assert out.splitlines()[-1] == "wrote out/a.csv out/b.png"
    assert "a" * 90 in out
    assert "0.1235" in out
    assert "[b]" in out
    assert "\x1b" not in out


def test_json_is_one_document_with_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(json=True).show(RESULT)
    assert json.loads(capsys.readouterr().out) == {
        "dice": None,
        "n": 2,
        "files": ["out/a.csv", "out/b.png"],
    }


def test_progress_off_a_terminal_is_plain_lines_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Terminal().progress("predict", 3) as progress:
        for _ in range(3):
            progress.advance(note="loss 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["predict 3/3, loss 0.5"]


def test_progress_says_how_far_it_came_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 20.0, 20.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr("heed_runtime.terminal.time.monotonic", lambda: next(now))
    with Terminal().progress("train", 4) as progress:
        progress.advance()
        progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train 1/4, 60 s left"
    assert re.match(r"train 2/4, \d+ s left", lines[1])


def test_quiet_silences_progress_and_news_but_not_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal(quiet=True)
    with terminal.progress("predict", 1) as progress, logging_to(terminal):
        progress.advance()
        terminal.say("news")
        logging.getLogger("heed_core.x").info("news")
        logging.getLogger("heed_core.x").warning("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


def test_the_log_of_the_program_is_shown_and_other_libraries_only_from_warnings_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with logging_to(Terminal()):
        logging.getLogger("heed_runtime.x").info("ours")
        logging.getLogger("heed_medical.x").info("and the domain's")
        logging.getLogger("other").info("theirs")
        logging.getLogger("other").error("broken")
    logging.getLogger("heed_runtime.x").info("after")
    assert capsys.readouterr() == ("", "ours\nand the domain's\nerror: broken\n")


def test_a_warning_of_a_library_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with logging_to(Terminal(quiet=True)):
            warnings.warn("old file format", UserWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "warning: old file format\n")


def test_what_is_no_mere_news_is_shown_once_for_a_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("heed_runtime.x")
    for _ in range(2):
        with logging_to(Terminal(quiet=True)):
            for _ in range(3):
                logger.log(NOTICE, "for research")
                logger.warning("no scale: %s", "a.png")
                logger.warning("no scale: %s", "b.png")
    shown = "for research\nwarning: no scale: a.png\nwarning: no scale: b.png\n"
    assert capsys.readouterr() == ("", 2 * shown)


def test_a_quiet_terminal_still_lets_the_log_file_have_the_news(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log.txt")
    logging.getLogger().addHandler(handler)
    try:
        with logging_to(Terminal(quiet=True)):
            logging.getLogger("heed_runtime.x").info("news")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert (tmp_path / "log.txt").read_text() == "news\n"


def test_rows_of_a_mapping() -> None:
    assert rows_of({"dice": 0.5, "shape": (2, 3)}) == [
        {"name": "dice", "value": 0.5},
        {"name": "shape", "value": "[2, 3]"},
    ]


def test_nearest_name_or_all() -> None:
    assert nearest("widht", ["depth", "width"]) == "did you mean 'width'?"
    assert nearest("zzz", ["depth", "width"]) == "allowed: depth, width"


def test_exit_codes_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def body() -> int:
            raise error

        return guard("heed-x", body)

    assert guard("heed-x", lambda: 0) == 0
    assert guard("heed-x", lambda: 1) == 1
    assert raising(UsageError("no flag", remedy="drop it")) == USER
    assert raising(FileNotFoundError(2, "No such file or directory", "a.csv")) == USER
    assert raising(KeyboardInterrupt()) == 130
    assert raising(KeyboardInterrupt("--resume goes on")) == 130
    assert raising(ZeroDivisionError("division by zero")) == 1
    assert raising(ValueError("bad\nsecond line")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "heed-x: error: no flag; drop it",
        "heed-x: error: a.csv: no such file or directory",
        "heed-x: stopped",
        "heed-x: stopped; --resume goes on",
        "heed-x: internal error: ZeroDivisionError: division by zero; "
        "run again with --debug for the traceback",
        "heed-x: internal error: ValueError: bad; run again with --debug for the traceback",
    ]


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise UsageError("no flag")

    assert guard("heed-x", body, debug=True) == USER
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "heed-x: error: no flag"


class Broken:
    """A data set whose second sample is broken."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        from heed_core.errors import InputError

        if index == 1:
            raise InputError("is truncated", path="scan.nii", remedy="copy it again")
        return index


def test_a_fault_in_a_loader_worker_is_the_original_line() -> None:
    from torch.utils.data import DataLoader

    loader = DataLoader(Broken(), num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="truncated") as caught:
        list(loader)
    assert user_fault(caught.value) == "scan.nii: is truncated; copy it again"


def test_a_closed_pipe_is_no_error() -> None:
    import subprocess
    import sys

    program = (
        "from heed_runtime.errors import guard\n"
        "import sys\n"
        "def body():\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "    return 0\n"
        "sys.exit(guard('heed-x', body))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
