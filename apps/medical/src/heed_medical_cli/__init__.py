"""The command `heed-medical`: train, evaluate, predict, explain and export the medical systems."""

from heed_runtime.app import App

__version__ = "0.1.0"

APP = App(
    name="heed-medical",
    about="Attention models for medical images.",
    systems={
        "msga": "heed_medical_cli.msga:RECIPE",
    },
)


def main() -> None:
    """Run the command line."""
    APP.main()
