"""IVGN: an encoder of three views and a visually guided decoder that write radiology reports."""

from heed_medical.ivgn.decoding import Decoded, beam_search
from heed_medical.ivgn.gia import GlobalIntensiveAttention
from heed_medical.ivgn.losses import report_loss
from heed_medical.ivgn.network import Ivgn, IvgnConfig
from heed_medical.ivgn.vkgd import GuidedDecoder, GuidedDecoderBlock
from heed_medical.ivgn.weights import load_backbone

__all__ = [
    "Decoded",
    "GlobalIntensiveAttention",
    "GuidedDecoder",
    "GuidedDecoderBlock",
    "Ivgn",
    "IvgnConfig",
    "beam_search",
    "load_backbone",
    "report_loss",
]
