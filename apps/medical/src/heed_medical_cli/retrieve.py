"""Find the studies that are nearest to a text, an X-ray or an ECG, with a run of MoRE.

Queries are files, folders or manifests (as for predict) and any --text. They are searched in
--among: a data set, whose studies are embedded first (--save-index keeps them), an index saved
before, or a folder that predict wrote. Without a query the embeddings are only kept: as .npz they
are the arrays xray, ecg, text (n, p) and xray_names, ecg_names, text_names (n) that any other
program reads. Indices of 20,000 and more vectors are searched by faiss
where it is installed. evaluate tells how well a run finds: recall@k, median rank, precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import tyro

from heed_core.checkpoints import state_digest
from heed_core.errors import InputError
from heed_medical.more.network import MODALITIES, More
from heed_medical.more.prediction import StudyPrediction
from heed_medical.more.retrieval import INDEX_SUFFIXES, EmbeddingIndex, index_of
from heed_medical.more.studies import introduced
from heed_medical_cli.more_embeddings import (
    embed,
    is_index,
    open_more,
    refuse_existing,
    skipped_table,
)
from heed_runtime import engine
from heed_runtime.files import atomic_write, write_csv
from heed_runtime.options import Flag, OptionalPath
from heed_runtime.outputs import expand
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result
from heed_runtime.trained import Trained, UseOptions

if TYPE_CHECKING:
    from heed_runtime.app import App

Inputs = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="INPUT")]


@dataclass(frozen=True, kw_only=True)
class Options(UseOptions):
    """The flags."""

    inputs: Inputs = ()
    """Files, folders or quoted patterns whose studies ask."""
    among: Path
    """A data set, an index, or a folder that predict wrote: where to search."""
    text: tuple[str, ...] = ()
    """Texts that ask, each in quotes."""
    to: Literal["xray", "ecg", "text", "all"] = "all"
    """What is searched for."""
    k: int = 5
    """How many are found."""
    save_index: OptionalPath = None
    """Keep the embeddings of --among in this .safetensors, to search again, or this .npz."""
    out: OptionalPath = None
    """Also write the table to this csv."""
    overwrite: Flag = False
    """Replace these files."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not self.inputs and not self.text:
            if self.save_index is None:
                raise ValueError("a query is needed: an INPUT or --text")
            if self.out is not None:
                raise ValueError(f"out has no effect without an INPUT or --text, got {self.out}")
        if self.save_index is not None and self.save_index.suffix not in INDEX_SUFFIXES:
            suffixes = " or ".join(INDEX_SUFFIXES)
            raise ValueError(f"save_index must be a {suffixes}, got {self.save_index}")


def run(app: App, options: Options, settings: Any) -> Result:
    """Embed, search, show.

    Raises:
        InputError: Something cannot be read, or the index is of another model.
    """
    refuse_existing([options.save_index, options.out], overwrite=options.overwrite)
    trained = open_more(app, options, settings)
    index, skipped = _index(trained, options)
    rows: list[Row] = []
    for name, modality, vector in _queries(trained, options):
        wanted = MODALITIES if options.to == "all" else (options.to,)
        for target in [m for m in wanted if m in index.vectors and m in vector]:
            rows += _nearest(name, modality, vector[target], target, index, options)
    asked = bool(options.inputs or options.text)
    if asked and not rows:
        held = ", ".join(index.vectors)
        raise InputError(f"holds no embeddings of {options.to} ({held})", path=options.among)
    files = []
    if options.save_index is not None:
        with atomic_write(options.save_index) as path:
            index.save(path)
        files.append(options.save_index)
    if options.out is not None:
        files.append(write_csv(options.out, rows))
    counts = {name: len(found) for name, found in index.names.items()}
    held = ", ".join(f"{count} {name}" for name, count in counts.items())
    return Result(
        title=f"nearest among {held}" if asked else f"embeddings of {held}",
        tables=[*([Table(title="", rows=rows)] if asked else []), *skipped_table(skipped)],
        data={"index": counts, "found": rows, "skipped": skipped},
        files=files,
    )


def _index(trained: Trained, options: Options) -> tuple[EmbeddingIndex, Sequence[str]]:
    if is_index(options.among):
        index = EmbeddingIndex.load(options.among)
        index.refuse_other(cast(More, trained.model), options.among)
        return index, ()
    studies = trained.recipe.inputs(trained.settings, [options.among])
    found, skipped = embed(trained, studies, options.terminal, "index")
    made_by = state_digest(trained.model.state_dict())
    return index_of([(one.name, one.embeddings) for one in found], model=made_by), skipped


def _queries(
    trained: Trained, options: Options
) -> Iterator[tuple[str, str, Mapping[str, np.ndarray]]]:
    """Name, modality, and the vector that asks each modality."""
    for text in options.text:
        yield text, "text", _text_vectors(trained, text)
    if not options.inputs:
        return
    studies = trained.recipe.inputs(trained.settings, expand(options.inputs))
    found: Sequence[StudyPrediction] = embed(trained, studies, options.terminal, "queries")[0]
    for one in found:
        for modality, vector in one.embeddings.items():
            yield one.name, modality, dict.fromkeys(MODALITIES, vector)


def _text_vectors(trained: Trained, text: str) -> dict[str, np.ndarray]:
    """A text asks for X-rays as their report, for ECGs as theirs."""
    model = cast(More, trained.model).to(engine.device_of(trained.settings.trainer)).eval()
    if "text" not in model.config.modalities:
        raise InputError("has no text tower, so that --text has no effect", path=trained.run.path)
    pairs = {"xray": introduced((text, "")), "ecg": introduced(("", text))}
    if pairs["xray"] is None or pairs["ecg"] is None:
        raise InputError(f"--text {text!r} is empty")
    vectors = {}
    import torch

    with torch.no_grad():
        for name, pair in pairs.items():
            assert pair is not None
            vectors[name] = model.embed_text([pair], prompt=True)[0].float().cpu().numpy()
    return vectors | {"text": vectors["xray"]}


def _nearest(
    name: str,
    modality: str,
    vector: np.ndarray,
    target: str,
    index: EmbeddingIndex,
    options: Options,
) -> list[Row]:
    cosines, places = index.search(vector[None], target, options.k)
    return [
        {
            "query": name,
            "from": modality,
            "to": target,
            "rank": rank,
            "study": index.names[target][place],
            "cosine": round(float(cosine), 6),
        }
        for rank, (cosine, place) in enumerate(zip(cosines[0], places[0], strict=True), start=1)
    ]
