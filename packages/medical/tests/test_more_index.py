"""Files that are no index of embeddings, each refused with its name and what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from heed_core.errors import InputError
from heed_medical.more.retrieval import EmbeddingIndex, index_of

ROWS = np.eye(3, 4, dtype=np.float32)
Write = Callable[[Path], None]


def tensors(rows: np.ndarray, names: object, key: str = "xray") -> Write:
    metadata = {"names": names if isinstance(names, str) else json.dumps(names)}
    return lambda folder: save_file({key: rows}, folder / "index.safetensors", metadata=metadata)


def arrays(**parts: np.ndarray) -> Write:
    """A file of embeddings, and one of these arrays behind it."""

    def write(folder: Path) -> None:
        np.savez(folder / "a.npz", xray=ROWS[0])
        np.savez(folder / "b.npz", **parts)

    return write


def torn(folder: Path) -> None:
    arrays(xray=ROWS[1])(folder)
    (folder / "b.npz").write_bytes((folder / "b.npz").read_bytes()[:100])


def single(folder: Path) -> None:
    """One array, as np.save writes it."""
    with (folder / "b.npz").open("wb") as file:
        np.save(file, ROWS[0])


NAN = np.full((3, 4), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (tensors(ROWS, {"xray": ["a", "b"]}), "3 vectors of 'xray' have 2 names"),
        (tensors(ROWS, {"ecg": ["a", "b", "c"]}), "3 vectors of 'xray' have 0 names"),
        (tensors(ROWS, "{"), "is no index of embeddings"),
        (tensors(ROWS, 3), "is no index of embeddings"),
        (tensors(ROWS[0], {"xray": ["a"] * 4}), r"'xray' is float32 of shape \(4,\)"),
        (tensors(ROWS.astype(np.int64), {"xray": list("abc")}), "'xray' is int64"),
        (tensors(ROWS, {"weight": list("abc")}, "weight"), "'weight' is float32"),
        (tensors(NAN, {"xray": list("abc")}), "embeddings of 'xray' that are not finite"),
        (arrays(xray=ROWS[0, :3]), "has 3 channels of 'xray', a.npz has 4"),
        (arrays(xray=np.zeros((14, 14))), r"'xray' is float64 of shape \(14, 14\)"),
        (arrays(xray=ROWS[0], words=np.array(["clear"])), "'words' is <U5"),
        (arrays(xray=NAN[0]), "b.npz: has embeddings of 'xray' that are not finite"),
        (torn, "b.npz: is no file of embeddings"),
        (single, "b.npz: is no file of embeddings"),
    ],
)
def test_what_is_no_index_is_refused(write: Write, said: str, tmp_path: Path):
    write(tmp_path)
    file = tmp_path / "index.safetensors"
    with pytest.raises(InputError, match=said):
        EmbeddingIndex.load(file if file.exists() else tmp_path)


def test_an_index_comes_back_as_it_was(tmp_path: Path):
    index = index_of([(name, {"ecg": row}) for name, row in zip("abc", ROWS, strict=True)])
    index.save(tmp_path / "index.safetensors")
    loaded = EmbeddingIndex.load(tmp_path / "index.safetensors")
    assert loaded.names == {"ecg": ["a", "b", "c"]}
    np.testing.assert_array_equal(loaded.vectors["ecg"], ROWS)
