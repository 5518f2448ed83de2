"""OAT beside its peers: paths drawn together or one by one, the network beside torch's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_gaze.oat.crops import CropEncoder
from heed_gaze.oat.decoding import decode_greedy, decode_samples, permitted
from heed_gaze.oat.network import Memory, Oat, OatConfig, Scenes
from heed_gaze.oat.pictures import cut_crops
from heed_gaze.oat.shelves import Layout, even_boxes, reading_order
from heed_runtime.recipe import Contender

GRID = (6, 14)
"""Of the benchmark: the book covers of the Amazon collages."""
STEPS = 12
SAMPLES = 100


class Drawing(Oat):
    """In training the teacher-forced network; otherwise draws paths of the first trial."""

    def __init__(self, config: OatConfig, draw: Callable[[Oat, Memory], object]) -> None:
        super().__init__(config)
        self.draw = draw

    def forward(self, crops: Tensor, cells: Tensor, target: Tensor, scanpath: Tensor) -> Any:  # type: ignore[override]
        """Logits, or paths."""
        if self.training:
            return super().forward(crops, cells, target, scanpath)
        scenes = Scenes(
            crops=(crops[0],),
            cells=cells[:1],
            shape=torch.tensor([GRID], device=cells.device),
            present=torch.ones_like(cells[:1, :, 0], dtype=torch.bool),
        )
        memory = self.read(scenes, torch.zeros_like(target[:1]), target[:1])
        return self.draw(self, memory)


def draw_together(model: Oat, memory: Memory) -> object:
    """All paths in one batch, with cached keys and values."""
    return decode_samples(model, memory, max_len=STEPS, samples=SAMPLES)


def draw_one_by_one(model: Oat, memory: Memory) -> object:
    """Path after path, with cached keys and values."""
    return [
        decode_samples(model, memory, max_len=STEPS, samples=1, seed=seed)
        for seed in range(SAMPLES)
    ]


def draw_without_cache(model: Oat, memory: Memory) -> object:
    """Path after path, every step decoded from the beginning."""
    found = []
    for seed in range(SAMPLES):
        generator = torch.Generator(memory.tokens.device).manual_seed(seed)
        ids: list[int] = []
        while len(ids) < STEPS:
            given = torch.tensor([ids], dtype=torch.long, device=memory.tokens.device)
            logits = model.follow(memory, given)[:, -1]
            chances = permitted(logits, objects=memory.objects, first=not ids).exp()
            chosen = int(torch.multinomial(chances, 1, generator=generator))
            if chosen == memory.objects:
                break
            ids.append(chosen)
        found.append(ids)
    return found


class TorchLayers(nn.Module):
    """OAT of torch's own layers: a crop is encoded for each token that shows it."""

    def __init__(self, config: OatConfig) -> None:
        super().__init__()
        half = config.dim // 2
        self.crops = CropEncoder(half, crop=config.crop, spp=config.spp)
        self.register_buffer("codes", torch.randn(GRID[0] * GRID[1], config.dim - half))
        options = {"nhead": config.heads, "dim_feedforward": config.hidden, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(config.dim, **options),  # type: ignore[arg-type]
            config.encoder_depth,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(config.dim, **options),  # type: ignore[arg-type]
            config.decoder_depth,
        )
        heads = config.pointer_heads
        self.keys = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(heads))
        self.queries = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(heads))
        self.mix = nn.Linear(heads, 1)

    def forward(self, crops: Tensor, cells: Tensor, target: Tensor, scanpath: Tensor) -> Tensor:
        """Logits."""
        rows = torch.arange(len(crops), device=crops.device)[:, None]
        objects = self._embed(crops, torch.arange(crops.shape[1], device=crops.device)[None])
        wanted = self._embed(crops[rows, target[:, None]], target[:, None])
        memory = self.encoder(torch.cat([objects, wanted], dim=1))
        begin = self._embed(torch.ones_like(crops[:, :1]), torch.zeros_like(target[:, None]))
        steps = torch.cat([begin, self._embed(crops[rows, scanpath], scanpath)], dim=1)
        barred = torch.ones(
            steps.shape[1], steps.shape[1], dtype=torch.bool, device=crops.device
        ).triu(1)
        decoded = self.decoder(steps, memory, tgt_mask=barred)
        scores = [
            query(decoded) @ key(memory).transpose(1, 2) / decoded.shape[-1] ** 0.5
            for query, key in zip(self.queries, self.keys, strict=True)
        ]
        mixed: Tensor = self.mix(F.pad(torch.stack(scores, dim=-1), (0, 0, 0, 1)))
        return mixed[..., 0]

    def _embed(self, crops: Tensor, index: Tensor) -> Tensor:
        features = self.crops(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        codes = self.codes[index.expand(crops.shape[:2])]  # type: ignore[index]
        return torch.cat([features, codes], dim=-1)


def bench_inputs(config: OatConfig, batch: int) -> tuple[Tensor, ...]:
    """Trials of 12 steps on layouts of 84 objects."""
    generator = torch.Generator().manual_seed(0)
    count = GRID[0] * GRID[1]
    crops = torch.rand(batch, count, 3, *config.crop, generator=generator)
    cells = torch.from_numpy(reading_order(*GRID, count)).expand(batch, -1, -1).contiguous()
    target = torch.randint(count, (batch,), generator=generator)
    scanpath = torch.randint(count, (batch, STEPS - 1), generator=generator)
    return crops, cells, target, scanpath


def mean_logit(output: Tensor) -> Tensor:
    """A loss to run backward from."""
    return output.square().mean()


def contenders(config: OatConfig) -> list[Contender]:
    """Teacher forced beside torch's layers, then ways to draw 100 paths."""
    inputs = partial(bench_inputs, config, 1)
    networks: dict[str, tuple[Callable[[], nn.Module], int]] = {
        f"OAT, {STEPS} steps teacher forced": (partial(Oat, config), 1),
        "the same of torch's layers": (partial(TorchLayers, config), 1),
        f"{SAMPLES} paths together": (partial(Drawing, config, draw_together), SAMPLES),
        f"{SAMPLES} paths one by one": (partial(Drawing, config, draw_one_by_one), SAMPLES),
        f"{SAMPLES} paths one by one, no cache": (
            partial(Drawing, config, draw_without_cache),
            SAMPLES,
        ),
    }
    return [
        Contender(name=name, build=build, inputs=inputs, loss=mean_logit, items=items)
        for name, (build, items) in networks.items()
    ]


def stages(config: OatConfig) -> Mapping[str, Callable[[], object]]:
    """From a picture to scanpaths, step by step."""
    rng = np.random.default_rng(0)
    size = (1680, 1050)
    picture = rng.integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    boxes = even_boxes(size, *GRID)
    layout = Layout(
        name="bench",
        boxes=boxes,
        cells=reading_order(*GRID, len(boxes)),
        rows=GRID[0],
        columns=GRID[1],
        size_px=size,
    )
    model = Oat(config).eval()
    crops, cells, target, _ = bench_inputs(config, 1)
    scenes = Scenes(
        crops=(crops[0],),
        cells=cells,
        shape=torch.tensor([GRID]),
        present=torch.ones(1, len(boxes), dtype=torch.bool),
    )
    first = torch.zeros_like(target)

    @torch.inference_mode()
    def encode() -> Memory:
        return model.read(scenes, first, target)

    memory = encode()
    return {
        "cut the crops of a picture": lambda: cut_crops(picture, layout, config.crop),
        "encode 84 objects": encode,
        "greedy path": lambda: decode_greedy(model, memory, max_len=STEPS),
        f"{SAMPLES} drawn paths": lambda: draw_together(model, memory),
    }
