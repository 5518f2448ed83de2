"""The command `heed-gaze`: train, evaluate, predict, explain and export the gaze systems."""

from heed_runtime.app import App

__version__ = "0.1.0"

APP = App(
    name="heed-gaze",
    about="Attention models for gaze: scanpaths over objects, search with an eccentric retina.",
    systems={"oat": "heed_gaze_cli.oat:RECIPE"},
)


def main() -> None:
    """Run the command line."""
    APP.main()
