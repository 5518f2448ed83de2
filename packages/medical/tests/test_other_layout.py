"""Data in another layout than a run was trained on: the layout that they have is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.pictures.layouts import list_pictures
from heed_medical.pictures.settings import PictureData
from heed_medical.reports.layouts import list_studies
from heed_medical.reports.settings import ReportData
from heed_medical.segmentation.layouts import list_cases
from heed_medical.segmentation.settings import SegmentationData


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures with labels, reports and masks, all in one table."""
    rows = ["file,label,text,split"]
    for number in range(4):
        for folder in ("images", "masks"):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(path)
        rows.append(f"images/{number}.png,{'ab'[number % 2]},Clear lungs.,train")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.parametrize("layout", ["covidx", "rsna", "chexpert", "mimic"])
def test_pictures_of_another_layout(layout: str, data: Path):
    with pytest.raises(InputError, match=f"not in the layout {layout}.*--data.layout table"):
        list_pictures(data, PictureData(layout=layout))


@pytest.mark.parametrize("layout", ["r2gen", "openi", "kaggle", "mimic"])
def test_reports_of_another_layout(layout: str, data: Path):
    with pytest.raises(InputError, match=f"not in the layout {layout}.*--data.layout table"):
        list_studies(data, ReportData(layout=layout))


@pytest.mark.parametrize("layout", ["png", "nnunet", "msd", "brats", "chaos"])
def test_masks_of_another_layout(layout: str, data: Path):
    (data / "labels.csv").unlink()
    with pytest.raises(InputError, match=f"not in the layout {layout}.*--data.layout pairs"):
        list_cases(data, SegmentationData(layout=layout))


def test_data_in_no_layout_are_told_as_before(tmp_path: Path):
    with pytest.raises(InputError, match="holds no labelled picture in the layout covidx"):
        list_pictures(tmp_path, PictureData(layout="covidx"))
