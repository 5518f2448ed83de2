"""Retrieval where one X-ray belongs to several pairs: it counts once, both counts are told."""

import numpy as np
import pytest

from heed_medical.more.prediction import StudyPrediction, retrieval_rows, score_row
from heed_medical.more.retrieval import label_precision

NEAR = np.eye(4, dtype=np.float32)


def test_precision_by_finding_counts_each_item_once():
    gallery = np.stack([NEAR[0], NEAR[0], 0.8 * NEAR[0], 0.5 * NEAR[0]])
    labels = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], dtype=bool)

    def precision(ids: list[str], k: int) -> float:
        return label_precision(
            NEAR[:1], gallery, query_labels=labels[2:3], gallery_labels=labels,
            query_ids=["q"], gallery_ids=ids, k=k,
        )  # fmt: skip

    assert precision(["a", "b", "c", "d"], 2) == 0
    assert precision(["a", "a", "c", "d"], 2) == pytest.approx(1 / 2)
    assert precision(["a", "a", "c", "d"], 3) == pytest.approx(2 / 3)
    assert precision(["a", "a", "c", "d"], 1) == 0


def test_queries_that_are_one_item_ask_once_with_all_their_findings():
    queries = np.stack([NEAR[0], NEAR[0], NEAR[1]])
    labels = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    found = label_precision(
        queries, NEAR[:2], query_labels=labels, gallery_labels=np.array([[0, 1], [1, 0]], bool),
        query_ids=["a", "a", "b"], gallery_ids=["x", "y"],
    )  # fmt: skip
    assert found == 1.0  # the first row alone has the finding of the second answer only


def pairs() -> list[StudyPrediction]:
    """Four pairs: the X-ray of the first three is one file."""
    files = ("one.png", "one.png", "one.png", "two.png")
    return [
        StudyPrediction(
            name=str(n), embeddings={"xray": NEAR[0 if n < 3 else 1], "ecg": NEAR[n]},
            findings={}, items={"xray": files[n], "ecg": f"{n}.hea"},
            labels={"Edema": int(n < 3)},
        )
        for n in range(4)
    ]  # fmt: skip


def test_tables_have_pairs_and_items_apart():
    rows = retrieval_rows([score_row(one) for one in pairs()], ["Edema"])
    there, back = (next(r for r in rows if r["from"] == m) for m in ("xray", "ecg"))
    assert (there["pairs"], there["queries"], there["gallery"]) == (4, 2, 4)
    assert (back["pairs"], back["queries"], back["gallery"]) == (4, 4, 2)
    # ECG 0 finds its X-ray first; 1 is nearer to the other; of equal ones the right comes last
    assert back["recall@1"] == 0.25
    assert back["median rank"] == 2
    # of the two X-rays one has the finding of the ECGs 0, 1 and 2
    assert back["finding precision@1"] == pytest.approx(2 / 3)
    assert back["finding precision@5"] == 0.5
    assert there["finding precision@5"] == 0.75
