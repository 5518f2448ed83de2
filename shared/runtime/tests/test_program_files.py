import errno
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

from heed_core.errors import InputError
from heed_runtime import files
from heed_runtime.files import (
    atomic_folder,
    atomic_write,
    make_folder,
    refuse_existing,
    to_csv,
    to_json,
    write_json,
    write_text,
    write_yaml,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("used", ["out/a.csv", "out", "linked"])
def test_a_folder_that_is_read_is_never_replaced(tmp_path, used):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.csv").write_text("1")
    (tmp_path / "linked").symlink_to(out / "a.csv")
    told = r"out: holds files that are read here \(.*\); choose another folder"
    with (
        pytest.raises(InputError, match=told),
        atomic_folder(out, overwrite=True, used=[None, tmp_path / used]),
    ):
        raise AssertionError
    assert (out / "a.csv").read_text() == "1"
    with atomic_folder(out, overwrite=True, used=[tmp_path]) as folder:
        (folder / "b.csv").write_text("2")
    assert [path.name for path in out.iterdir()] == ["b.csv"]


def test_a_file_appears_only_when_its_body_is_done(tmp_path: Path) -> None:
    target = tmp_path / "a" / "scores.csv"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.suffix == ".csv"
        assert temporary.parent == target.parent
    assert target.read_text() == "new"
    assert names(target.parent) == ["scores.csv"]


def test_a_body_that_raises_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = write_text(tmp_path / "x.txt", "old")

    def write_half() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_files_get_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        mode = write_text(tmp_path / "x.txt", "").stat().st_mode & 0o777
    finally:
        os.umask(old)
    assert mode == 0o640


@pytest.mark.parametrize("when", ["writing", "before_rename"])
def test_a_kill_leaves_the_old_file_whole(tmp_path: Path, when: str) -> None:
    target = write_text(tmp_path / "x.json", "old")
    program = f"""
        import os, pathlib, signal
        from heed_runtime.files import atomic_write
        with atomic_write(pathlib.Path({str(target)!r})) as temporary:
            with temporary.open("w") as file:
                file.write("half")
                file.flush()
                if {when!r} == "writing":
                    os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -9
    assert target.read_text() == "old"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out" / "x.txt"
    target.parent.mkdir()
    program = f"""
        import pathlib, resource
        from heed_core.errors import InputError
        from heed_runtime.files import write_text
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_text(pathlib.Path({str(target)!r}), "x" * 5000)
        except InputError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{target.parent}: cannot write: the file is larger")
    assert len(done.stdout.splitlines()) == 1
    assert names(target.parent) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_disk_faults_name_the_folder_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "mkstemp", fail)
    with pytest.raises(InputError, match=words) as caught:
        write_text(tmp_path / "x.txt", "x")
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "; " in str(caught.value)


def test_a_fault_with_a_file_elsewhere_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = tmp_path / "in" / "scan.nii"

    def copy() -> None:
        with atomic_write(tmp_path / "out" / "x.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))

    with pytest.raises(PermissionError, match=r"scan\.nii"):
        copy()


def test_other_os_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(files.tempfile, "mkstemp", fail)
    with pytest.raises(OSError, match="broken disk"):
        write_text(tmp_path / "x.txt", "x")


def test_a_folder_without_permission() -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        closed = Path(base, "closed")
        closed.mkdir(mode=0o555)
        if root:  # root may write everywhere; nobody may not
            os.seteuid(65534)
        try:
            with pytest.raises(InputError, match="no permission to write here"):
                make_folder(closed / "run")
            with pytest.raises(InputError, match="no permission to write here"):
                write_text(closed / "x.txt", "x")
        finally:
            if root:
                os.seteuid(0)


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, a folder is needed"):
        make_folder(tmp_path / "file")
    with pytest.raises(InputError, match="a part of the path is a file"):
        make_folder(tmp_path / "file" / "run")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(tmp_path) == ["run"]


def test_a_folder_whose_body_raises_does_not_appear(tmp_path: Path) -> None:
    def make_half() -> None:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        make_half()
    assert names(tmp_path) == []


def test_a_folder_that_holds_something_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    with atomic_folder(target) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(InputError, match=r"is not empty; .*--overwrite"), atomic_folder(target):
        pytest.fail("must not start")
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(target, overwrite=True):
        raise RuntimeError("stop")
    assert names(target) == ["old"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("1")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["run"]


def test_a_folder_that_another_program_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def fill() -> None:
        with atomic_folder(path):
            write_text(path / "theirs", "x")

    with pytest.raises(InputError, match="another program wrote here"):
        fill()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "theirs"]


def test_the_working_directory_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "run" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for path in (Path(), Path(".."), inner.parent):
        with pytest.raises(InputError, match="the folder that you are in"):
            refuse_existing(path, overwrite=True)
    refuse_existing(Path("new"), overwrite=False)


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("1")

    def lose_the_new_one() -> None:
        with atomic_folder(target, overwrite=True) as folder:
            folder.rmdir()

    with pytest.raises(FileNotFoundError):
        lose_the_new_one()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["run"]


def test_json_has_no_nan_and_knows_arrays_and_paths() -> None:
    data = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "half": np.float32(0.5),
        "many": np.arange(3),
        "path": Path("a/b"),
        "pair": (1, None),
        "yes": np.bool_(True),
    }
    assert json.loads(to_json(data)) == {
        "nan": None,
        "inf": None,
        "half": 0.5,
        "many": [0, 1, 2],
        "path": "a/b",
        "pair": [1, None],
        "yes": True,
    }
    with pytest.raises(TypeError, match="object"):
        to_json({"x": object()})


def test_written_documents_read_back(tmp_path: Path) -> None:
    data = {"b": 1, "a": ["x", 2.5]}
    assert json.loads(write_json(tmp_path / "x.json", data).read_text()) == data
    text = write_yaml(tmp_path / "x.yaml", data, comment="two\nlines").read_text()
    assert text.startswith("# two\n# lines\nb: 1\n")
    assert yaml.safe_load(text) == data


def test_csv_takes_the_union_of_columns_and_leaves_missing_fields_empty() -> None:
    rows = [{"case": "a,b", "dice": 0.5}, {"case": "c", "dice": float("nan"), "note": None}]
    assert to_csv(rows) == 'case,dice,note\n"a,b",0.5,\nc,,\n'
