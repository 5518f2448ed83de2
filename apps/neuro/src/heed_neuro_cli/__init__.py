"""The command `heed-neuro`: train, evaluate, predict, explain and export the neuroscience systems."""

from heed_runtime.app import App

__version__ = "0.1.0"

APP = App(
    name="heed-neuro",
    about="Attention models for neuroscience: brain encoders, attention as conditioning, in-context regression.",
    systems={},
)


def main() -> None:
    """Run the command line."""
    APP.main()
