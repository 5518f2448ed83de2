"""Reading ECGs: names, order, rate, unit and faults of WFDB records."""

import os
from pathlib import Path

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_medical.ecg.ptbxl import list_ptbxl, ptbxl_records
from heed_medical.ecg.reading import LEADS, Ecg, lead_name, read_ecg
from heed_medical.ecg.signals import cut, prepare_ecg
from heed_medical.ecg.writing import write_record

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))


def beats(rate_hz: int, *, seconds: float = 10.0) -> np.ndarray:
    time = np.arange(round(rate_hz * seconds)) / rate_hz
    peaks = np.arange(0.4, seconds, 0.8)
    wave = np.exp(-np.square((time[None] - peaks[:, None]) / 0.03)).sum(0)
    return np.stack([wave * (1 + lead / 12) for lead in range(12)])


def write(
    folder: Path,
    leads: np.ndarray,
    *,
    names: tuple[str, ...] = LEADS,
    unit: str = "mV",
    rate_hz: int = 100,
) -> Path:
    steps = {"mV": 1e3, "uV": 1.0, "V": 1e6}[unit]
    return write_record(
        folder / "rec", leads, rate_hz=rate_hz, names=names, unit=unit, steps_per_unit=steps
    )


@pytest.mark.parametrize(
    ("written", "lead"),
    [("AVR", "aVR"), ("avf", "aVF"), ("v6", "V6"), ("Lead II", "II"), ("vx", None), ("", None)],
)
def test_leads_are_known_by_their_names(written: str, lead: str | None):
    assert lead_name(written) == lead


def test_order_case_and_further_signals_change_nothing(tmp_path: Path):
    leads = beats(100)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = read_ecg(write(tmp_path / "a", leads))
    order = np.random.default_rng(0).permutation(12)
    names = (*(LEADS[i].lower() for i in order), "vx")
    mixed = np.concatenate([leads[order], leads[:1] * 3])
    other = read_ecg(write(tmp_path / "b", mixed, names=names))
    assert np.array_equal(plain.leads_mv, other.leads_mv)
    assert np.abs(plain.leads_mv - leads).max() <= 0.0005 + 1e-9


def test_frank_leads_and_1000_hz_of_ptb_are_taken(tmp_path: Path):
    """Records of the PTB diagnostic database: lower-case names, vx, vy and vz behind the twelve."""
    leads = beats(1000)
    names = (*(lead.lower() for lead in LEADS), "vx", "vy", "vz")
    found = read_ecg(write(tmp_path, np.concatenate([leads, leads[:3]]), names=names, rate_hz=1000))
    assert found.rate_hz == 1000
    prepared = prepare_ecg(found)
    error = np.abs(prepared - prepare_ecg(Ecg(leads_mv=beats(100), rate_hz=100.0)))[:, 30:-30]
    assert prepared.shape == (12, 1000)
    assert error.max() < 0.03


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1e3), ("V", 1e-3)])
def test_units_become_millivolt(tmp_path: Path, unit: str, factor: float):
    leads = beats(100)
    path = write(tmp_path, leads * factor, unit=unit)
    assert np.abs(read_ecg(path).leads_mv - leads).max() < 0.001


def test_all_ways_to_name_a_record(tmp_path: Path):
    path = write(tmp_path, beats(100))
    found = [read_ecg(p).leads_mv for p in (path, path.with_suffix(".dat"), path.with_suffix(""))]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_rates_agree_after_preparation(tmp_path: Path):
    slow = prepare_ecg(Ecg(leads_mv=beats(100), rate_hz=100.0))
    fast = prepare_ecg(Ecg(leads_mv=beats(500), rate_hz=500.0))
    assert slow.shape == fast.shape == (12, 1000)
    error = np.abs(slow - fast)[:, 30:-30]
    assert error.max() < 0.03
    assert error.mean() < 0.01


def test_offset_and_drift_hardly_matter():
    leads = beats(100)
    drift = 3 + 0.5 * np.sin(2 * np.pi * 0.05 * np.arange(1000) / 100)
    still = prepare_ecg(Ecg(leads_mv=leads, rate_hz=100.0))
    moved = prepare_ecg(Ecg(leads_mv=leads + drift, rate_hz=100.0))
    assert np.abs(still - moved)[:, 30:-30].max() < 0.1


def test_missing_samples_and_flat_leads():
    leads = beats(100)
    leads[3] = 0
    leads[5, 40:50] = np.nan
    found = prepare_ecg(Ecg(leads_mv=leads, rate_hz=100.0))
    assert np.isfinite(found).all()
    assert (found[3] == -1).all()


