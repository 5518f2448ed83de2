"""MoRE: contrastive pre-training on X-rays, ECGs and reports."""

from heed_medical.more.losses import gather_rows, info_nce, pair_losses
from heed_medical.more.network import (
    MODALITIES,
    More,
    MoreClassifier,
    MoreConfig,
    Projector,
    small_config,
)
from heed_medical.more.text import TextConfig, TextTower
from heed_medical.more.towers import Tower, TowerConfig, drop_schedule, kept_keys

__all__ = [
    "MODALITIES",
    "More",
    "MoreClassifier",
    "MoreConfig",
    "Projector",
    "TextConfig",
    "TextTower",
    "Tower",
    "TowerConfig",
    "drop_schedule",
    "gather_rows",
    "info_nce",
    "kept_keys",
    "pair_losses",
    "small_config",
]
