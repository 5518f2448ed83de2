"""Arrays in files: whole, damaged, longer in words than in bytes."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from heed_core.arrays import load_array, load_arrays
from heed_core.errors import InputError
from heed_core.testing.damage import check_readers


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5)])
@pytest.mark.parametrize("kind", [np.float32, np.int64, "U5", [("x", "f4"), ("y", "i2")]])
def test_whole_files(tmp_path: Path, shape: tuple[int, ...], kind: type):
    wanted = np.zeros(shape, kind)
    np.save(tmp_path / "a.npy", wanted)
    np.savez_compressed(tmp_path / "a.npz", a=wanted, b=np.arange(3))
    for found in (
        load_array(tmp_path / "a.npy"),
        load_array(tmp_path / "a.npy", mapped=True),
        load_arrays(tmp_path / "a.npz")["a"],
    ):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    assert load_array(tmp_path / "a.npy").flags.writeable
    assert set(load_arrays(tmp_path / "a.npz")) == {"a", "b"}


def test_damaged_files_are_one_line(tmp_path: Path):
    array = np.random.default_rng(0).normal(size=(40, 3))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", array)
    for seed in range(5):
        check_readers(tmp_path / "a.npy", [load_array], seed=seed)
        check_readers(tmp_path / "a.npz", [load_arrays], seed=seed)
        check_readers(tmp_path / "b.npz", [load_arrays], seed=seed)


def test_a_header_that_promises_more_is_refused_before_memory_is_taken(tmp_path: Path):
    header = {"shape": (10**12, 2), "fortran_order": False, "descr": "<f8"}
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1000))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "a.npy")
    with pytest.raises(InputError, match="greater than file size"):
        load_array(tmp_path / "a.npy")
    with pytest.raises(InputError, match="is shorter than its header says"):
        load_arrays(tmp_path / "a.npz")


def test_what_is_missing_or_holds_objects(tmp_path: Path):
    for name, load in ("a.npy", load_array), ("a.npz", load_arrays):
        with pytest.raises(InputError, match="No such file"):
            load(tmp_path / name)
    np.save(tmp_path / "o.npy", np.array([{}], object))
    np.savez(tmp_path / "o.npz", o=np.array([{}], object))
    with pytest.raises(InputError, match="is not a numpy array"):
        load_array(tmp_path / "o.npy")
    with pytest.raises(InputError, match="is not an archive of arrays"):
        load_arrays(tmp_path / "o.npz")
