"""The command `heed-neuro`: train, evaluate, predict and explain the neuroscience systems."""

from heed_runtime.app import App, Verb

__version__ = "0.1.0"

APP = App(
    name="heed-neuro",
    about="Attention models for neuroscience: brain encoders, conditioning, in-context regression.",
    systems={
        "brain-encoder": "heed_neuro_cli.brain_encoder:RECIPE",
        "conditioning": "heed_neuro_cli.conditioning:RECIPE",
        "icl": "heed_neuro_cli.icl:RECIPE",
    },
    verbs={
        "baselines": Verb(module="heed_neuro_cli.baselines", arguments="DATA"),
        "ceiling": Verb(module="heed_neuro_cli.ceiling", arguments="DATA"),
        "decode": Verb(module="heed_neuro_cli.decode", arguments="FILE"),
        "ensemble": Verb(module="heed_neuro_cli.ensemble", arguments="RUN..."),
        "features": Verb(module="heed_neuro_cli.features", arguments="DATA --out DIR"),
        "rsa": Verb(module="heed_neuro_cli.rsa", arguments="IMAGES --rdms FILE"),
        "simulate": Verb(module="heed_neuro_cli.simulate", arguments="SCHEDULE..."),
        "capacity": Verb(module="heed_neuro_cli.capacity"),
        "depth": Verb(module="heed_neuro_cli.depth"),
    },
    libraries={
        "nilearn": "flat maps of the cortex (heed-neuro[brains])",
        "timm": "frozen networks from a file (heed-neuro[backbones])",
        "transformers": "frozen networks from a folder (heed-neuro[backbones])",
    },
)


def main() -> None:
    """Run the command line."""
    APP.main()
