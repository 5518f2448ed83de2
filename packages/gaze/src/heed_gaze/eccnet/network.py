"""eccNET: the convolutions of VGG16 behind the pools of a retina.

Gupta et al., NeurIPS 2021, arXiv 2106.02953; VGG16: Simonyan and Zisserman, arXiv 1409.1556. The
network is trained to classify pictures and used as it is to search: the features of the target are
correlated with those of the scene. It has no softmax attention, so no attention site: its
attention is the correlation map of `heed_gaze.eccnet.attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed_gaze.eccnet.retina import EccentricPool, RetinaConfig, plain_pool

CONVS = (2, 2, 3, 3, 3)
"""Convolutions of each block."""
NORMALISATION: Mapping[str, tuple[tuple[float, ...], tuple[float, ...], bool]] = {
    "torchvision": (
        (0.485 * 255, 0.456 * 255, 0.406 * 255),
        (0.229 * 255, 0.224 * 255, 0.225 * 255),
        False,
    ),
    "keras-caffe": ((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), True),
}
"""Mean and scale of the channels of a picture of 0 to 255, and whether they are blue first."""
AVERAGING_GAIN = 1.4
"""Of fresh convolutions over He's, without which a narrow network does not begin to learn."""
Normalisation = Literal["torchvision", "keras-caffe"]


@dataclass(frozen=True, kw_only=True)
class EccNetConfig:
    """All that is needed to rebuild the network; the defaults are eccNET on VGG16."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Channels of the five blocks."""
    retina: RetinaConfig = field(default_factory=RetinaConfig)
    layers: tuple[int, ...] = (3, 4, 5)
    """Blocks whose features find the target; (5,) is the paper's ablation "18->17"."""
    weights: Normalisation = "torchvision"
    """Whose weights these are: how a picture is normalised."""
    classes: int = 0
    """Classes of the classifier; 0: there is none."""
    hidden: int = 4096
    """Width of the two hidden layers of the classifier."""
    dropout: float = 0.5
    """In the classifier, while it trains."""
    picture: int = 224
    """Side of the pictures that the classifier takes."""

    def __post_init__(self) -> None:
        if len(self.widths) != len(CONVS) or min(self.widths) < 1:
            raise ValueError(f"widths must be {len(CONVS)} numbers above 0, got {self.widths}")
        if not self.layers or not set(self.layers) <= {3, 4, 5}:
            raise ValueError(f"layers must be some of 3, 4, 5, got {self.layers}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must be different, got {self.layers}")
        for name in ("classes", "hidden", "picture"):
            if getattr(self, name) < (name != "classes"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def map_side(self) -> int:
        """Side of the last pool's output for a picture of the classifier."""
        return -(-self.picture // 32)


class EccNet(nn.Module):
    """Five blocks of 3 x 3 convolutions, each followed by a pool of the retina; a classifier.

    Pictures are RGB from 0 to 255; the network normalises them.

    Args:
        config: Sizes.

    Example:
        >>> net = EccNet(EccNetConfig(widths=(2, 2, 4, 4, 4)))
        >>> [tuple(f.shape) for f in net.features(torch.zeros(1, 3, 96, 96))]
        [(1, 4, 6, 6), (1, 4, 6, 6), (1, 4, 6, 6)]
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: EccNetConfig) -> None:
        super().__init__()
        self.config = config
        mean, scale, self.blue_first = NORMALISATION[config.weights]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        width = 3
        self.blocks = nn.ModuleList()
        for number, (count, out) in enumerate(zip(CONVS, config.widths, strict=True), start=1):
            block = nn.Sequential()
            for index in range(1, count + 1):
                block.add_module(f"block{number}_conv{index}", nn.Conv2d(width, out, 3, padding=1))
                block.add_module(f"relu{index}", nn.ReLU())
                width = out
            self.blocks.append(block)
        self.pools = nn.ModuleList(EccentricPool(config.retina, n) for n in range(1, 6))
        self.classifier = _classifier(config) if config.classes else None
        self._init_weights()

    def forward(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """Class scores of pictures of the classifier's size.

        Raises:
            ValueError: There is no classifier, or pictures are of another size.
        """
        if self.classifier is None:
            raise ValueError("classes=0: this network has no classifier")
        side = self.config.picture
        if picture.shape[2:] != (side, side):
            raise ValueError(f"picture must be {side} x {side}, got {tuple(picture.shape[2:])}")
        last: Tensor = self.pools[4](self.block_outputs(picture)[4])
        scores: Tensor = self.classifier(last.contiguous().flatten(1))
        return scores

    def normalise(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """What the first convolution takes."""
        channels = picture.flip(1) if self.blue_first else picture
        return (channels - self.mean) / self.scale

    def run_blocks(
        self, x: Float[Tensor, "b c h w"], first: int, last: int
    ) -> Float[Tensor, "b d oh ow"]:
        """Blocks `first` to `last`, with the pools between them; counted from 1."""
        for number in range(first, last + 1):
            x = self.blocks[number - 1](x)
            if number < last:
                x = self.pools[number - 1](x)
        return x

    def block_outputs(self, picture: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """The last convolution of each block, before its pool."""
        x = self.normalise(picture).contiguous(memory_format=torch.channels_last)
        found = [self.run_blocks(x, 1, 1)]
        for number in range(2, 6):
            pooled = self.pools[number - 2](found[-1])
            found.append(self.run_blocks(pooled, number, number))
        return found

    def features(self, picture: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Features of a scene around the fixation at its middle, one map per used layer.

        All are brought to a sixteenth of the size by plain pools.
        """
        outputs = self.block_outputs(picture)
        return [self.to_sixteenth(outputs[layer - 1], layer) for layer in self.config.layers]

    def to_sixteenth(self, x: Float[Tensor, "b c h w"], layer: int) -> Float[Tensor, "b c oh ow"]:
        """Plain pools behind block 3 (two) and 4 (one)."""
        for _ in range(5 - layer):
            x = plain_pool(x, self.config.retina.pooling)
        return x

    def target_features(self, picture: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Features of a target, one pool deeper than those of the scene."""
        outputs = self.block_outputs(picture)
        return [
            self.to_sixteenth(self.pools[layer - 1](outputs[layer - 1]), layer)
            for layer in self.config.layers
        ]

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if isinstance(module, nn.Conv2d):  # pools that average make signals small
                    module.weight.data.mul_(AVERAGING_GAIN)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


def _classifier(config: EccNetConfig) -> nn.Sequential:
    inputs = config.widths[-1] * config.map_side**2
    return nn.Sequential(
        nn.Linear(inputs, config.hidden),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, config.hidden),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, config.classes),
    )
