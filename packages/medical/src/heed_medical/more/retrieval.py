"""Find the nearest embeddings of another modality: an index on disk, and how well it finds."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64

from heed_core.arrays import load_arrays
from heed_core.checkpoints import state_digest
from heed_core.errors import InputError, MissingExtra
from heed_core.folders import files_under
from heed_medical.more.network import MODALITIES, More

LARGE = 20_000
"""Rows from which faiss searches, where it is installed."""
INDEX_SUFFIXES = (".safetensors", ".npz")
_BLOCK = 1024
_NAMES, _MODEL = "names", "model"


@dataclass(frozen=True, kw_only=True)
class EmbeddingIndex:
    """Unit vectors by modality, and the studies they are of."""

    vectors: Mapping[str, Float32[np.ndarray, "n p"]]
    names: Mapping[str, Sequence[str]]
    """By modality, of each row."""
    model: str = ""
    """The `state_digest` of the model that made them; empty: not known."""

    def refuse_other(self, model: More, path: Path) -> None:
        """Refuse to compare with the embeddings of another model.

        Raises:
            InputError: `model` did not make the index, which came from `path`.
        """
        width = model.config.projection
        if any(vectors.shape[1] != width for vectors in self.vectors.values()):
            raise InputError("has vectors of another width than the model", path=path)
        if self.model and self.model != state_digest(model.state_dict()):
            raise InputError(
                "holds embeddings of another model, which cannot be compared",
                path=path,
                remedy="embed the studies again with this run",
            )

    def save(self, path: Path) -> None:
        """Write one `.safetensors`, or one `.npz` for other programs.

        The npz holds `<modality>` (n, p) and `<modality>_names` (n) of each modality; it is not
        read again.
        """
        if path.suffix == ".npz":
            lists = {f"{key}_names": np.array(value) for key, value in self.names.items()}
            with path.open("wb") as file:
                np.savez(file, **dict(self.vectors), **lists)  # type: ignore[arg-type]
            return
        from safetensors.numpy import save_file

        names = json.dumps({key: list(value) for key, value in self.names.items()})
        arrays = {name: np.ascontiguousarray(rows) for name, rows in self.vectors.items()}
        save_file(arrays, path, metadata={_NAMES: names, _MODEL: self.model})

    @classmethod
    def load(cls, path: Path) -> EmbeddingIndex:
        """Read what `save` wrote, or a folder of `<name>.npz` with an array per modality.

        Raises:
            InputError: It is neither.
        """
        if path.is_dir():
            return cls._of_folder(path)
        if not path.is_file():
            raise InputError("does not exist", path=path, remedy="predict writes one")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                told = file.metadata() or {}
                names = dict(json.loads(told[_NAMES]))
                vectors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"is no index of embeddings ({error})", path=path) from None
        for key, rows in vectors.items():
            _check(rows, key, path, axes=2)
            if len(names.get(key, ())) != len(rows):
                raise InputError(
                    f"is no index of embeddings ({len(rows)} vectors of {key!r} have "
                    f"{len(names.get(key, ()))} names)",
                    path=path,
                )
        return cls(vectors=vectors, names=names, model=told.get(_MODEL, ""))

    @classmethod
    def _of_folder(cls, folder: Path) -> EmbeddingIndex:
        rows: dict[str, list[np.ndarray]] = {}
        names: dict[str, list[str]] = {}
        for path in (file for file in files_under(folder) if file.suffix == ".npz"):
            for key, vector in load_arrays(path).items():
                _check(vector, key, path, axes=1)
                if key in rows and len(vector) != len(rows[key][0]):
                    raise InputError(
                        f"has {len(vector)} channels of {key!r}, {names[key][0]}.npz has "
                        f"{len(rows[key][0])}",
                        path=path,
                        remedy="give a folder that one run wrote",
                    )
                rows.setdefault(key, []).append(vector)
                name = path.relative_to(folder).with_suffix("").as_posix()
                names.setdefault(key, []).append(name)
        if not rows:
            raise InputError(
                "holds no embeddings (.npz)", path=folder, remedy="predict writes them"
            )
        return cls(vectors={key: np.stack(found) for key, found in rows.items()}, names=names)

    def search(
        self, queries: Float32[np.ndarray, "q p"], modality: str, k: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """The cosines and rows of the nearest, best first; equal ones in the order of rows.

        Raises:
            ValueError: The index has no such modality, or vectors of another width.
        """
        if modality not in self.vectors:
            raise ValueError(f"modality must be of {sorted(self.vectors)}, got {modality!r}")
        rows = self.vectors[modality]
        if queries.shape[1] != rows.shape[1]:
            raise ValueError(f"queries must have {rows.shape[1]} channels, got {queries.shape[1]}")
        k = min(k, len(rows))
        if len(rows) >= LARGE:
            try:
                return _faiss_search(rows, queries, k)
            except MissingExtra:
                pass
        cosines = queries @ rows.T
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cosines, best, axis=1), best


def _check(array: np.ndarray, key: str, path: Path, *, axes: int) -> None:
    """Refuse what is no embedding, such as the arrays that explain writes."""
    if key not in MODALITIES or array.ndim != axes or array.dtype.kind != "f":
        raise InputError(
            f"is no file of embeddings ({key!r} is {array.dtype} of shape {array.shape})", path=path
        )
    if not np.isfinite(array).all():
        raise InputError(f"has embeddings of {key!r} that are not finite", path=path)


def index_of(
    studies: Sequence[tuple[str, Mapping[str, Float32[np.ndarray, " p"]]]], *, model: str = ""
) -> EmbeddingIndex:
    """The index of studies: the name of each, its embeddings by modality, and who made them."""
    rows: dict[str, list[np.ndarray]] = {}
    names: dict[str, list[str]] = {}
    for name, embeddings in studies:
        for modality, vector in embeddings.items():
            rows.setdefault(modality, []).append(vector)
            names.setdefault(modality, []).append(name)
    return EmbeddingIndex(
        vectors={key: np.stack(found) for key, found in rows.items()}, names=names, model=model
    )


def _faiss_search(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        import faiss
    except ImportError:
        raise MissingExtra("faiss", "heed-medical[retrieval]") from None
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(np.ascontiguousarray(rows, dtype=np.float32))
    asked = np.ascontiguousarray(queries)
    wide = k
    while True:  # faiss gives equal ones in any order: look on until all of them are there
        wide = min(2 * wide + 1, len(rows))
        cosines, found = index.search(asked, wide)
        if wide == len(rows) or (cosines[:, -1] < cosines[:, k - 1]).all():
            break
    order = np.lexsort((found, -cosines), axis=1)[:, :k]
    return np.take_along_axis(cosines, order, axis=1), np.take_along_axis(found, order, axis=1)


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """How well one modality finds another."""

    queries: int
    gallery: int
    """Different items of each side; pairs may be more."""
    recall: Mapping[int, float]
    """k -> share of queries that have a right answer among the first k."""
    median_rank: float
    """Of the first right answer; 1 is best."""


def retrieval_scores(
    queries: Float32[np.ndarray, "n p"],
    gallery: Float32[np.ndarray, "n p"],
    *,
    query_ids: Sequence[Hashable],
    gallery_ids: Sequence[Hashable],
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalScores:
    """Search each query among all gallery items; row i of both is a pair.

    Rows with the same id are one item, right for all that it is paired with: an X-ray of several
    ECGs counts once. Among equal cosines the right answer comes last.
    """
    q_first, q_item = _items(query_ids)
    g_first, g_item = _items(gallery_ids)
    right = np.zeros((len(q_first), len(g_first)), dtype=bool)
    right[q_item, g_item] = True
    ranks = []
    for start in range(0, len(q_first), _BLOCK):
        block = slice(start, start + _BLOCK)
        cosines = queries[q_first[block]] @ gallery[g_first].T
        best = np.where(right[block], cosines, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + ((cosines >= best) & ~right[block]).sum(axis=1))
    rank = np.concatenate(ranks)
    return RetrievalScores(
        queries=len(q_first),
        gallery=len(g_first),
        recall={k: float((rank <= k).mean()) for k in ks},
        median_rank=float(np.median(rank)),
    )


def label_precision(
    queries: Float32[np.ndarray, "n p"],
    gallery: Float32[np.ndarray, "m p"],
    *,
    query_labels: Bool[np.ndarray, "n k"],
    gallery_labels: Bool[np.ndarray, "m k"],
    query_ids: Sequence[Hashable],
    gallery_ids: Sequence[Hashable],
    k: int = 1,
) -> float:
    """Share of the first k answers that have a finding of the query, over queries with one.

    Rows of the same id are one item, as in `retrieval_scores`; it has the findings of all of them.
    """
    q_first, q_labels = _labelled_items(query_ids, query_labels)
    g_first, g_labels = _labelled_items(gallery_ids, gallery_labels)
    asked = np.flatnonzero(q_labels.any(axis=1))
    if not len(asked) or not len(g_first):
        return float("nan")
    items = gallery[g_first]
    hits = []
    for start in range(0, len(asked), _BLOCK):
        block = asked[start : start + _BLOCK]
        cosines = queries[q_first[block]] @ items.T
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        shared = (g_labels[best] & q_labels[block][:, None]).any(axis=2)
        hits.append(shared.mean(axis=1))
    return float(np.concatenate(hits).mean())


def _labelled_items(
    ids: Sequence[Hashable], labels: Bool[np.ndarray, "n k"]
) -> tuple[Int64[np.ndarray, " m"], Bool[np.ndarray, "m k"]]:
    """First row of each different id, and the findings of all its rows."""
    first, item = _items(ids)
    found = np.zeros((len(first), labels.shape[1]), dtype=bool)
    np.logical_or.at(found, item, labels)
    return first, found


def _items(ids: Sequence[Hashable]) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " n"]]:
    """First row of each different id, and the item of each row."""
    numbers: dict[Hashable, int] = {}
    item = np.array([numbers.setdefault(i, len(numbers)) for i in ids], dtype=np.int64)
    first = np.unique(item, return_index=True)[1].astype(np.int64)
    return first, item
