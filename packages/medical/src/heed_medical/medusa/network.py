"""MEDUSA (Aboutalebi et al., arXiv 2110.06063): one body looks once, and steers every scale.

An encoder-decoder (the body) sees the whole picture once. Small heads turn its output G into one
attention map per stage of an ordinary classifier (the backbone), whose stage outputs are F_j:

    g_j  = G at the size of F_j
    z_j  = conv1( ReLU(BN(conv3(g_j) + conv1(F_j))) )
    A_j  = 2 sigmoid(z_j)                   1 everywhere at the start: z_j starts as 0
    F'_j = A_j * F_j                        what stage j + 1 sees

A reconstruction: the paper publishes the idea, the two inputs (a picture of 480 x 480 for the
backbone, 256 x 256 in grey for the body), 29.2 M parameters and 29.1 G multiply-adds, but neither
the widths of the body nor the layers of the heads. Those chosen here have 28.5 M and 27.7 G.

The attention is a product with A_j, not a softmax over places: there are no sites for `observe`;
`Medusa.watch` gives the maps instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from jaxtyping import Float
from torch import Tensor, nn

BackboneName = Literal["resnet18", "resnet50", "densenet121"]
AttentionKind = Literal["medusa", "se", "cbam", "none"]
GateKind = Literal["2sigmoid", "sigmoid"]
HeadKind = Literal["channel", "spatial"]

STAGE_CHANNELS: dict[str, tuple[int, ...]] = {
    "resnet18": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "densenet121": (256, 512, 1024, 1024),
}
SMALLEST_SIDE = 64
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
REDUCTION = 16
"""Of the squeezed width of the peers SE and CBAM."""


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """All that is needed to rebuild the network."""

    classes: int = 2
    """Classes to tell apart."""
    backbone: BackboneName = "resnet50"
    """The classifier whose stages are steered; the paper's is resnet50."""
    attention: AttentionKind = "medusa"
    """medusa: the body steers all stages; se, cbam: each stage has a small attention of its own;
    none: the backbone alone."""
    normalise: Literal["unit", "imagenet"] = "unit"
    """What the backbone is given: values within 0..1, or these less ImageNet's mean, over its
    deviation, which is what ImageNet weights expect."""
    body_widths: tuple[int, ...] = (24, 48, 96, 192, 384)
    """Channels of the body's levels, the finest first. Each level halves the sides."""
    hidden: int = 64
    """Channels inside a head."""
    gate: GateKind = "2sigmoid"
    """A_j within 0..2, which is 1 at the start, or within 0..1, which is 1/2 at the start."""
    head: HeadKind = "channel"
    """A map for every channel, or one for all of them."""
    local: bool = True
    """Whether a head also sees its own stage; without, it sees nothing but the body's features."""
    pad: bool = False
    """Extend pictures whose sides are too small for the backbone or no multiples of what the body
    halves, by their border pixels, and cut maps back. Otherwise such sizes are refused."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built or has no effect, naming the setting."""
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")
        for name, kind in (
            ("backbone", BackboneName),
            ("attention", AttentionKind),
            ("normalise", Literal["unit", "imagenet"]),
            ("gate", GateKind),
            ("head", HeadKind),
        ):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if len(self.body_widths) < 2 or min(self.body_widths) < 1:
            raise ValueError(
                f"body_widths must be two or more positive numbers, got {self.body_widths}"
            )
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")
        if self.attention != "medusa":
            for name, default in (("gate", "2sigmoid"), ("head", "channel"), ("local", True)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} has no effect with attention={self.attention}")

    def refuse_sizes(self, main: Sequence[int], body: Sequence[int]) -> None:
        """Refuse pictures that do not fit and are not padded.

        Args:
            main: Height and width of the backbone's picture.
            body: Height and width of the body's picture.

        Raises:
            ValueError: One of them is too small or no multiple.
        """
        multiple = self.body_multiple
        if not self.pad and min(main) < SMALLEST_SIDE:
            raise ValueError(
                f"size must be {SMALLEST_SIDE} or more, or padded (model.pad), got {tuple(main)}"
            )
        if not self.pad and any(side % multiple for side in body):
            raise ValueError(
                f"body_size must be multiples of {multiple} for {len(self.body_widths)} "
                f"body_widths, or padded (model.pad), got {tuple(body)}"
            )

    @property
    def body_multiple(self) -> int:
        """The sides of the body's picture are multiples of this."""
        return int(2 ** (len(self.body_widths) - 1))