def test_cut_and_pad():
    leads = np.arange(24.0).reshape(12, 2).repeat(600, axis=1)
    assert np.array_equal(cut(leads, 1000), leads[:, :1000])
    assert np.array_equal(cut(leads, 1000, part="centre"), leads[:, 100:1100])
    padded = cut(leads[:, :10], 20)
    assert (padded[:, 10:] == 0).all()
    assert np.array_equal(padded[:, :10], leads[:, :10])


def test_missing_leads(tmp_path: Path):
    path = write(tmp_path, beats(100)[:11], names=LEADS[:11])
    with pytest.raises(InputError, match=r"rec\.hea: has no lead V6"):
        read_ecg(path)
    filled = read_ecg(path, missing_leads="zero")
    assert filled.missing == ("V6",)
    assert (filled.leads_mv[11] == 0).all()


def test_broken_records(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_ecg(tmp_path / "none.hea")
    path = write(tmp_path, beats(100))
    signal = path.with_suffix(".dat")
    whole = signal.read_bytes()
    signal.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"rec\.hea: is truncated"):
        read_ecg(path)
    signal.unlink()
    with pytest.raises(InputError, match=r"rec\.hea: names rec\.dat"):
        read_ecg(path)
    path.write_text("nonsense\n")
    with pytest.raises(InputError, match=r"rec\.hea"):
        read_ecg(path)


def test_a_signal_without_a_name(tmp_path: Path):
    path = write(tmp_path, beats(100))
    path.write_text(path.read_text().replace(" V6\n", "\n"))
    with pytest.raises(InputError, match=r"rec\.hea: has no lead V6"):
        read_ecg(path)


def test_other_units_twice_and_empty(tmp_path: Path):
    path = write(tmp_path, beats(100))
    header = path.read_text()
    path.write_text(header.replace("/mV", "/mmHg"))
    with pytest.raises(InputError, match="mmHg"):
        read_ecg(path)
    path.write_text(header.replace(" V2\n", " V1\n"))
    with pytest.raises(InputError, match="V1 twice"):
        read_ecg(path)
    gone = beats(100)
    gone[7] = np.nan
    with pytest.raises(InputError, match="no values in the lead V2"):
        read_ecg(write(tmp_path, gone))


def test_real_ptbxl():
    root = DATA / "ecg-ptbxl"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    records = list(ptbxl_records(root))
    assert len(records) == 500
    splits = [record.split for record in records]
    assert {name: splits.count(name) for name in set(splits)} == {
        "train": 353,
        "val": 81,
        "test": 66,
    }
    norm = sum("NORM" in record.superclasses for record in records)
    none = sum(not record.superclasses for record in records)
    assert (norm, none) == (297, 12)
    slow = prepare_ecg(read_ecg(records[0].path))
    fast = prepare_ecg(read_ecg(next(ptbxl_records(root, rate_hz=500)).path))
    assert np.corrcoef(slow[:, 50:-50].ravel(), fast[:, 50:-50].ravel())[0, 1] > 0.98


def test_broken_ptbxl(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        list(ptbxl_records(tmp_path))
    (tmp_path / "scp_statements.csv").write_text(",diagnostic,diagnostic_class\nNORM,1.0,NORM\n")
    head = "ecg_id,patient_id,report,scp_codes,strat_fold,filename_lr,filename_hr\n"
    row = "1,2.0,sinus,\"{'NORM': 100.0}\",3,records100/a,records500/a\n"
    table = tmp_path / "ptbxl_database.csv"
    table.write_text(head + row)
    assert next(ptbxl_records(tmp_path)).superclasses == {"NORM"}
    for old, new, match in (
        (",3,", ",11,", "strat_fold '11'"),
        ("{'NORM': 100.0}", "{'NORM'", "no dictionary"),
        ("scp_codes", "codes", "no column 'scp_codes'"),
    ):
        table.write_text((head + row).replace(old, new))
        with pytest.raises(InputError, match=match):
            list(ptbxl_records(tmp_path))
    bad = [
        row.replace(",3,", ",11,").strip(),
        row.replace("{'NORM': 100.0}", "{'NORM'").strip(),
        "2,3.0,cut off",
        row.replace("records100/a", "").strip(),
    ]
    table.write_text(head + row + "\n".join(bad) + "\n")
    listing = list_ptbxl(tmp_path)
    assert [record.place for record in listing.records] == [f"{table}, row 2"]
    told = "\n".join(listing.problems)
    for said in ("row 3: has strat_fold '11'", "row 4: has scp_codes", "row 5: has another number"):
        assert f"{table}, {said}" in told
    assert "row 6: has no filename_lr" in told
    with pytest.raises(InputError, match="row 5: has another number of fields"):
        list(ptbxl_records(tmp_path))
