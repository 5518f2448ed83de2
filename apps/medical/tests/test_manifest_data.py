"""A table of paths, labels and splits is what `check` and `train` take as data, in every system."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_medical_cli import APP
from heed_runtime.testing.contract import spoken

STEP = ("--trainer.max-steps", "1", "--trainer.batch", "4", "--device", "cpu", "--quiet")
MEDUSA = (
    *("--data.size", "64", "64", "--data.body-size", "32", "32"),
    *("--model.body-widths", "4", "8", "--model.hidden", "8"),
)
TINY = {
    "medusa": MEDUSA,
    "medusa-findings": MEDUSA,
    "acmil": (),
    "ivgn": (
        *("--model.dim", "16", "--model.heads", "2", "--model.hidden", "16", "--model.depth", "1"),
        *("--data.size", "32", "--data.resize", "36", "--data.most-words", "12"),
        *("--data.threshold", "1", "--data.views", "1"),
    ),
    "more": (
        *("--model.tower.depth", "1", "--model.text.depth", "1"),
        *("--model.text.max-tokens", "40"),
    ),
}


def table(system: str, root: Path) -> Path:
    """Twelve cases whose files lie elsewhere: a csv, or a jsonl for every other system."""
    (root / "store").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        path = root / "store" / f"c{number}.{'npy' if system == 'acmil' else 'png'}"
        if system == "acmil":
            np.save(path, rng.normal(size=(3, 8)).astype(np.float32))
        else:
            Image.fromarray(rng.integers(0, 255, (40, 48)).astype(np.uint8)).save(path)
        row = {"path": str(path)} if number % 2 else {"path": f"../store/{path.name}"}
        if system == "more":
            row = {"xray": row["path"]}
        row |= {"label": "ab"[number // 2 % 2], "report": f"Clear lungs {number}."}
        row |= {"Edema": str(number % 2), "Pneumonia": str(number // 2 % 2)}
        row |= {"split": ("train", "valid", "test")[max(0, number // 2 - 3)]}
        rows.append(row)
    made = root / "lists" / ("m.jsonl" if system in ("acmil", "more") else "m.csv")
    made.parent.mkdir()
    lines = [json.dumps(row) for row in rows]
    if made.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    made.write_text("\n".join(lines) + "\n")
    return made


@pytest.mark.parametrize("system", list(TINY))
def test_a_table_is_the_data(system: str, tmp_path: Path):
    data, run = table(system, tmp_path), tmp_path / "run"
    code, out, err = spoken(APP, "check", system, data, "--json")
    assert code == 0, out + err
    assert not json.loads(out)["problems"]
    code, _, err = spoken(APP, "train", system, "--data", data, "--out", run, *STEP, *TINY[system])
    assert code == 0, err
    code, out, err = spoken(APP, "evaluate", run, "--device", "cpu", "--json")
    assert code == 0, out + err
