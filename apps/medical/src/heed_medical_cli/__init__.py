"""The command `heed-medical`: train, evaluate, predict, explain and export the medical systems."""

from heed_runtime.app import App, Verb

__version__ = "0.1.0"

APP = App(
    name="heed-medical",
    about="Attention models for medical images.",
    systems={
        "medusa": "heed_medical_cli.medusa:RECIPE",
        "medusa-body": "heed_medical_cli.medusa_body:RECIPE",
        "msga": "heed_medical_cli.msga:RECIPE",
        "acmil": "heed_medical_cli.acmil:RECIPE",
        "ivgn": "heed_medical_cli.ivgn:RECIPE",
        "more": "heed_medical_cli.more:RECIPE",
    },
    verbs={
        "features": Verb(
            module="heed_medical_cli.features", arguments="SLIDE... --encoder NAME --out DIR"
        ),
    },
)


def main() -> None:
    """Run the command line."""
    APP.main()
