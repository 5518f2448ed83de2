"""The command `heed-medical`: train, evaluate, predict, explain and export the medical systems."""

from heed_runtime.app import App, Verb

__version__ = "0.1.0"

APP = App(
    name="heed-medical",
    about="Attention models for medical images.",
    systems={
        "medusa": "heed_medical_cli.medusa:RECIPE",
        "medusa-body": "heed_medical_cli.medusa_body:RECIPE",
        "medusa-findings": "heed_medical_cli.medusa_findings:RECIPE",
        "msga": "heed_medical_cli.msga:RECIPE",
        "acmil": "heed_medical_cli.acmil:RECIPE",
        "ivgn": "heed_medical_cli.ivgn:RECIPE",
        "more": "heed_medical_cli.more:RECIPE",
        "more-findings": "heed_medical_cli.more_findings:RECIPE",
    },
    verbs={
        "features": Verb(
            module="heed_medical_cli.features", arguments="SLIDE... --encoder NAME --out DIR"
        ),
        "convert": Verb(module="heed_medical_cli.convert", arguments="DATA --to LAYOUT --out DIR"),
        "repeat": Verb(
            module="heed_medical_cli.repeat", arguments="SYSTEM --out DIR [--data DATA] [--seeds N]"
        ),
        "pair": Verb(module="heed_medical_cli.pair", arguments="CXR ECG --out CSV"),
        "retrieve": Verb(
            module="heed_medical_cli.retrieve", arguments="RUN [INPUT...] [--text T] --among PATH"
        ),
        "zero-shot": Verb(module="heed_medical_cli.zero_shot", arguments="RUN [--data DATA]"),
        "probe": Verb(module="heed_medical_cli.probe", arguments="RUN [--data DATA]"),
    },
    libraries={"faiss-cpu": "retrieve among 20,000 vectors and more (heed-medical[retrieval])"},
)


def main() -> None:
    """Run the command line."""
    APP.main()
