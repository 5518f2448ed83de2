"""The command `heed-neuro`: train, evaluate, predict and explain the neuroscience systems."""

from heed_runtime.app import App, Verb

__version__ = "0.1.0"

APP = App(
    name="heed-neuro",
    about="Attention models for neuroscience: brain encoders, conditioning, in-context regression.",
    systems={
        "brain-encoder": "heed_neuro_cli.brain_encoder:RECIPE",
        "conditioning": "heed_neuro_cli.conditioning:RECIPE",
    },
    verbs={
        "simulate": Verb(module="heed_neuro_cli.simulate", arguments="SCHEDULE..."),
        "capacity": Verb(module="heed_neuro_cli.capacity"),
        "depth": Verb(module="heed_neuro_cli.depth"),
    },
)


def main() -> None:
    """Run the command line."""
    APP.main()
