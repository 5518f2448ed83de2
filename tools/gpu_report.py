"""Run what needs a CUDA device, and write a dated report.

python tools/gpu_report.py [FILE]

The report holds the device and the versions, the outcome of every test marked `gpu`, and the
numbers of every benchmark, each as the benchmark itself writes them.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]
TESTED = ("shared/core/tests", "shared/runtime/tests", "packages", "apps")


def main(words: list[str]) -> int:
    """Test, measure, write."""
    if not torch.cuda.is_available():
        print("error: there is no CUDA device; run this on a machine that has one", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.UTC)
    path = Path(words[0]) if words else ROOT / "runs" / f"gpu-{now:%Y-%m-%d}.json"
    report: dict[str, Any] = {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tests": tests(),
        "benchmarks": {name: benchmark(*name.split()) for name in systems()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name, outcome in report["tests"].items() if outcome == "failed"]
    print(f"wrote {path}: {len(report['tests'])} tests, {len(failed)} failed")
    return 1 if failed else 0


def tests() -> dict[str, str]:
    """The outcome of every test that needs a device: passed, failed or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={table}"]
        subprocess.run([*command, *TESTED], cwd=ROOT, check=False)
        return outcomes(ElementTree.parse(table))


def outcomes(table: ElementTree.ElementTree) -> dict[str, str]:
    """What a table in the form of JUnit says of each test."""
    found = {}
    for case in table.iter("testcase"):
        kinds = {child.tag for child in case}
        failed, skipped = kinds & {"failure", "error"}, "skipped" in kinds
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def systems() -> list[str]:
    """The command and the name of every system."""
    found = []
    for app in sorted(ROOT.glob("apps/*")):
        command = f"heed-{app.name}"
        listed = subprocess.run(
            [program(command), "list", "--json"], capture_output=True, text=True, check=True
        )
        found += [f"{command} {row['system']}" for row in json.loads(listed.stdout)["systems"]]
    return found


def benchmark(command: str, system: str) -> Any:
    """What `bench` prints of a system, or the line in which it refuses."""
    finished = subprocess.run(
        [program(command), "bench", system, "--device", "cuda", "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode == 0:
        return json.loads(finished.stdout)
    lines = re.findall(r".*error:.*", finished.stderr) or finished.stderr.splitlines()[-1:]
    return {"error": lines[-1] if lines else f"exit code {finished.returncode}"}


def program(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