@dataclass(frozen=True, kw_only=True)
class MedusaView:
    """What the network made of a batch, and where it looked."""

    logits: Float[Tensor, "b k"]
    gates: tuple[Float[Tensor, "b _ _ _"], ...]
    """A_j of the four stages, with one channel or as many as the stage; empty without attention.
    For SE and CBAM what the stage is multiplied by."""
    last: Float[Tensor, "b _ _ _"]
    """What the last stage hands to the classifier: F'_4."""
    body_mask: Float[Tensor, "b 1 h w"] | None
    """The body's lung probability, of use after it was trained on masks; None without a body."""


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Twice: 3 x 3 convolution, batch normalisation, ReLU. The size stays."""
    layers: list[nn.Module] = []
    for source in (channels_in, channels_out):
        layers += [
            nn.Conv2d(source, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNetBody(nn.Module):
    """An encoder-decoder with skips; gives features at the size of its input.

    Args:
        in_channels: Channels of the picture.
        widths: Channels of the levels, the finest first.
        pad: Whether a picture of other sides is padded and its features are cut back.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], *, pad: bool = False) -> None:
        super().__init__()
        self.multiple = 2 ** (len(widths) - 1)
        self.pad = pad
        self.first = conv_block(in_channels, widths[0])
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(conv_block(fine, coarse) for fine, coarse in pairs)
        self.up = nn.ModuleList(conv_block(coarse + fine, fine) for fine, coarse in reversed(pairs))
        self.mask = nn.Conv2d(widths[0], 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, picture: Float[Tensor, "b i h w"]) -> Float[Tensor, "b c h w"]:
        """The features G of the last decoder level.

        Raises:
            ValueError: Sides that the levels cannot halve, unless they are padded.
        """
        height, width = picture.shape[-2:]
        if self.pad:
            margins = margins_of((height, width), multiple=self.multiple)
            return cut_back(self._features(extended(picture, margins)), margins)
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"the body's picture must have sides that are multiples of {self.multiple}, "
                f"got {height} x {width}"
            )
        return self._features(picture)

    def _features(self, picture: Float[Tensor, "b i h w"]) -> Float[Tensor, "b c h w"]:
        levels: list[Tensor] = [self.first(picture)]
        for block in self.down:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        features = levels.pop()
        for block in self.up:
            skip = levels.pop()
            larger = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            features = block(torch.cat([larger, skip], dim=1))
        return features

    def mask_logits(self, picture: Float[Tensor, "b i h w"]) -> Float[Tensor, "b 1 h w"]:
        """Scores of the mask that the body is pre-trained on."""
        scores: Tensor = self.mask(self(picture))
        return scores


Margins = tuple[int, int, int, int]
"""Pixels left, right, above and below, as `torch.nn.functional.pad` takes them."""


