"""What pixels of DICOM files mean: encodings, colours, windows, frames, units."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import convert_color_space
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from heed_core.errors import InputError
from heed_medical.dicom import read_plane, read_series
from heed_medical.pictures.reading import read_grey

RAMP = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
"""12 bits."""


def write(
    path: Path,
    pixels: np.ndarray,
    *,
    bits: int | None = None,
    photometric: str = "MONOCHROME2",
    syntax: str = ExplicitVRLittleEndian,
    **fields: object,
) -> Path:
    """A DICOM file of some pixels (rows, columns), (frames, rows, columns) or with colours last."""
    colour = pixels.shape[-1] == 3 and pixels.ndim > 2
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = generate_uid()
    shape = pixels.shape[:-1] if colour else pixels.shape
    dataset.Rows, dataset.Columns = shape[-2:]
    if len(shape) == 3:
        dataset.NumberOfFrames = shape[0]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    if syntax in (RLELossless,):
        dataset.compress(syntax)
    elif syntax != ExplicitVRLittleEndian:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    big = syntax == ExplicitVRBigEndian
    pydicom.dcmwrite(
        path, dataset, enforce_file_format=True, little_endian=not big, implicit_vr=False
    )
    return path


def encoded(path: Path, stream: bytes, syntax: str, like: np.ndarray, **fields: object) -> Path:
    """A DICOM file whose pixels are an encoded stream."""
    write(path, like, **fields)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
    ],
)
def test_every_encoding_gives_the_same_values(syntax: str, tmp_path: Path):
    path = write(tmp_path / "a.dcm", RAMP, bits=12, syntax=syntax)
    np.testing.assert_array_equal(read_plane(path)[0], RAMP)


def test_jpeg_2000_and_jpeg_are_decoded(tmp_path: Path):
    codecs = pytest.importorskip("imagecodecs")
    stream = codecs.jpeg2k_encode(
        RAMP, codecformat="j2k", reversible=True, level=0, bitspersample=12
    )
    path = encoded(tmp_path / "a.dcm", stream, JPEG2000Lossless, RAMP, bits=12)
    np.testing.assert_array_equal(read_plane(path)[0], RAMP)
    flat = np.full((8, 8), 77, np.uint8)
    path = encoded(tmp_path / "b.dcm", codecs.jpeg8_encode(flat), JPEGBaseline8Bit, flat)
    np.testing.assert_allclose(read_plane(path)[0], 77, atol=1)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [(JPEGLSLossless, "JPEG-LS Lossless"), (JPEGLosslessSV1, "JPEG Lossless")],
)
def test_an_encoding_without_a_decoder_names_what_to_install(
    syntax: pydicom.uid.UID, name: str, tmp_path: Path
):
    if pydicom.pixels.get_decoder(syntax).is_available:
        pytest.skip("a decoder is installed")
    path = encoded(tmp_path / "a.dcm", bytes(64), syntax, RAMP)
    with pytest.raises(InputError) as caught:
        read_plane(path)
    told = str(caught.value)
    assert f"a.dcm: is encoded as {name}" in told
    assert "install pylibjpeg with pylibjpeg-libjpeg" in told
    assert "\n" not in told


def test_signed_and_narrow_values(tmp_path: Path):
    pixels = np.array([[-5, 3], [100, -2048]], np.int16)
    path = write(tmp_path / "a.dcm", pixels & 0x0FFF, bits=12, PixelRepresentation=1)
    np.testing.assert_array_equal(read_plane(path)[0], pixels)
    path = write(tmp_path / "b.dcm", RAMP | 0xF000, bits=12)  # an overlay in the unused bits
    np.testing.assert_array_equal(read_plane(path)[0], RAMP)
    path = write(
        tmp_path / "c.dcm", pixels & 0x0FFF, bits=12, PixelRepresentation=1,
        photometric="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-10,
    )  # fmt: skip
    np.testing.assert_array_equal(read_plane(path)[0], 2.0 * (-1 - pixels) - 10)


def test_a_modality_table_comes_before_everything(tmp_path: Path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, 0, 16], "US"
    table.LUTData = [10, 20, 40, 80]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    pixels = np.array([[0, 1], [2, 3]], np.uint8)
    path = write(tmp_path / "a.dcm", pixels, ModalityLUTSequence=Sequence([table]))
    np.testing.assert_array_equal(read_plane(path)[0], [[10, 20], [40, 80]])


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_windows_are_those_of_the_standard(function: str | None, photometric: str, tmp_path: Path):
    fields = {
        "WindowCenter": 1500,
        "WindowWidth": 1000,
        "RescaleSlope": 2,
        "RescaleIntercept": -500,
    }
    if function is not None:
        fields["VOILUTFunction"] = function
    path = write(tmp_path / "a.dcm", RAMP, bits=12, photometric=photometric, **fields)
    values = RAMP * 2.0 - 500
    wanted = {
        None: (values - 1499.5) / 999 + 0.5,
        "LINEAR": (values - 1499.5) / 999 + 0.5,
        "LINEAR_EXACT": (values - 1500) / 1000 + 0.5,
        "SIGMOID": 1 / (1 + np.exp(-4 * (values - 1500) / 1000)),
    }[function].clip(0, 1)
    if photometric == "MONOCHROME1":
        wanted = 1 - wanted
    values, whole = read_plane(path, voi=True)
    assert whole == (0.0, 1.0)
    np.testing.assert_allclose(values, wanted, atol=1e-6)
    np.testing.assert_array_equal(read_grey(path, voi=True), values)
    assert read_grey(path).min() == 0.0
    assert not np.allclose(read_grey(path), values)


def test_of_several_windows_the_first_counts(tmp_path: Path):
    several = write(
        tmp_path / "a.dcm", RAMP, bits=12, WindowCenter=[1000, 40], WindowWidth=[500, 80]
    )
    one = write(tmp_path / "b.dcm", RAMP, bits=12, WindowCenter=1000, WindowWidth=500)
    np.testing.assert_array_equal(read_plane(several, voi=True)[0], read_plane(one, voi=True)[0])


def test_a_display_table_is_used(tmp_path: Path):
    table = Dataset()
    table.LUTDescriptor = [4, 10, 12]
    table.LUTData = [0, 1000, 3000, 4095]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    pixels = np.array([[5, 10], [12, 200]], np.uint16)
    path = write(tmp_path / "a.dcm", pixels, VOILUTSequence=Sequence([table]))
    wanted = np.array([[0, 0], [3000, 4095]]) / 4095
    np.testing.assert_allclose(read_plane(path, voi=True)[0], wanted, atol=1e-6)


def test_windows_that_cannot_be_used_are_named(tmp_path: Path):
    for number, (fields, told) in enumerate(
        [
            (
                {"WindowCenter": 10, "WindowWidth": 0},
                r"a\.dcm: stores a window that cannot be used \(.*Window Width must be",
            ),
            ({"WindowCenter": 10}, "WindowCenter without WindowWidth"),
            (
                {"WindowCenter": 10, "WindowWidth": float("inf")},
                "has the WindowWidth 'inf', a number was expected",
            ),
            (
                {"WindowCenter": 10, "WindowWidth": 5, "VOILUTFunction": "CUBIC"},
                "Function value 'CUBIC'",
            ),
        ]
    ):
        path = write(tmp_path / "a.dcm", RAMP + np.uint16(number), bits=12, **fields)
        with pytest.raises(InputError, match=told):
            read_plane(path, voi=True)
        read_plane(path)
    path = write(tmp_path / "b.dcm", RAMP, bits=12)
    np.testing.assert_array_equal(read_grey(path, voi=True), read_grey(path))


def test_colours_become_luminance(tmp_path: Path):
    rgb = np.array([[[200, 10, 50], [0, 255, 0]], [[255, 255, 255], [0, 0, 0]]], np.uint8)
    wanted = rgb @ np.array([0.299, 0.587, 0.114]) / 255
    path = write(tmp_path / "rgb.dcm", rgb, photometric="RGB")
    np.testing.assert_allclose(read_grey(path), wanted, atol=1e-6)
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL")
    path = write(tmp_path / "ybr.dcm", ybr, photometric="YBR_FULL")
    np.testing.assert_allclose(read_grey(path), wanted, atol=2 / 255)
    with pytest.raises(InputError, match=r"rgb\.dcm: holds colour"):
        read_series([tmp_path / "rgb.dcm"])
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    path = write(tmp_path / "grey.dcm", grey, photometric="RGB")
    np.testing.assert_allclose(read_series([path]).array[0, :, :, 0], rgb[..., 0], atol=1e-4)


def test_palettes_are_looked_up(tmp_path: Path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [255, 255, 255]], np.uint16)
    fields: dict[str, object] = {}
    for name, column in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        fields[f"{name}PaletteColorLookupTableData"] = (column * 257).astype("<u2").tobytes()
    pixels = np.array([[2, 1], [0, 2]], np.uint8)
    path = write(tmp_path / "a.dcm", pixels, photometric="PALETTE COLOR", **fields)
    np.testing.assert_allclose(read_grey(path), [[1, 0.299], [0, 1]], atol=1e-6)


def test_padding_does_not_decide_on_black_and_white(tmp_path: Path):
    pixels = RAMP // 2 + np.uint16(500)
    pixels[:2] = 0
    padded = write(tmp_path / "a.dcm", pixels, bits=12, PixelPaddingValue=0)
    grey = read_grey(padded)
    assert (grey[:2] == 0).all()
    np.testing.assert_allclose(grey[2:].min(), 0)
    inverted = write(
        tmp_path / "b.dcm", 4095 - pixels, bits=12, PixelPaddingValue=4095,
        photometric="MONOCHROME1",
    )  # fmt: skip
    np.testing.assert_allclose(read_grey(inverted), grey, atol=1e-6)


def enhanced(path: Path, places: list[float], *, spacing: bool = True) -> np.ndarray:
    """A volume in one file, whose frames lie at `places` along the body."""
    pixels = np.arange(len(places) * 12, dtype=np.uint16).reshape(-1, 3, 4)
    shared = Dataset()
    measures, orientation = Dataset(), Dataset()
    if spacing:
        measures.PixelSpacing, measures.SliceThickness = [0.5, 0.25], 3.0
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    frames = []
    for number, place in enumerate(places):
        frame, position, transformation = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [10, 20, place]
        transformation.RescaleSlope, transformation.RescaleIntercept = 1 + number, -7
        frame.PlanePositionSequence = Sequence([position])
        frame.PixelValueTransformationSequence = Sequence([transformation])
        frames.append(frame)
    write(
        path, pixels, SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(frames),
    )  # fmt: skip
    return np.stack([plane * (1.0 + n) - 7 for n, plane in enumerate(pixels)])


def test_the_frames_of_one_file_are_a_volume(tmp_path: Path):
    planes = enhanced(tmp_path / "a.dcm", [6.0, 0.0, 3.0])
    image = read_series([tmp_path / "a.dcm"])
    np.testing.assert_array_equal(image.array[0], np.moveaxis(planes[[1, 2, 0]], 0, -1))
    np.testing.assert_allclose(image.spacing_mm, (0.5, 0.25, 3.0))
    np.testing.assert_allclose(image.affine_ras @ [0, 0, 2, 1], [-10, -20, 6, 1])
    enhanced(tmp_path / "b.dcm", [0.0, 3.0, 6.0, 12.0])
    with pytest.raises(InputError, match=r"b\.dcm, frame 4: lies 6\.00 mm after"):
        read_series([tmp_path / "b.dcm"])
    enhanced(tmp_path / "c.dcm", [0.0, 3.0, 3.0])
    with pytest.raises(InputError, match=r"c\.dcm, frame 3: lies at the same place as c\.dcm"):
        read_series([tmp_path / "c.dcm"])
    with pytest.raises(InputError, match=r"a\.dcm: holds 3 frames, one picture is needed"):
        read_plane(tmp_path / "a.dcm")


def test_frames_without_places_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.dcm", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(InputError, match="holds 3 frames without their places"):
        read_series([path])


def test_a_picture_without_spacing_has_none(tmp_path: Path):
    path = write(tmp_path / "a.dcm", RAMP, bits=12)
    assert read_series([path]).spacing_mm is None
    path = write(tmp_path / "b.dcm", RAMP, bits=12, NominalScannedPixelSpacing=[0.2, 0.3])
    np.testing.assert_allclose(read_series([path]).spacing_mm[:2], (0.2, 0.3))
    path = write(tmp_path / "c.dcm", RAMP, bits=12, PixelSpacing=[0.2, 0])
    with pytest.raises(InputError, match=r"c\.dcm: has the PixelSpacing 0\.2, 0"):
        read_series([path])


def test_a_volume_without_spacing_is_refused(tmp_path: Path):
    enhanced(tmp_path / "a.dcm", [0.0, 3.0], spacing=False)
    with pytest.raises(InputError, match=r"a\.dcm.*: has no PixelSpacing"):
        read_series([tmp_path / "a.dcm"])


@pytest.mark.parametrize(
    ("field", "value", "broken"),
    [
        ("PixelSpacing", "0.25\\0.5", b"ab25\\0.5"),
        ("RescaleSlope", "12345", b"1,234"),
        ("ImagePositionPatient", "11\\22\\33", b"11\\22.33"),
        ("ImageOrientationPatient", "1\\0\\0\\0\\1\\0", b"1\\0\\0\\0\\1.0"),
    ],
)
def test_fields_that_are_no_numbers_are_named(
    field: str, value: str, broken: bytes, tmp_path: Path
):
    path = write(tmp_path / "a.dcm", RAMP, bits=12, **{field: value.split("\\")})
    content = path.read_bytes()
    assert content.count(value.encode()) == 1
    path.write_bytes(content.replace(value.encode(), broken))
    for read in (lambda: read_plane(path), lambda: read_series([path])):
        with pytest.raises(InputError, match=rf"a\.dcm: has the {field} .*number.* expected"):
            read()
