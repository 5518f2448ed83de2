"""Text encoders of transformers, from a local checkpoint folder; nothing is asked of a hub.

Any encoder of text will do: RoBERTa, BERT, DistilBERT, ELECTRA, MPNet and others. Special tokens
and the way that two texts are joined are the tokenizer's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heed_core.errors import InputError, MissingExtra, reason_of

_FORGOTTEN = ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path")
"""What a configuration says of a file; networks are built in single precision."""
_ADAPTED = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"), ("q", "v"))
"""Names of the query's and the value's layer, where peft does not know an architecture."""


def transformers_library() -> Any:
    """The library transformers.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "heed-medical[text]") from None
    return transformers


def read_configuration(folder: Path) -> Any:
    """The configuration of the encoder in a checkpoint folder.

    Raises:
        InputError: There is none that can be read, or the model is no encoder of text.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError("does not exist", path=path, remedy="give a folder of transformers")
    library = transformers_library()
    try:
        found = library.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, for a damaged or foreign folder
        reason = reason_of(error)
        raise InputError(f"cannot be read as a text model ({reason})", path=path) from error
    if reason := _unfit(found):
        raise InputError(
            f"is of the type {found.model_type!r}, {reason}",
            path=path,
            remedy="give an encoder such as RoBERTa, BERT or DistilBERT",
        )
    return found


def _unfit(found: Any) -> str:
    """Why a model gives no hidden states that look both ways over a text; empty if it does."""
    from transformers.models.auto import modeling_auto

    if getattr(found, "is_encoder_decoder", False):
        return "an encoder and decoder"
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    kind = found.model_type
    if getattr(found, "is_decoder", False) or (kind in causal and kind not in masked):
        return "a causal model, whose tokens do not see what follows them"
    if not all(isinstance(getattr(found, n, None), int) for n in ("vocab_size", "hidden_size")):
        return "which does not read text"
    return ""


def architecture_of(found: Any) -> str:
    """A configuration as one line of JSON, of which `build_encoder` makes a network."""
    content = {name: x for name, x in found.to_diff_dict().items() if name not in _FORGOTTEN}
    return json.dumps(content | {"model_type": found.model_type}, sort_keys=True)


def build_encoder(architecture: str) -> Any:
    """A random encoder of the type and sizes of `architecture_of`."""
    library = transformers_library()
    content = json.loads(architecture)
    found = library.AutoConfig.for_model(content.pop("model_type"), **content)
    return library.AutoModel.from_config(found, trust_remote_code=False)


def most_tokens(found: Any, architecture: str) -> int | None:
    """The longest text that an encoder has positions for; None: any length.

    RoBERTa and its kin number positions from behind the number of the padding.
    """
    positions = getattr(found, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    with torch.device("meta"):
        modules = build_encoder(architecture).named_modules()
    tables = [m for name, m in modules if name.endswith("position_embeddings")]
    paddings = [m.padding_idx for m in tables if isinstance(m, nn.Embedding)]
    return positions - max((p + 1 for p in paddings if p is not None), default=0)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the encoder in a checkpoint folder.

    Raises:
        InputError: They cannot be read, or some of the encoder's are not there.
    """
    library = transformers_library()
    try:
        found, told = library.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # of many kinds, for a damaged or foreign folder
        reason = reason_of(error)
        raise InputError(f"cannot be read as a text model ({reason})", path=folder) from error
    if lacking := sorted(name for name in told["missing_keys"] if "pooler" not in name):
        raise InputError(
            f"has no weights {lacking[0]} ({len(lacking)} are missing)",
            path=folder,
            remedy="copy the folder again",
        )
    weights: dict[str, torch.Tensor] = found.state_dict()
    return weights


def tokenizer_json(folder: Path, vocabulary: int) -> tuple[bytes, int]:
    """The tokenizer of a checkpoint folder as one JSON document, and its number of padding.

    Args:
        folder: Of the checkpoint.
        vocabulary: How many tokens its encoder knows.

    Raises:
        InputError: There is none that can be read, or it has none or too many tokens.
    """
    library = transformers_library()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        text: str = tokenizer.backend_tokenizer.to_str()
        numbers = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    except Exception as error:  # of many kinds, for a damaged or foreign folder
        reason = reason_of(error)
        raise InputError(f"has no tokenizer that can be read ({reason})", path=folder) from error
    if not numbers:
        raise InputError(
            "has no tokenizer that can be read (it has no tokens)",
            path=folder,
            remedy="copy tokenizer.json or the vocabulary into it",
        )
    if max(numbers) >= vocabulary:
        raise InputError(
            f"has a tokenizer with the token {max(numbers)}, its encoder knows {vocabulary}",
            path=folder,
        )
    return text.encode(), tokenizer.pad_token_id or 0


def with_adapters(encoder: Any, *, rank: int, alpha: int, dropout: float) -> Any:
    """Low-rank adapters of query and value; they and all biases are trained, the rest is not.

    Raises:
        ValueError: Query and value of this architecture have no layers of their own.
        MissingExtra: The library peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MissingExtra("peft", "heed-medical[text]") from None
    adapters = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_query_and_value(encoder),
        bias="all",
    )
    return peft.inject_adapter_in_model(adapters, encoder)


def _query_and_value(encoder: Any) -> list[str]:
    """The names of these layers: as peft has them, else the usual ones."""
    from peft.utils import constants

    kind = encoder.config.model_type
    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    leaves = {
        name.rpartition(".")[2] for name, m in encoder.named_modules() if isinstance(m, nn.Linear)
    }
    for names in (*([known] if known else []), *_ADAPTED):
        if set(names) <= leaves:
            return list(names)
    raise ValueError(
        f"the text tower {kind!r} has no layers for query and value that adapters go to; set "
        "lora_rank to 0"
    )
