"""Tiny Hugging Face models with random weights, and inputs for them, built without a download.

Five vision-language models cover the ways in which an image enters a decoder (fixed grid, any
resolution, two generations of multi-dimensional rotary positions, pixel shuffle); the plain ones
cover decoders and encoders without sub-configurations, an encoder-decoder with position biases and
decoders with soft-capped scores, attention sinks and sliding windows.

Example:
    >>> model = build_tiny("llava")
    >>> logits = model(**tiny_inputs("llava")).logits
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 200
IMAGE_TOKEN = 199
PAD_TOKEN = 0
START_TOKEN = 1

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": START_TOKEN,
    "eos_token_id": 2,
}
_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
_QWEN_TEXT = {
    **_TEXT,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
    },
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 14,
    "temporal_patch_size": 2,
}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 198,
    "vision_start_token_id": 197,
    "vision_end_token_id": 196,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel:
    """One tiny model: how it is built and fed."""

    build: Callable[[], "PreTrainedModel"]
    parameters: int | None = None
    """Exact number of parameters, where a specification states it."""
    image_tokens: int = 0
    """Placeholders that one image takes in the prompt."""
    image_inputs: Callable[[int], dict[str, Tensor]] | None = None
    """Pixels and their sizes for this many images, as the model's processor would give them."""
    text_prefix: str = ""
    """Module path of the text decoder's list of layers."""


def _llava() -> "PreTrainedModel":
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_CLIP),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE_TOKEN,
    )
    return LlavaForConditionalGeneration(config)


def _llava_next() -> "PreTrainedModel":
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_CLIP),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaNextForConditionalGeneration(config)


def _qwen2_vl() -> "PreTrainedModel":
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        **_QWEN_VISION,
        "embed_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2,
        "spatial_merge_size": 2,
    }
    config = Qwen2VLConfig(text_config=deepcopy(_QWEN_TEXT), vision_config=vision, **_QWEN_TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> "PreTrainedModel":
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        **_QWEN_VISION,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=deepcopy(_QWEN_TEXT), vision_config=vision, **_QWEN_TOKENS
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _internvl() -> "PreTrainedModel":
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [28, 28],
        "patch_size": [7, 7],
    }
    config = InternVLConfig(
        text_config=Qwen2Config(**_TEXT),
        vision_config=vision,
        downsample_ratio=0.5,
        image_token_id=IMAGE_TOKEN,
    )
    return InternVLForConditionalGeneration(config)


def _llama() -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT))


def _gpt2() -> "PreTrainedModel":
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=256,
        n_embd=64,
        n_layer=3,
        n_head=4,
        pad_token_id=PAD_TOKEN,
        bos_token_id=START_TOKEN,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def _gemma2() -> "PreTrainedModel":
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **_TEXT,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=2.0,
    )
    return Gemma2ForCausalLM(config)


def _gpt_oss() -> "PreTrainedModel":
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_TEXT,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return GptOssForCausalLM(config)


def _bert() -> "PreTrainedModel":
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return BertModel(config)


def _t5() -> "PreTrainedModel":
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD_TOKEN,
        eos_token_id=2,
    )
    config.decoder_start_token_id = PAD_TOKEN
    return T5ForConditionalGeneration(config)


def _vit() -> "PreTrainedModel":
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    return ViTModel(config)


def _square_images(images: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(images, 3, 28, 28)}


def _tiled_images(images: int) -> dict[str, Tensor]:
    # A 56 x 56 image: the base view and 2 x 2 tiles.
    return {
        "pixel_values": torch.randn(images, 5, 3, 28, 28),
        "image_sizes": torch.full((images, 2), 56),
    }


def _patched_images(images: int) -> dict[str, Tensor]:
    # 4 x 6 patches of 2 frames, 14 x 14 pixels and 3 channels; merged 2 x 2 into 6 tokens.
    return {
        "pixel_values": torch.randn(images * 24, 2 * 14 * 14 * 3),
        "image_grid_thw": torch.tensor([[1, 4, 6]]).repeat(images, 1),
    }


_LAYERS = "model.language_model.layers"

VLMS: dict[str, TinyModel] = {
    "llava": TinyModel(
        build=_llava,
        parameters=187_680,
        image_tokens=4,
        image_inputs=_square_images,
        text_prefix=_LAYERS,
    ),
    "llava_next": TinyModel(
        build=_llava_next,
        parameters=187_744,
        image_tokens=24,
        image_inputs=_tiled_images,
        text_prefix=_LAYERS,
    ),
    "qwen2_vl": TinyModel(
        build=_qwen2_vl,
        parameters=216_576,
        image_tokens=6,
        image_inputs=_patched_images,
        text_prefix=_LAYERS,
    ),
    "qwen2_5_vl": TinyModel(
        build=_qwen2_5_vl,
        parameters=220_640,
        image_tokens=6,
        image_inputs=_patched_images,
        text_prefix=_LAYERS,
    ),
    "internvl": TinyModel(
        build=_internvl,
        parameters=159_232,
        image_tokens=4,
        image_inputs=_square_images,
        text_prefix=_LAYERS,
    ),
}
"""The five vision-language models; text: 3 layers, 8 heads, 4 key-value heads of width 8."""

PLAIN: dict[str, TinyModel] = {
    "llama": TinyModel(build=_llama, text_prefix="model.layers"),
    "gpt2": TinyModel(build=_gpt2, text_prefix="transformer.h"),
    "gemma2": TinyModel(build=_gemma2, text_prefix="model.layers"),
    "gpt_oss": TinyModel(build=_gpt_oss, text_prefix="model.layers"),
    "bert": TinyModel(build=_bert, text_prefix="encoder.layer"),
    "t5": TinyModel(build=_t5, text_prefix="decoder.block"),
    "vit": TinyModel(build=_vit, image_inputs=_square_images),
}
"""Decoders, encoders and an encoder-decoder whose configuration has no sub-configurations."""

_ALL = {**VLMS, **PLAIN}


def build_tiny(name: str, *, seed: int = 0, spread: float = 5.0) -> "PreTrainedModel":
    """A tiny model in eval mode, on the eager attention of transformers.

    Args:
        name: A key of `VLMS` or `PLAIN`.
        seed: Seed of the random weights; the global generator is left as it was.
        spread: Factor on the weight matrices. Fresh weights give almost uniform attention, in
            which a mistake hardly moves the output; larger ones give attention with a shape.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = _ALL[name].build()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    model.set_attn_implementation("eager")
    model.train(False)
    return model


def tiny_inputs(
    name: str, *, lengths: tuple[int, ...] = (9, 5), seed: int = 1
) -> dict[str, Tensor]:
    """Inputs as the model's processor would give them: one image and some text in every row.

    Rows of unequal length are padded on the left, as generation wants it.

    Args:
        name: A key of `VLMS` or `PLAIN`.
        lengths: Number of text tokens of every row, besides the start token and the image's.
        seed: Seed of tokens and pixels; row i does not depend on the other rows' text.
    """
    kind = _ALL[name]
    rows = [_tokens(kind, length, seed + i) for i, length in enumerate(lengths)]
    inputs: dict[str, Tensor] = {}
    if kind.image_inputs is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inputs.update(kind.image_inputs(len(rows)))
    if not kind.text_prefix:
        return inputs
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD_TOKEN)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    inputs.update(input_ids=ids, attention_mask=mask)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return inputs


def _tokens(kind: TinyModel, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 190, (length,), generator=generator)
    image = torch.full((kind.image_tokens,), IMAGE_TOKEN)
    return torch.cat([torch.tensor([START_TOKEN]), text[: length // 2], image, text[length // 2 :]])
