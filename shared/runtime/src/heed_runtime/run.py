"""The run folder: one training, everything that it needs to be repeated, resumed and used.

```
config.yaml            every setting, resolved; feeding it back reproduces the run
model/                 config.json and model.safetensors: all that rebuilds the model
checkpoints/           the engine's, for resuming
metrics.csv            a row per epoch
metrics.json           the final numbers
curves.png             metrics.csv drawn
environment.json       versions, seed, device, data fingerprint, command line
log.txt                the log, and the traceback of a fault
evaluation/<split>/    what `evaluate` wrote
```
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import logging
import platform
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from heed_core.errors import InputError
from heed_runtime import __version__
from heed_runtime.errors import nearest, user_fault
from heed_runtime.files import (
    atomic_folder,
    atomic_write,
    explain_oserror,
    make_folder,
    write_csv,
    write_json,
    write_text,
)
from heed_runtime.settings import load_settings, merge, to_dict, to_yaml
from heed_runtime.terminal import is_heard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from heed_runtime.app import App
    from heed_runtime.recipe import Recipe

CONFIG = "config.yaml"
LOCK = ".lock"
WAIT_S = 8.0
"""For a run that is in use: loaders of a killed training hold its lock until they notice, 5 s."""
LIBRARIES = (
    "torch",
    "lightning",
    "numpy",
    "heed-core",
    "heed-runtime",
    "safetensors",
    "torchmetrics",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, and its folder. Made by `create` or `open`.

    Args:
        path: The folder.
        system: The system's name in its app.
        settings: All four groups, resolved.
    """

    path: Path
    system: str
    settings: Any

    @property
    def config(self) -> Path:
        """`config.yaml`."""
        return self.path / CONFIG

    @property
    def model_folder(self) -> Path:
        """The folder with `config.json` and `model.safetensors`; `path` itself where it is one."""
        bare = not self.config.exists() and (self.path / "model.safetensors").exists()
        return self.path if bare else self.path / "model"

    @property
    def weights(self) -> Path:
        """`model.safetensors`."""
        return self.model_folder / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of the engine's checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_csv(self) -> Path:
        """A row per epoch."""
        return self.path / "metrics.csv"

    @property
    def metrics_json(self) -> Path:
        """The final numbers."""
        return self.path / "metrics.json"

    @property
    def curves(self) -> Path:
        """The picture of `metrics.csv`."""
        return self.path / "curves.png"

    @property
    def environment(self) -> Path:
        """Versions, seed, device, data, command line."""
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        """The log."""
        return self.path / "log.txt"

    def evaluation(self, split: str) -> Path:
        """The folder for the results on a split."""
        return self.path / "evaluation" / split

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        system: str,
        settings: Any,
        command: Sequence[str],
        overwrite: bool = False,
    ) -> Run:
        """Make the folder of a new run, whole or not at all.

        Args:
            path: The folder.
            system: The system's name.
            settings: All four groups.
            command: The command line, program first.
            overwrite: Replace a run that is there. A folder with anything else is never replaced.

        Raises:
            InputError: The folder holds something, or cannot be written.
        """
        if overwrite and path.is_dir() and any(path.iterdir()) and not is_run(path):
            raise InputError(
                "holds files that are no run", path=path, remedy="choose another folder"
            )
        with atomic_folder(path, overwrite=overwrite) as folder:
            write_text(folder / CONFIG, to_yaml(settings, system=system))
            write_json(folder / "environment.json", describe_environment(command, settings))
            (folder / "checkpoints").mkdir()
        return cls(path=path, system=system, settings=settings)

    @classmethod
    def open(cls, path: Path, app: App) -> Run:
        """Open a run, or a bare model folder.

        Raises:
            InputError: Not a run, a run of a system that the app does not have, or a broken
                configuration.
        """
        if not path.is_dir():
            problem = "is a file, not a run" if path.exists() else "no such folder"
            raise InputError(problem, path=path, remedy="give the folder that train wrote")
        if (path / CONFIG).exists():
            return _open_config(path, app)
        for folder in (path / "model", path):
            if (folder / "config.json").exists():
                return _open_model(path, folder / "config.json", app)
        raise InputError(
            f"is not a run: it has no {CONFIG}",
            path=path,
            remedy="give the folder that train wrote",
        )

    def update_environment(self, values: Mapping[str, object]) -> None:
        """Add facts that were not known at first, such as the data's fingerprint."""
        write_json(self.environment, {**self.facts(), **values})

    def facts(self) -> dict[str, Any]:
        """What `environment.json` says; empty without it.

        Raises:
            InputError: It is damaged.
        """
        if not self.environment.exists():
            return {}
        try:
            facts = json.loads(self.environment.read_text(encoding="utf-8"))
            return {**facts}
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                "is no whole JSON document",
                path=self.environment,
                remedy="remove the file: what the run was made on is then not known",
            ) from None

    def save_model(self, model: nn.Module) -> None:
        """Write the weights and the settings that rebuild the model, each as a whole."""
        from safetensors.torch import save_file

        with atomic_write(self.path / "model" / "model.safetensors") as temporary:
            save_file(_own_tensors(model), temporary, metadata={"format": "pt"})
        config = {
            "system": self.system,
            "heed_version": __version__,
            "settings": to_dict(self.settings),
        }
        # Infinity is legal in settings: json writes it, and load_settings reads it back.
        write_text(self.path / "model" / "config.json", json.dumps(config, indent=2) + "\n")

    def load_model(self, recipe: Recipe[Any, Any, Any]) -> nn.Module:
        """Rebuild the network with its trained weights, on the CPU, in eval mode.

        Raises:
            InputError: There are no weights (training has not saved any yet), the file is broken,
                or its tensors are not those of the model.
        """
        if not self.weights.exists():
            raise InputError(
                "the run has no weights yet",
                path=self.weights,
                remedy="train to the end of an epoch first (train SYSTEM --resume RUN)",
            )
        model = recipe.model(self.settings)
        load_weights(model, self.weights)
        return model.eval()

    def weights_hash(self) -> str:
        """SHA-256 of the weights' file, in hexadecimal."""
        with self.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def metrics(self) -> list[dict[str, float | None]]:
        """The rows of `metrics.csv`; None where a field is empty.

        Raises:
            InputError: It is damaged.
        """
        if not self.metrics_csv.exists():
            return []
        try:
            with self.metrics_csv.open(newline="", encoding="utf-8") as file:
                rows = [
                    {key: float(value) if value else None for key, value in row.items()}
                    for row in csv.DictReader(file)
                ]
            if all(set(row) == set(rows[0]) and "epoch" in row for row in rows):
                return rows
        except (ValueError, TypeError, csv.Error):
            pass
        raise InputError(
            "is no table of the numbers of epochs",
            path=self.metrics_csv,
            remedy="remove the file: the epochs so far are then not listed",
        )

    def log_epoch(self, row: Mapping[str, float | None]) -> None:
        """Write the row of an epoch; rows of this and later epochs, left by an earlier try, go."""
        kept = [old for old in self.metrics() if (old["epoch"] or 0) < (row["epoch"] or 0)]
        rows = [{**old, "epoch": int(old["epoch"] or 0)} for old in kept]
        write_csv(self.metrics_csv, [*rows, dict(row)])

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Append the log to `log.txt`, and the traceback of a fault that is not the user's.

        A run that may only be read is used without a log, and so is a bare model folder.
        """
        handler: logging.Handler = logging.NullHandler()
        if self.config.exists():
            with contextlib.suppress(OSError):
                handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handler.addFilter(is_heard)
        logging.getLogger().addHandler(handler)
        try:
            yield
        except Exception as error:
            if user_fault(error) is None:
                with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                    file.write(traceback.format_exc())
                    error.add_note(f"the traceback is in {self.log}")
            raise
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


def is_run(path: Path) -> bool:
    """Whether the folder was made by `Run.create`."""
    return (path / CONFIG).is_file() and (path / "environment.json").is_file()


@contextlib.contextmanager
def free_path(system: str) -> Iterator[Path]:
    """Make the first of `runs/<system>-<date>-<n>` that does not exist, empty, to be filled.

    No other process gets the same; where the body raises, it goes again.
    """
    today = datetime.date.today().isoformat()
    for n in itertools.count(1):
        path = make_folder(Path("runs")) / f"{system}-{today}-{n}"
        with explain_oserror(path.parent):
            try:
                path.mkdir()
            except FileExistsError:
                continue
        break
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


@contextlib.contextmanager
def training_in(path: Path) -> Iterator[None]:
    """Let no other process train into the run at `path`; ends with the process at the latest.

    Raises:
        InputError: Another process trains into it.
    """
    lock = FileLock(path / LOCK, timeout=WAIT_S)
    try:
        with explain_oserror(path), contextlib.suppress(NotImplementedError):
            lock.acquire()  # where the file system has locks
    except Timeout:
        raise InputError(
            "another process is training this run",
            path=path,
            remedy="wait for it, stop it, or choose another folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model from a safetensors file, strictly.

    Raises:
        InputError: The file is broken, or its names or shapes are not the model's.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(str(path), framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for key, shape in found.items():
            if expected.get(key, shape) != shape:
                raise InputError(
                    f"is of another model: {key} has shape {shape}, not {expected[key]}",
                    path=path,
                )
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot be read as safetensors: {error}", path=path, remedy="copy or train it again"
        ) from None
    missing = _own_tensors(model).keys() - state.keys()
    unexpected = state.keys() - expected.keys()
    for names, what in ((missing, "lacks"), (unexpected, "has unknown")):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            problem = f"is of another model: {what} {len(names)} tensors ({listed})"
            raise InputError(problem, path=path)
    model.load_state_dict(state, strict=False)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, contiguous; of tensors in the same memory (tied weights) the first."""
    own: dict[object, tuple[str, Tensor]] = {}
    for name, value in model.state_dict().items():
        memory = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        own.setdefault(memory, (name, value.contiguous()))
    return dict(own.values())


