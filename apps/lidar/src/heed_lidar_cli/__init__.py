"""The command `heed-lidar`: train, evaluate, predict, explain and export the LiDAR systems."""

from heed_runtime.app import App, Verb

__version__ = "0.1.0"

APP = App(
    name="heed-lidar",
    about="Attention models for LiDAR: curbs from raw scans.",
    systems={
        "curbnet": "heed_lidar_cli.curbnet:RECIPE",
        "curbnet-released": "heed_lidar_cli.curbnet_released:RECIPE",
        "cylinder3d": "heed_lidar_cli.cylinder3d:RECIPE",
        "classical": "heed_lidar_cli.classical:RECIPE",
    },
    verbs={
        "compare": Verb(module="heed_lidar_cli.compare", arguments="PREDICTIONS LABELS"),
        "make-curb-labels": Verb(
            module="heed_lidar_cli.make_curb_labels", arguments="DATA --out DIR"
        ),
        "make-streets": Verb(module="heed_lidar_cli.make_streets", arguments="DIR"),
        "merge": Verb(module="heed_lidar_cli.merge", arguments="PREDICTIONS --poses F --out DIR"),
        "view": Verb(module="heed_lidar_cli.view", arguments="INPUT... --out DIR"),
    },
    diagnoses={
        "sparse back-ends": "heed_lidar_cli.diagnoses:sparse_backends",
        "renderers": "heed_lidar_cli.diagnoses:renderers",
    },
    libraries={
        "laspy": "las and laz files (heed-lidar[las])",
        "open3d": "view --window, --renderer open3d (heed-lidar[open3d])",
        "rosbags": "ROS bags and MCAP (heed-lidar[bags])",
    },
)


def main() -> None:
    """Run the command line."""
    APP.main()
