"""Files that are no index of embeddings, each refused with its name and what is wrong."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from heed_core.checkpoints import state_digest
from heed_core.errors import InputError
from heed_medical.more.network import More, small_config
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
        (torn, "b.npz: is not an archive of arrays"),
        (single, "b.npz: is not an archive of arrays"),
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


def test_an_index_of_another_model_is_refused(tmp_path: Path):
    config = small_config()
    model = More(replace(config, modalities=("xray", "ecg")))
    other = copy.deepcopy(model)
    next(other.ecg.parameters()).data += 0.1  # where the projectors stay as they were
    path = tmp_path / "index.safetensors"
    rows = [("a", {"ecg": np.eye(1, config.projection, dtype=np.float32)[0]})]
    index_of(rows, model=state_digest(model.state_dict())).save(path)
    EmbeddingIndex.load(path).refuse_other(model, path)
    with pytest.raises(InputError, match="of another model, which cannot be compared; embed"):
        EmbeddingIndex.load(path).refuse_other(other, path)
    index_of(rows).save(path)  # as it was written before, or of vectors from elsewhere
    EmbeddingIndex.load(path).refuse_other(other, path)
    with pytest.raises(InputError, match="vectors of another width"):
        index_of([("a", {"ecg": ROWS[0]})]).refuse_other(model, path)


@pytest.mark.parametrize("copies", [2, 30])
def test_equal_vectors_are_found_in_their_order(copies: int, monkeypatch: pytest.MonkeyPatch):
    """Also where more are equal than are asked for; faiss takes any of them."""
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    one = rng.normal(size=(10, 8)).astype(np.float32)
    rows = np.tile(one / np.linalg.norm(one, axis=1, keepdims=True), (copies, 1))
    index = EmbeddingIndex(vectors={"ecg": rows}, names={"ecg": [str(i) for i in range(len(rows))]})
    monkeypatch.setattr("heed_medical.more.retrieval.LARGE", 10)
    _, found = index.search(rows[:3], "ecg", 5)
    first = np.arange(3)[:, None] + 10 * np.arange(min(copies, 5))
    assert np.array_equal(found[:, : first.shape[1]], first)
