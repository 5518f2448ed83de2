"""Weights that IVGN starts from: a torchvision ResNet, for example of ImageNet.

Weights of IVGN itself were not released. R2Gen's cannot be taken over: its decoder has a relational
memory, and its layer norm divides by another deviation.
"""

from pathlib import Path

from heed_core.checkpoints import fill, read_state
from heed_core.errors import InputError
from heed_medical.ivgn.network import Ivgn


def load_backbone(model: Ivgn, path: Path | str) -> None:
    """Fill the extractor from a torchvision ResNet of the same depth; its last layer is left out.

    Args:
        model: The network; nothing but the extractor changes.
        path: Weights under torchvision's names.

    Raises:
        InputError: The file cannot be read, or is not for this backbone.
    """
    if model.config.backbone == "conv":
        raise InputError(
            "the backbone conv has no weights of others",
            path=path,
            remedy="leave the weights out or set --model.backbone resnet101",
        )
    state = {n: x for n, x in read_state(path).items() if not n.startswith("fc.")}
    fill(model.extractor, state, lambda name: name, path=path)
