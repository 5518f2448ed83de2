"""What is predicted of a study, the files in which it is written, and the scores of many."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from heed_core.errors import InputError
from heed_medical.classification.metrics import average_precision, roc_auc
from heed_medical.more.network import MODALITIES, More
from heed_medical.more.retrieval import label_precision, retrieval_scores
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import introduced

ScoreRow = Mapping[str, str | int | float | None]
DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A study of the index that is near."""

    query: str
    """The modality that asked."""
    modality: str
    """The modality that was found."""
    name: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class StudyPrediction:
    """The embeddings of a study, and what they are near to."""

    name: str
    embeddings: Mapping[str, Float32[np.ndarray, " p"]]
    """Unit vectors by modality."""
    findings: Mapping[str, Mapping[str, float]]
    """Modality -> finding -> score of its prompts, as of `Asked`."""
    neighbours: Sequence[Neighbour] = ()
    items: Mapping[str, str]
    """Modality -> what tells equal items: the file, or the report's text."""
    labels: Mapping[str, int | None]
    subject: str = ""
    """Whose it is; empty: not named."""


class Asked(NamedTuple):
    """Unit vectors of the texts that a finding is asked and denied with."""

    prompts: Float32[np.ndarray, "k p"]
    denials: Float32[np.ndarray, "j p"]
    """May be none."""

    def score(self, vector: Float32[np.ndarray, " p"]) -> float:
        """The cosine with the nearest prompt, less that with the nearest denial if there are some.

        The logistic function of the difference is the softmax over both, as CheXzero has it: areas
        under curves are the same.
        """
        best = float((self.prompts @ vector).max())
        return best - float((self.denials @ vector).max()) if len(self.denials) else best


def ask(model: More, data: MoreData, finding: str, modality: Literal["xray", "ecg"]) -> Asked:
    """The texts of a finding, embedded as reports of an X-ray or of an ECG.

    Raises:
        InputError: Nothing is left of its prompts when they are cleaned as reports are.
    """

    def vectors(prompts: Sequence[str]) -> Float32[np.ndarray, "k p"]:
        pairs = [(text, "") if modality == "xray" else ("", text) for text in prompts]
        texts = [text for pair in pairs if (text := introduced(pair)) is not None]
        if not texts:
            return np.zeros((0, model.config.projection), dtype=np.float32)
        with torch.no_grad():
            return model.embed_text(texts, prompt=True).float().cpu().numpy()

    prompts, denials = vectors(data.prompts_of(finding)), vectors(data.denials_of(finding))
    if not len(prompts):
        raise InputError(f"the prompts of {finding!r} hold no words: {data.prompts_of(finding)}")
    return Asked(prompts, denials)


def write_prediction(prediction: StudyPrediction, out: Path) -> list[Path]:
    """Write `<name>.npz` (an array per modality) and `<name>.json` (findings, neighbours)."""
    stem = out / prediction.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    arrays, document = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".npz", ".json"))
    with arrays.open("wb") as file:
        np.savez(file, **dict(prediction.embeddings))  # type: ignore[arg-type]
    content = {
        "study": prediction.name,
        "findings": {
            modality: {name: round(value, DECIMALS) for name, value in found.items()}
            for modality, found in prediction.findings.items()
        },
        "neighbours": [
            {
                "from": n.query,
                "to": n.modality,
                "study": n.name,
                "cosine": round(n.cosine, DECIMALS),
            }
            for n in prediction.neighbours
        ],
    }
    document.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [arrays, document]


def score_row(prediction: StudyPrediction) -> ScoreRow:
    """One line of the table of cases: labels, scores of prompts, and the embeddings themselves.

    Embeddings are base64 of little-endian float32, as `embedding_of` reads them.
    """
    row: dict[str, str | int | float | None] = {"case": prediction.name}
    row |= {f"label {name}": value for name, value in prediction.labels.items()}
    for modality, found in prediction.findings.items():
        row |= {f"{modality} {name}": value for name, value in found.items()}
    for modality in MODALITIES:
        vector = prediction.embeddings.get(modality)
        encoded = None
        if vector is not None:
            encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        row[f"{modality} embedding"] = encoded
        row[f"{modality} item"] = prediction.items.get(modality)
    return row


