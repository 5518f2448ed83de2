import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml

from heed_core.errors import InputError
from heed_runtime.errors import UsageError
from heed_runtime.settings import (
    TrainerSettings,
    changed,
    from_dict,
    load_settings,
    merge,
    read_yaml,
    to_dict,
    to_yaml,
)


@dataclass(frozen=True, kw_only=True)
class Window:
    size: int = 64
    overlap: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    width: int = 8
    dims: tuple[int, ...] = (1, 2)
    window: Window | None = None

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")


@dataclass(frozen=True, kw_only=True)
class Data:
    on_error: Literal["stop", "skip"] = "stop"
    root: Path = Path("here")
    spacing_mm: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    lr: float = 1e-3
    flip: bool = True
    stages: tuple[Window, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)


RECIPE = SimpleNamespace(
    card=SimpleNamespace(name="toy"),
    presets={"small": Settings, "large": lambda: Settings(model=Model(width=64, dims=(3,)))},
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_the_file_wins_over_the_preset_and_the_preset_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {dims: [7, 8]}\ntraining:\n  lr: 1e-4\n")
    assert load_settings(RECIPE) == Settings()
    settings = load_settings(RECIPE, preset="large", file=file)
    assert settings.model == Model(width=64, dims=(7, 8))
    assert settings.training.lr == 1e-4
    assert settings.data == Data()


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="toy has no preset 'larg'; did you mean 'large'"):
        load_settings(RECIPE, preset="larg")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(
            model=Model(width=16, dims=(), window=Window(size=3)),
            data=Data(on_error="skip", root=Path("a b"), spacing_mm=(1.5, 1e-9)),
            training=Training(lr=math.inf, flip=False, stages=(Window(), Window(size=1))),
            trainer=TrainerSettings(
                seed=4, clip=0.1, max_steps=3, extra={"deterministic": True, "x": "no", "y": None}
            ),
        ),
        Settings(data=Data(root=Path("no")), trainer=TrainerSettings(extra={"a": "1e-3"})),
    ],
)
def test_settings_survive_their_file_exactly(tmp_path: Path, settings: Settings) -> None:
    assert from_dict(Settings, to_dict(settings)) == settings
    file = write(tmp_path, to_yaml(settings, system="toy"))
    assert load_settings(RECIPE, preset="large", file=file) == settings


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {widht: 8}", "model.widht: unknown key; did you mean 'width'?"),
        ("modle: {}", "modle: unknown key; did you mean 'model'?"),
        ("model: {window: {siz: 8}}", "model.window.siz: unknown key; did you mean 'size'?"),
        ("training: {stages: [{}, {sise: 1}]}", "training.stages.1.sise: unknown key; did"),
        ("model: {width: x}", "model.width: got 'x', input should be a valid integer"),
        ("model: {width: 8.5}", "model.width: got 8.5, input should be a valid integer"),
        ("model: {width: '8'}", "model.width: got '8', input should be a valid integer"),
        ("model: {width: true}", "model.width: got True, input should be a valid integer"),
        ("training: {flip: 1}", "training.flip: got 1, input should be a valid boolean"),
        ("training: {lr: yes}", "training.lr: got 'yes', input should be a valid number"),
        ("data: {on_error: ignore}", "data.on_error: got 'ignore', input should be 'stop' or"),
        ("model: {width: 9}", "model: width must be a multiple of 8, got 9"),
        ("trainer: {batch: 0}", "trainer: batch must be at least 1, got 0"),
        ("model: 3", "model: got 3, "),
        ("model: {width: 8", "line 1: is not valid YAML"),
        ("model: {}\nmodel: {}", "line 2: is not valid YAML: the key 'model' appears twice"),
        ("model: !!python/object/apply:os.system [false]", "is not valid YAML: could not determ"),
        ("model: !!binary aGVlZA==", "is not valid YAML: could not determine a constructor"),
        ("model: !!timestamp 2020-01-01", "is not valid YAML: could not determine a constructor"),
        ("model: !!int x", "is not valid YAML: a value is not what its tag says"),
        ("model: &a [*a]", "is not valid YAML: found unconstructable recursive node"),
        ("[" * 5000, "is nested too deeply"),
        ("- model", "holds a list, expected keys"),
        ("1: x", "is not valid YAML: the key 1 is not a text"),
        ("system: other", "is a configuration of 'other', not of 'toy'"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(
    tmp_path: Path, text: str, line: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_settings(RECIPE, file=file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert line in message
    assert "\n" not in message


def test_a_missing_file_and_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(InputError, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not valid YAML: not a text file"):
        read_yaml(tmp_path / "x")


def test_plain_words_of_yaml(tmp_path: Path) -> None:
    text = "a: 1e-3\nb: no\nc: 2020-01-01\nd: off\ne: .5\nf: 0o7\ng: 12:30\nh: ~\ni: 1_000\nj: -3"
    assert read_yaml(write(tmp_path, text)) == {
        "a": 0.001,
        "b": "no",
        "c": "2020-01-01",
        "d": "off",
        "e": 0.5,
        "f": "0o7",
        "g": "12:30",
        "h": None,
        "i": "1_000",
        "j": -3,
    }
    assert read_yaml(write(tmp_path, "")) == {}


def test_merge_keeps_what_is_not_named() -> None:
    old = Settings(model=Model(width=16, window=Window(size=3)))
    new = merge(old, {"model": {"window": {"overlap": 0.25}}, "trainer": {"extra": {"a": 1}}})
    assert new.model == Model(width=16, window=Window(size=3, overlap=0.25))
    assert new.trainer.extra == {"a": 1}
    assert merge(new, {"trainer": {"extra": {}}}).trainer.extra == {}
    assert changed(old, new) == ["model.window.overlap", "trainer.extra"]
    assert yaml.safe_load(to_yaml(new, system="toy"))["system"] == "toy"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"max_steps": -1}, "max_steps must be at least 1"),
        ({"workers": -1}, "workers must not be negative"),
        ({"seed": 2**32}, "seed must be below"),
        ({"average": 1.0}, "average must be between 0 and 1"),
        ({"average": float("nan")}, "average must be between 0 and 1"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"clip": float("nan")}, "clip must be above 0"),
        ({"extra": {"max_epochs": 3}}, "extra must not set 'max_epochs': use max_epochs"),
        ({"extra": {"val_check_interval": 9}}, "'val_check_interval': weights are chosen"),
        ({"extra": {"callbacks": "x"}}, "extra must not set 'callbacks'"),
    ],
)
def test_the_engine_settings_refuse_what_makes_no_sense(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        TrainerSettings(**values)


def test_every_engine_setting_has_a_help_text() -> None:
    from tyro._docstrings import get_field_docstring

    for item in dataclasses.fields(TrainerSettings):
        assert get_field_docstring(TrainerSettings, item.name, ()), item.name
