"""Weights that MEDUSA starts from: an ImageNet backbone, a body that was trained on lung masks.

The released model is a frozen TensorFlow graph without layer names of its own; it is not read.
"""

import re
from pathlib import Path

import torch

from heed_core.checkpoints import fill, read_state
from heed_core.errors import InputError
from heed_medical.medusa.network import Medusa

_OLD_DENSE_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d\.)")


def load_backbone(model: Medusa, path: Path | str) -> None:
    """Fill the backbone from weights under torchvision's names; its last layer stays as it is.

    Args:
        model: The network; body and heads do not change.
        path: Weights of the same torchvision architecture.

    Raises:
        InputError: The file cannot be read, or is not for this backbone.
    """
    net = model.backbone.net
    last = "classifier." if model.backbone.is_dense else "fc."
    found = {_OLD_DENSE_NAME.sub(r"\1\2", name): x for name, x in read_state(path).items()}
    state = {name: x for name, x in found.items() if not name.startswith(last)}
    own = {name: x for name, x in net.state_dict().items() if name.startswith(last)}
    fill(net, {**state, **own}, lambda name: name, path=path)


def load_body(model: Medusa, path: Path | str) -> None:
    """Fill the body from a body that was trained alone, or from that of another MEDUSA.

    Args:
        model: The network; backbone and heads do not change.
        path: Weights whose names are the body's, with or without the prefix `body.`.

    Raises:
        InputError: The network has no body; the file cannot be read, or holds another body.
    """
    if model.body is None:
        raise InputError(
            f"the network has no body (attention {model.config.attention})",
            path=path,
            remedy="leave the body's weights out or set the attention to medusa",
        )
    state = read_state(path)
    if any(name.startswith("body.") for name in state):
        state = {n.removeprefix("body."): x for n, x in state.items() if n.startswith("body.")}
    fill(model.body, state, lambda name: name, path=path)


def without_gates(model: Medusa) -> Medusa:
    """The plain backbone of a network, with the same weights.

    Example:
        >>> from heed_medical.medusa import Medusa, MedusaConfig
        >>> plain = without_gates(Medusa(MedusaConfig(backbone="resnet18")))
        >>> plain.config.attention
        'none'
    """
    from dataclasses import replace

    config = replace(model.config, attention="none", gate="2sigmoid", head="channel", local=True)
    with torch.no_grad():
        plain = Medusa(config)
        plain.backbone.load_state_dict(model.backbone.state_dict())
    return plain.train(model.training)
