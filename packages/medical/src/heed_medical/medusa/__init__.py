"""MEDUSA: a classifier whose every scale is steered by one global attention network."""

from heed_medical.medusa.losses import body_loss, class_loss, findings_loss
from heed_medical.medusa.network import Medusa, MedusaConfig, MedusaView, ScaleGate, UNetBody
from heed_medical.medusa.weights import load_backbone, load_body

__all__ = [
    "Medusa",
    "MedusaConfig",
    "MedusaView",
    "ScaleGate",
    "UNetBody",
    "body_loss",
    "class_loss",
    "findings_loss",
    "load_backbone",
    "load_body",
]
