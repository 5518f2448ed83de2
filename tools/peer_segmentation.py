"""Train MONAI's UNet for a given processor time, and score it as we score ours.

    python tools/peer_segmentation.py DATA --minutes 20

It gets the same slices, augmentation, batch, cosine schedule and metrics as `heed-medical train
msga`, MONAI's own Dice + cross-entropy loss, and keeps the weights that are best on the validation
cases.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heed_medical.segmentation.augmentation import SliceAugmentation, augment
from heed_medical.segmentation.layouts import find_cases
from heed_medical.segmentation.metrics import score_case, summarise
from heed_medical.segmentation.planning import plan_data
from heed_medical.segmentation.prediction import predict_volume
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.segmentation.slices import CaseData, SliceData

AUGMENTATION = SliceAugmentation(flip_probability=0.0)


def main() -> None:
    """Train, score, print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0, help="of processor time")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data = plan_data(SegmentationData(), options.data)
    slices = SliceData(find_cases(options.data, data, "train"), data)
    valid = CaseData(find_cases(options.data, data, "val"), data)
    test = CaseData(find_cases(options.data, data, "test"), data)
    model = unet(data)
    epochs = train(model, slices, valid, data, options)
    model.eval()
    rows = [row for case in test for row in scores(model, case, data)]
    summary = summarise(rows)
    result = {
        "model": "MONAI UNet",
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": options.minutes,
        "epochs": epochs,
        **summary.metrics,
    }
    print(json.dumps(result, indent=2))


def unet(data: SegmentationData) -> nn.Module:
    """MONAI's residual UNet, padded to what its four halvings need."""
    net = UNet(
        spatial_dims=2,
        in_channels=data.input_channels or 1,
        out_channels=len(data.table),
        channels=(32, 64, 128, 256, 512),
        strides=(2, 2, 2, 2),
        num_res_units=2,
    )
    return Padded(net)


class Padded(nn.Module):
    """A network whose sides must be multiples of 16, for images of any size."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Pad at the lower right, run, crop."""
        height, width = image.shape[-2:]
        padded = nn.functional.pad(image, (0, -width % 16, 0, -height % 16))
        return self.net(padded)[..., :height, :width]


def scores(model: nn.Module, case: object, data: SegmentationData) -> list[dict]:
    """The rows of one case."""
    return score_case(predict_volume(model, case, data, batch=16), data.table.names)


def train(
    model: nn.Module,
    slices: SliceData,
    valid: CaseData,
    data: SegmentationData,
    options: argparse.Namespace,
) -> int:
    """Train for the given time; leaves the best weights in the model."""
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(options.seed)
    loader = DataLoader(
        slices,
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda samples: torch.utils.data.default_collate(
            [augment(sample, rng, AUGMENTATION) for sample in samples]
        ),
    )
    best, kept, epoch, start = -1.0, copy.deepcopy(model.state_dict()), 0, time.process_time()
    while time.process_time() - start < 60 * options.minutes:
        model.train()
        for batch in loader:
            adam.zero_grad()
            loss_of(model(batch["image"]), batch["label"][:, None].clamp(min=0)).backward()
            adam.step()
            spent = (time.process_time() - start) / (60 * options.minutes)
            adam.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * min(spent, 1.0)))
            if spent > 1:
                break
        model.eval()
        dice = float(np.mean([row["dice"] for case in valid for row in scores(model, case, data)]))
        epoch += 1
        if dice > best:
            best, kept = dice, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return epoch


if __name__ == "__main__":
    main()
