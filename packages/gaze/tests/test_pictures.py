"""Picture files, whole and damaged."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_gaze.readers.pictures import picture_size, read_picture


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8)).save(path)
    return path


def test_greys_become_three_channels(picture: Path) -> None:
    pixels = read_picture(picture)
    assert pixels.shape == (20, 30, 3)
    assert (pixels == pixels[..., :1]).all()
    assert picture_size(picture) == (30, 20)


@pytest.mark.bad_input
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_truncated_picture_is_refused_in_one_line(picture: Path, share: float) -> None:
    content = picture.read_bytes()
    picture.write_bytes(content[: int(share * len(content))])
    refused(picture)


@pytest.mark.bad_input
def test_any_damaged_byte_is_read_or_refused(picture: Path) -> None:
    """Pillow raises SyntaxError for a broken chunk, struct.error and others elsewhere."""
    content = picture.read_bytes()
    said = set()
    for at in range(len(content)):
        for instead in (bytes([content[at] ^ 0x55]), b"", bytes([content[at], 0])):
            picture.write_bytes(content[:at] + instead + content[at + 1 :])
            try:
                read_picture(picture)
            except InputError as error:
                said.add(str(error))
    assert any("broken PNG file" in line for line in said)
    assert not any("\n" in line for line in said)


@pytest.mark.bad_input
def test_what_is_not_there_and_what_is_too_large(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        read_picture(picture.with_name("none.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    refused(picture)


def refused(picture: Path) -> None:
    with pytest.raises(InputError) as fault:
        read_picture(picture)
    assert f"{picture}: cannot be read as a picture (" in str(fault.value)
    assert "\n" not in str(fault.value)