def describe_environment(command: Sequence[str], settings: Any) -> dict[str, object]:
    """What a run ran on: for `environment.json`."""
    versions: dict[str, str | None] = {"heed": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": versions,
        "platform": platform.platform(),
        "executable": sys.executable,
        "seed": settings.trainer.seed,
        "device": settings.trainer.device,
    }


def fingerprint(root: Path) -> dict[str, object]:
    """What identifies a data set: a hash of its files' names, sizes and first 64 KiB."""
    digest, count, size = hashlib.sha256(), 0, 0
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    for path in files:
        length = path.stat().st_size
        name = path.name if path == root else path.relative_to(root).as_posix()
        digest.update(f"{name}\0{length}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
        count, size = count + 1, size + length
    return {
        "path": str(root.resolve()),
        "files": count,
        "bytes": size,
        "sha256": digest.hexdigest(),
    }


def _open_config(path: Path, app: App) -> Run:
    from heed_runtime.settings import read_yaml

    system = _known_system(read_yaml(path / CONFIG).get("system"), path / CONFIG, app)
    settings = load_settings(app.recipe(system), file=path / CONFIG)
    return Run(path=path, system=system, settings=settings)


def _open_model(path: Path, config: Path, app: App) -> Run:
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        values, name = data["settings"], data["system"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            "is not a model's configuration of this program",
            path=config,
            remedy="give the folder that train wrote",
        ) from None
    system = _known_system(name, config, app)
    defaults = load_settings(app.recipe(system))
    return Run(path=path, system=system, settings=merge(defaults, values, path=config))


def _known_system(name: object, path: Path, app: App) -> str:
    if not isinstance(name, str):
        raise InputError("names no system", path=path, remedy="give the folder that train wrote")
    if name not in app.systems:
        raise InputError(
            f"is of the system {name!r}, which {app.name} does not have",
            path=path,
            remedy=nearest(name, app.systems),
        )
    return name
