"""Which files a folder holds, and names that tell them apart."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heed_core.folders import files_under, unique_names
from heed_medical.more import studies as more
from heed_medical.more.settings import MoreData
from heed_medical.pictures import layouts as pictures
from heed_medical.pictures.listers import list_folders
from heed_medical.pictures.settings import PictureData
from heed_medical.reports import layouts as reports
from heed_medical.segmentation import layouts as segmentation
from heed_medical.segmentation.settings import SegmentationData


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_files_come_sorted_and_without_hidden_ones(tmp_path: Path):
    wanted = [put(tmp_path / name) for name in ("a/c.png", "a/d/e.png", "b.png")]
    for name in ("._b.png", ".git/b.png", "a/.x/y.png"):
        put(tmp_path / name)
    gone = tmp_path / "gone.png"  # who reads it says so
    gone.symlink_to(tmp_path / "nowhere")
    assert files_under(tmp_path) == sorted([*wanted, gone])
    hidden = tmp_path / ".git"
    assert files_under(hidden) == [hidden / "b.png"]  # who names a hidden folder wants it


def test_links_are_followed_and_may_run_in_circles(tmp_path: Path):
    outside = put(tmp_path / "store" / "x.png").parent
    root = tmp_path / "root"
    put(root / "z" / "y.png")
    (root / "link").symlink_to(outside)
    (root / "z" / "link").symlink_to(outside)
    (root / "a").symlink_to(root / "z")
    (root / "z" / "up").symlink_to(root)
    (outside / "back").symlink_to(root)
    (root / "file.png").symlink_to(outside / "x.png")
    found = [path.relative_to(root).as_posix() for path in files_under(root)]
    assert found == ["file.png", "link/x.png", "z/y.png"]
    (tmp_path / "start").symlink_to(outside)
    start = tmp_path / "start"
    assert files_under(start)[0].is_relative_to(start)


FINDERS: dict[str, Callable[[Path], int]] = {
    "pictures": lambda root: len(pictures.find_inputs([root])),
    "classes": lambda root: len(list_folders(root, PictureData())[0]),
    "studies": lambda root: len(more.find_inputs([root], MoreData())),
    "reports": lambda root: len(reports.find_inputs([root], views=1)),
    "cases": lambda root: len(segmentation.find_inputs([root], SegmentationData())),
}


@pytest.mark.parametrize("finder", FINDERS)
def test_every_search_for_pictures_takes_the_same_files(finder: str, tmp_path: Path):
    put(tmp_path / "store" / "deep" / "x.png")
    put(tmp_path / "store" / "deep" / "._x.png")
    put(tmp_path / "store" / ".trash" / "y.png")
    put(tmp_path / "root" / "cat" / "z.png")
    (tmp_path / "root" / "cat" / "link").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "root" / "cat")
    assert FINDERS[finder](tmp_path / "root") == 2


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/s", "b/t"], ["s", "t"]),
        (["a/s", "b/s", "b/t"], ["a/s", "b/s", "t"]),
        (["x/a/s", "y/a/s"], ["x/a/s", "y/a/s"]),
        (["a/s", "a/s"], ["s", "s_2"]),
        (["a/s", "a/s", "a/s_2"], ["s", "s_2", "s_2_2"]),
        (["a/s", "s"], ["a/s", "{}/s"]),
    ],
)
def test_equal_names_get_their_folders_or_a_number(
    paths: list[str], names: list[str], tmp_path: Path
):
    found = unique_names([Path(path).name for path in paths], [tmp_path / path for path in paths])
    assert found == [name.format(tmp_path.name) for name in names]


@pytest.mark.parametrize("finder", ["pictures", "studies"])
def test_inputs_of_one_name_are_told_apart_by_their_folders(finder: str, tmp_path: Path):
    for name in ("a/images/x.png", "a/images/x-2.png", "b/images/x.png", "b/images/x.jpg"):
        put(tmp_path / name)
    paths = [tmp_path / "a" / "images", tmp_path / "b" / "images"]
    if finder == "pictures":
        names = [found.name for found in pictures.find_inputs(paths)]
        assert names == ["x-2", "x", "x_jpg", "x_png"]
        (tmp_path / "b/images/x.jpg").unlink()
        names = [found.name for found in pictures.find_inputs(paths)]
    else:
        (tmp_path / "b/images/x.jpg").unlink()
        names = [found.name for found in more.find_inputs(paths, MoreData())]
    assert names == ["x-2", "a/images/x", "b/images/x"]


def test_rows_of_one_name_are_numbered_around_other_names(tmp_path: Path):
    rows = [f"{name},{name}.png,,train" for name in ("x", "x-2", "x", "x", "x-2")]
    (tmp_path / "m.csv").write_text("\n".join(["name,xray_path,report,split", *rows]) + "\n")
    names = [study.name for study in more.find_studies(tmp_path / "m.csv", MoreData())]
    assert names == ["x", "x-2", "x-3", "x-4", "x-2-2"]
