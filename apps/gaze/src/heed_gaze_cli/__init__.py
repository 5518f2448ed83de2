"""The command `heed-gaze`: train, evaluate, predict, explain and export the gaze systems."""

from heed_runtime.app import App, Verb

__version__ = "0.1.0"

APP = App(
    name="heed-gaze",
    about="Attention models for gaze: scanpaths over objects, search with an eccentric retina.",
    systems={"oat": "heed_gaze_cli.oat:RECIPE", "eccnet": "heed_gaze_cli.eccnet:RECIPE"},
    verbs={
        "compare": Verb(module="heed_gaze_cli.compare", arguments="PREDICTIONS DATA"),
        "ceiling": Verb(module="heed_gaze_cli.ceiling", arguments="DATA"),
        "view": Verb(module="heed_gaze_cli.view", arguments="DATA --out DIR"),
        "stimuli": Verb(module="heed_gaze_cli.stimuli", arguments="--out DIR"),
        "score": Verb(module="heed_gaze_cli.score", arguments="RESULTS"),
    },
)


def main() -> None:
    """Run the command line."""
    APP.main()
