"""The catalogue of the core's mechanisms, made from their docstrings and the conformance table."""

import ast
import importlib
import json
import re
from pathlib import Path

from torch import nn

from heed_core.testing.conformance import Mechanism
from heed_core.testing.mechanisms import MECHANISMS

CORE = Path(__file__).parents[1] / "shared" / "core"
FOLDER = CORE / "src" / "heed_core" / "attention"
PAGE = CORE / "MECHANISMS.md"
MEASURED = CORE / "measured"
BESIDE = ("context_parallel", "context_parallel_attention", "head_parallel")
"""Files of `heed_core` that share attention among processes."""
GROWS = {
    "tokens": "at 512 channels and 8 heads, in tokens",
    "maps": "at 64 channels, in cells along a side",
}
PREFACE = """\
# The mechanisms of heed_core

Written by `tools/docs` from the code: one file of `heed_core/attention` each, in the words of its
docstring. "Checked as" names the rows of the conformance suite (`heed_core.testing`): equality with
a float64 reference in outputs and gradients, masks, causality, symmetry, half precision, compile,
export, cost. Patterns are those of modules of tokens: to themselves (self) or to a context (cross),
causal or not. Growth is the exponent of the number of tokens in the counted operations. What a row
cannot keep is named with its reason. The last three files share attention among processes.
"""


def page() -> str:
    """The whole page."""
    files = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("__init__",))
    files += [FOLDER.parent / f"{name}.py" for name in BESIDE]
    checked = by_module()
    parts = [
        PREFACE,
        "| file | what it is | paper | patterns | growth |",
        "|---|---|---|---|---|",
    ]
    texts = {path.stem: docstring(path) for path in files}
    for name, text in texts.items():
        rows = checked.get(name, [])
        growth = sorted({f"N^{row.exponent:g}" for row in rows if "cost" not in row.excused})
        cells = [
            f"[`{name}`](#{name})",
            title(text),
            ", ".join(papers(text)),
            ", ".join(patterns(name)),
            ", ".join(growth),
        ]
        parts.append("| " + " | ".join(cells) + " |")
    if measured := measurements():
        parts += ["", measured]
    for name, text in texts.items():
        parts += ["", f"## {name}", "", text, "", *facts(name, checked.get(name, []))]
    return "\n".join(parts).rstrip() + "\n"


def docstring(path: Path) -> str:
    """Of a file, without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{path} has no docstring"
    return text


def title(text: str) -> str:
    """The first sentence."""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".:").replace("|", "/")


def papers(text: str) -> list[str]:
    """The arXiv numbers that a docstring cites, in order."""
    return list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text)))


def by_module() -> dict[str, list[Mechanism]]:
    """File of `heed_core.attention` -> the rows of the suite that check a module of it."""
    found: dict[str, list[Mechanism]] = {}
    for mechanism in MECHANISMS:
        home = home_of(mechanism.build(0.0))
        if home is not None:
            found.setdefault(home, []).append(mechanism)
    return found


def home_of(module: nn.Module) -> str | None:
    """The file of the outermost module that is one of `heed_core.attention`."""
    for part in module.modules():
        package, _, name = type(part).__module__.rpartition(".")
        if package == "heed_core.attention":
            return name
    return None


def offered(name: str) -> list[object]:
    """The public modules and functions of a file."""
    folder = "heed_core" if name in BESIDE else "heed_core.attention"
    module = importlib.import_module(f"{folder}.{name}")
    return [
        item
        for key, item in vars(module).items()
        if not key.startswith("_") and getattr(item, "__module__", "") == module.__name__
    ]


def patterns(name: str) -> list[str]:
    """What the modules of a file that take tokens can be: causal or not, to themselves or not."""
    return sorted({p for item in offered(name) for p in getattr(item, "patterns", ())})


def facts(name: str, rows: list[Mechanism]) -> list[str]:
    """What the file offers, and how it is checked."""
    own = offered(name)
    modules = [x.__name__ for x in own if isinstance(x, type) and issubclass(x, nn.Module)]
    functions = [x.__name__ for x in own if callable(x) and not isinstance(x, type)]
    lines = []
    for label, names in (("Modules", modules), ("Functions", functions)):
        if names:
            lines.append(f"* {label}: {', '.join(f'`{n}`' for n in names)}")
    if rows:
        lines.append(f"* Checked as: {', '.join(f'`{row.name}`' for row in rows)}")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for clause, reason in row.excused.items():
            reasons.setdefault(f"{clause}: {reason}", []).append(row.name)
    lines += [f"* Excused, {reason} ({', '.join(names)})" for reason, names in reasons.items()]
    return lines


def measurements() -> str:
    """The newest table of `tools/bench attention`, and its plots."""
    path = MEASURED / "attention.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text())
    lines = [
        "## Measured",
        "",
        f"`tools/bench attention --write shared/core/measured`, {found['date']}, "
        f"{found['machine']}, torch {found['torch']}, float32, medians of {found['rounds']} "
        "rounds; `scaled_dot_product_attention` of torch on (1, 8, 1024, 64) took "
        f"{found['sdpa_ms']} ms. A ratio is the time over that of ours in the same round; +- is "
        "the range of the middle half; error is the largest of ours beside the same module in "
        "float64, over the largest value.",
        "",
        "| mechanism | input | what | who | ms | +- | ratio | peak MiB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["cases"]:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(
            f"| {row['mechanism']} | {shape} | {row['what']} | {row['name']} | {row['ms']:.2f} "
            f"| {row['iqr_ms']:.2f} | {row['ratio']:.2f} | {row['peak_mib']:.1f} "
            f"| {'' if row['error'] is None else row['error']} |"
        )
    lines.append("")
    for family, sizes in found["faster_from"].items():
        faster = ", ".join(
            f"{name} {'from ' + str(n) if n else 'not up to the largest measured'}"
            for name, n in sizes.items()
        )
        lines += [f"Faster than exact attention, forward, {GROWS[family]}: {faster}.", ""]
    for family in found["faster_from"]:
        lines += [
            f"![time of {family}](measured/{family}_time.png)",
            f"![peak memory of {family}](measured/{family}_memory.png)",
        ]
    return "\n".join(lines)