def margins_of(size: Sequence[int], *, multiple: int = 1, least: int = 1) -> Margins:
    """What lacks to sides that are multiples of one number and at least another.

    Example:
        >>> margins_of((33, 64), multiple=16)
        (0, 0, 7, 8)
    """
    lacking = [max(least, -(-side // multiple) * multiple) - side for side in size]
    (above, below), (left, right) = ((lack // 2, lack - lack // 2) for lack in lacking)
    return left, right, above, below


def extended(picture: Float[Tensor, "b c h w"], margins: Margins) -> Float[Tensor, "b c p q"]:
    """Repeat the border pixels of a picture or map outwards."""
    return F.pad(picture, margins, mode="replicate") if any(margins) else picture


def cut_back(maps: Float[Tensor, "b c p q"], margins: Margins) -> Float[Tensor, "b c h w"]:
    """What is left of a map without its margins."""
    left, right, above, below = margins
    height, width = maps.shape[-2:]
    return maps[..., above : height - below, left : width - right]


def to_size(features: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c p q"]:
    """Average the cells where a map becomes smaller, interpolate where it becomes larger."""
    height, width = features.shape[-2:]
    if height >= size[0] and width >= size[1]:
        return F.adaptive_avg_pool2d(features, (size[0], size[1]))
    return F.interpolate(features, size=[size[0], size[1]], mode="bilinear", align_corners=False)


class ScaleGate(nn.Module):
    """Gate one stage by the body's global context and the stage's local one.

    Args:
        global_channels: Of the body's features G.
        local_channels: Of the stage's features F_j.
        hidden: Channels inside.
        head: A map per channel, or one for all.
        gate: `2sigmoid` within 0..2, or `sigmoid` within 0..1.
        local: Whether F_j is looked at.
    """

    def __init__(
        self,
        global_channels: int,
        local_channels: int,
        *,
        hidden: int = 64,
        head: HeadKind = "channel",
        gate: GateKind = "2sigmoid",
        local: bool = True,
    ) -> None:
        super().__init__()
        self.scale = 2.0 if gate == "2sigmoid" else 1.0
        self.from_global = nn.Conv2d(global_channels, hidden, 3, padding=1, bias=False)
        self.from_local = nn.Conv2d(local_channels, hidden, 1, bias=False) if local else None
        self.norm = nn.BatchNorm2d(hidden)
        self.score = nn.Conv2d(hidden, local_channels if head == "channel" else 1, 1)
        self.reset_score()

    def reset_score(self) -> None:
        """Make all scores 0, as at the start."""
        nn.init.zeros_(self.score.weight)
        assert self.score.bias is not None
        nn.init.zeros_(self.score.bias)

    def forward(
        self, local: Float[Tensor, "b c h w"], body: Float[Tensor, "b g p q"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b _ h w"]]:
        """The gated stage F'_j and the map A_j."""
        hidden = self.from_global(to_size(body, local.shape[-2:]))
        if self.from_local is not None:
            hidden = hidden + self.from_local(local)
        attention = self.scale * torch.sigmoid(self.score(F.relu(self.norm(hidden))))
        return local * attention, attention


class SqueezeExcitation(nn.Module):
    """SE (Hu et al., arXiv 1709.01507): a factor per channel from the channel's mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // REDUCTION, 4)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.excite = nn.Conv2d(inner, channels, 1)

    def forward(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c 1 1"]]:
        """The gated map and the factors."""
        factors = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return x * factors, factors


class BlockAttention(nn.Module):
    """CBAM (Woo et al., arXiv 1807.06521): a factor per channel, then one per place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // REDUCTION, 4)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.excite = nn.Conv2d(inner, channels, 1)
        self.place = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def _channels(self, pooled: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c 1 1"]:
        scores: Tensor = self.excite(F.relu(self.squeeze(pooled)))
        return scores

    def forward(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """The gated map and the factors."""
        mean, most = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        channel = torch.sigmoid(self._channels(mean) + self._channels(most))
        scaled = x * channel
        seen = torch.cat([scaled.mean(1, keepdim=True), scaled.amax(1, keepdim=True)], dim=1)
        place = torch.sigmoid(self.place(seen))
        return scaled * place, channel * place


class StagedBackbone(nn.Module):
    """A torchvision classifier, run stage by stage; its parameters keep torchvision's names.

    Args:
        name: The torchvision model.
        classes: Outputs of its last layer.
    """

    def __init__(self, name: BackboneName, *, classes: int) -> None:
        super().__init__()
        self.is_dense = name.startswith("densenet")
        self.net = torchvision.models.get_model(name, weights=None, num_classes=classes)

    def stem(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c p q"]:
        """What the first stage is given, at a quarter of the sides."""
        names = ("conv0", "norm0", "relu0", "pool0") if self.is_dense else _RESNET_STEM
        owner = self.net.features if self.is_dense else self.net
        for name in names:
            picture = owner.get_submodule(name)(picture)
        return picture

    def stage(self, number: int, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b c p q"]:
        """Stage 1, 2, 3 or 4."""
        owner = self.net.features if self.is_dense else self.net
        if self.is_dense and number > 1:
            x = owner.get_submodule(f"transition{number - 1}")(x)
        block = f"denseblock{number}" if self.is_dense else f"layer{number}"
        features: Tensor = owner.get_submodule(block)(x)
        return features

    def classify(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Class scores from the last stage."""
        if self.is_dense:
            x = F.relu(self.net.features.norm5(x))
        last = self.net.classifier if self.is_dense else self.net.fc
        logits: Tensor = last(x.mean((2, 3)))
        return logits


def _scaled(margins: Margins, size: Sequence[int], other: Sequence[int]) -> Margins:
    """The margins of a picture as those of a map of another size over the same picture."""
    rows, columns = other[0] / size[0], other[1] / size[1]
    left, right, above, below = margins
    return round(left * columns), round(right * columns), round(above * rows), round(below * rows)


_RESNET_STEM = ("conv1", "bn1", "relu", "maxpool")


class Medusa(nn.Module):
    """The classifier whose stages the body steers.

    Args:
        config: Its form.
    """

    threshold: Tensor
    """A picture is called the second of two classes from this probability on. 0.5 is the most
    probable class; training may settle another value on validation pictures."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        channels = STAGE_CHANNELS[config.backbone]
        self.body: UNetBody | None = None
        self.gates = nn.ModuleList()
        self.backbone = StagedBackbone(config.backbone, classes=config.classes)
        if config.attention == "medusa":
            self.body = UNetBody(1, config.body_widths, pad=config.pad)
            self.gates.extend(
                ScaleGate(
                    config.body_widths[0],
                    local,
                    hidden=config.hidden,
                    head=config.head,
                    gate=config.gate,
                    local=config.local,
                )
                for local in channels
            )
        elif config.attention != "none":
            peer = SqueezeExcitation if config.attention == "se" else BlockAttention
            self.gates.extend(peer(local) for local in channels)
        self.register_buffer("threshold", torch.tensor(0.5))

    def forward(
        self, main: Float[Tensor, "b 3 h w"], body: Float[Tensor, "b 1 p q"]
    ) -> Float[Tensor, "b k"]:
        """Class scores.

        Args:
            main: The picture for the backbone, values within 0..1, sides of 64 or more unless
                they are padded.
            body: The same picture in grey for the body, its mean 0 and its variance 1.

        Raises:
            ValueError: Sides that are too small or not multiples of what the body halves.
        """
        return self.backbone.classify(self._run(main, body)[0])

    def watch(self, main: Float[Tensor, "b 3 h w"], body: Float[Tensor, "b 1 p q"]) -> MedusaView:
        """Class scores, the attention maps of every scale and the body's mask."""
        last, gates, context = self._run(main, body)
        mask = None
        if context is not None and self.body is not None:
            mask = torch.sigmoid(self.body.mask(context))
        return MedusaView(
            logits=self.backbone.classify(last), gates=tuple(gates), last=last, body_mask=mask
        )

    def _run(
        self, main: Float[Tensor, "b 3 h w"], body: Float[Tensor, "b 1 p q"]
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """F'_4, the maps A_j and the body's features G."""
        margins = self.margins(main.shape[-2:])
        if not self.config.pad and min(main.shape[-2:]) < SMALLEST_SIDE:
            height, width = main.shape[-2:]
            raise ValueError(
                f"the main picture must have sides of {SMALLEST_SIDE} or more, "
                f"got {height} x {width}"
            )
        if self.config.normalise == "imagenet":
            mean, deviation = (main.new_tensor(v).reshape(3, 1, 1) for v in _IMAGENET)
            main = (main - mean) / deviation
        context = None if self.body is None else self.body(body)
        around = context
        if context is not None and any(margins):
            around = extended(context, _scaled(margins, main.shape[-2:], context.shape[-2:]))
        maps: list[Tensor] = []
        x = self.backbone.stem(extended(main, margins))
        for number in range(1, 5):
            x = self.backbone.stage(number, x)
            if len(self.gates):
                gate = self.gates[number - 1]
                x, attention = gate(x) if around is None else gate(x, around)
                maps.append(attention)
        return x, maps, context

    def margins(self, size: Sequence[int]) -> Margins:
        """By how much the backbone's picture of a size is padded."""
        return margins_of(size, least=SMALLEST_SIDE) if self.config.pad else (0, 0, 0, 0)

    def parameters_of_attention(self) -> list[nn.Parameter]:
        """The parameters of body and heads; the others are the backbone's."""
        own = list(self.gates.parameters())
        return own if self.body is None else [*self.body.parameters(), *own]
