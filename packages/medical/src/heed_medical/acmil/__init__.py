"""ACMIL: attention-challenging multiple instance learning on bags of patch features."""

from heed_medical.acmil.losses import AcmilLoss, acmil_loss, attention_diversity
from heed_medical.acmil.masking import stochastic_top_mask
from heed_medical.acmil.network import AcmilConfig, BagClassifier, BagOutput
from heed_medical.acmil.pooling import GatedAttentionPool, QueryAttentionPool
from heed_medical.acmil.weights import load_official

__all__ = [
    "AcmilConfig",
    "AcmilLoss",
    "BagClassifier",
    "BagOutput",
    "GatedAttentionPool",
    "QueryAttentionPool",
    "acmil_loss",
    "attention_diversity",
    "load_official",
    "stochastic_top_mask",
]
