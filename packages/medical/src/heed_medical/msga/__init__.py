"""Multi-scale self-guided attention (arXiv 1906.02849): 2-D segmentation of medical slices."""

from heed_medical.msga.losses import MsgaLoss, msga_loss
from heed_medical.msga.network import GuidedPyramid, Msga, MsgaConfig, MsgaOutput
from heed_medical.msga.weights import load_backbone, load_official

__all__ = [
    "GuidedPyramid",
    "Msga",
    "MsgaConfig",
    "MsgaLoss",
    "MsgaOutput",
    "load_backbone",
    "load_official",
    "msga_loss",
]