def embedding_of(row: ScoreRow, modality: str) -> Float32[np.ndarray, " p"] | None:
    """The embedding in a row of `score_row`."""
    text = row.get(f"{modality} embedding")
    if not isinstance(text, str) or not text:
        return None
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def retrieval_rows(rows: Sequence[ScoreRow], findings: Sequence[str]) -> list[ScoreRow]:
    """How well each modality finds each other one: recall, median rank, precision by finding.

    Equal items, such as one X-ray in several pairs, count once: `pairs` are the studies with both
    modalities, `queries` and `gallery` the different items among them.
    """
    labels = np.array([[row.get(f"label {name}") == 1 for name in findings] for row in rows])
    labels = labels.reshape(len(rows), len(findings))
    vectors = {m: [embedding_of(row, m) for row in rows] for m in MODALITIES}
    found: list[ScoreRow] = []
    for one, other in permutations(MODALITIES, 2):
        both = [
            i
            for i in range(len(rows))
            if vectors[one][i] is not None and vectors[other][i] is not None
        ]
        if len(both) < 2:
            continue
        queries = np.stack([vectors[one][i] for i in both])  # type: ignore[misc]
        gallery = np.stack([vectors[other][i] for i in both])  # type: ignore[misc]
        asked = [str(rows[i].get(f"{one} item")) for i in both]
        held = [str(rows[i].get(f"{other} item")) for i in both]
        scores = retrieval_scores(queries, gallery, query_ids=asked, gallery_ids=held)
        precision = partial(
            label_precision, queries, gallery, query_labels=labels[both],
            gallery_labels=labels[both], query_ids=asked, gallery_ids=held,
        )  # fmt: skip
        found.append(
            {
                "from": one,
                "to": other,
                "pairs": len(both),
                "queries": scores.queries,
                "gallery": scores.gallery,
                **{f"recall@{k}": value for k, value in scores.recall.items()},
                "median rank": scores.median_rank,
                **{f"finding precision@{k}": precision(k=k) for k in scores.recall if findings},
            }
        )
    return found


def zero_shot_rows(rows: Sequence[ScoreRow], findings: Sequence[str]) -> list[ScoreRow]:
    """Areas under the ROC and precision-recall curves of each finding, by modality."""
    table: list[ScoreRow] = []
    for modality in ("xray", "ecg"):
        for name in findings:
            known = [
                (float(score), label == 1)
                for row in rows
                if (score := row.get(f"{modality} {name}")) is not None
                and (label := row.get(f"label {name}")) is not None
            ]
            if not known:
                continue
            scores = np.array([score for score, _ in known])
            positive = np.array([label for _, label in known])
            table.append(
                {
                    "modality": modality,
                    "finding": name,
                    "studies": len(known),
                    "positive": int(positive.sum()),
                    "auroc": roc_auc(scores, positive),
                    "auprc": average_precision(scores, positive),
                }
            )
    return table


def call_findings(scores: Float[np.ndarray, "n k"]) -> Int64[np.ndarray, " n"]:
    """The finding that stands out in each row: each column is compared with itself first.

    Cosines with different prompts have different means and spreads, so each column is less its
    mean over the rows, over its deviation. Of equal ones the first is called.
    """
    deviation = scores.std(axis=0)
    scaled = (scores - scores.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    return np.asarray(scaled.argmax(axis=1), dtype=np.int64)


def first_finding_alone(labels: Mapping[str, int | None]) -> Mapping[str, int | None]:
    """One label per study, as the released script has it: the first finding that is present."""
    first = next((name for name, value in labels.items() if value == 1), None)
    return {name: None if value is None else int(name == first) for name, value in labels.items()}


def called_rows(rows: Sequence[ScoreRow], findings: Sequence[str]) -> list[ScoreRow]:
    """How often the finding that stands out is one that a study has, by modality.

    Studies with a known finding count; `by chance` is the mean share of findings that they have.
    """
    table: list[ScoreRow] = []
    for modality in ("xray", "ecg"):
        asked = [row for row in rows if all(f"{modality} {name}" in row for name in findings)]
        there = np.array([[row.get(f"label {n}") == 1 for n in findings] for row in asked])
        if not len(asked) or not there.any():
            continue
        scores = [[float(row[f"{modality} {n}"] or 0.0) for n in findings] for row in asked]
        called = call_findings(np.array(scores))
        some = there.any(axis=1)
        hits = there[np.arange(len(asked)), called][some]
        table.append(
            {
                "modality": modality,
                "studies": int(some.sum()),
                "called right": float(hits.mean()),
                "by chance": float(there[some].mean()),
            }
        )
    return table
