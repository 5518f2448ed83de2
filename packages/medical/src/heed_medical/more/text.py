"""The text tower of MoRE: a RoBERTa with low-rank adapters, and its tokenizers.

The tower and a tokenizer are all in the model: the tokenizer of a checkpoint folder lies in its
state as bytes, so that a trained model needs no other file. Without a checkpoint the tower is
random and its tokens are the bytes of UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from heed_core.errors import InputError, MissingExtra, reason_of
from heed_medical.more.towers import initial_std

START, PADDING, END = 0, 1, 2
"""Numbers of RoBERTa's special tokens."""
SPECIALS = 4
BYTE_VOCABULARY = 256 + SPECIALS
_FAMILY = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower; the defaults are those of RoBERTa-base with MoRE's adapters."""

    vocabulary: int = 50265
    dim: int = 768
    """Channels of a token."""
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    """Channels inside the feed-forward."""
    positions: int = 514
    """Longest text + 2."""
    dropout: float = 0.1
    norm_eps: float = 1e-5
    max_tokens: int = 512
    """Longer texts are cut."""
    lora_rank: int = 16
    """Of the adapters of query and value, which are trained with all biases; 0: no adapters, the
    whole tower is trained."""
    lora_alpha: int = 8
    lora_dropout: float = 0.1
    pool: Literal["mean", "mean-all"] = "mean"
    """Mean over the tokens of a text; mean-all: over the padding to max_tokens too, as released."""
    tokenizer_bytes: int = 0
    """Size of the tokenizer's file in the model; 0: tokens are bytes. Settled by the checkpoint."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "dim", "depth", "heads", "hidden", "max_tokens", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_rank", "tokenizer_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads={self.heads}, got {self.dim}")
        if self.positions < self.max_tokens + 2:
            raise ValueError(
                f"positions must be max_tokens + 2 = {self.max_tokens + 2} at least, got "
                f"{self.positions}"
            )
        if not self.tokenizer_bytes and self.vocabulary < BYTE_VOCABULARY:
            raise ValueError(f"bytes need a vocabulary of {BYTE_VOCABULARY}, got {self.vocabulary}")


Text = tuple[str, str]
"""The report of an X-ray and of an ECG; either may be empty."""


class TextTower(nn.Module):
    """RoBERTa, and the mean of its last hidden states.

    Raises:
        MissingExtra: The libraries transformers or peft are not installed.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _roberta(config)
        self.register_buffer("tokenizer", torch.zeros(config.tokenizer_bytes, dtype=torch.uint8))
        self._parsed: Any = None

    def forward(self, ids: Int64[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """The sentence vectors of tokens; `mask` is True for a token, False for padding."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if self.config.pool == "mean-all":
            vectors = hidden.mean(dim=1)
        else:
            share = mask.unsqueeze(2).to(hidden.dtype)
            vectors = (hidden * share).sum(dim=1) / share.sum(dim=1).clamp(min=1)
        if self.training:  # the pooler is unused, but all biases are trained: DDP wants a gradient
            unused = [p for p in self.encoder.pooler.parameters() if p.requires_grad]
            vectors = vectors + 0.0 * sum(p.sum() for p in unused)
        return cast(Tensor, vectors)

    def tokens(self, texts: Sequence[Text]) -> tuple[Int64[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Token numbers and their mask, on the device of the tower."""
        rows = [self.encode(text) for text in texts]
        longest = max(map(len, rows))
        if self.config.pool == "mean-all":
            longest = self.config.max_tokens
        ids = torch.full((len(rows), longest), PADDING)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        device = self.encoder.embeddings.word_embeddings.weight.device
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        mask = torch.arange(longest) < lengths
        return ids.to(device), mask.to(device)

    def encode(self, text: Text) -> list[int]:
        """`<s> a </s></s> b </s>`, cut to the longest text."""
        parts = [self.pieces(part) for part in text if part]
        most = self.config.max_tokens - 2 * max(len(parts), 1)
        parts = _cut_longest(parts, most)
        row = [START]
        for number, part in enumerate(parts):
            row += [*([END] if number else []), *part, END]
        return row if parts else [START, END]

    def pieces(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        if not self.config.tokenizer_bytes:
            return [SPECIALS + byte for byte in text.encode()]
        ids: list[int] = self._tokenizer().encode(text, add_special_tokens=False).ids
        return ids

    def words(self, ids: Sequence[int]) -> list[str]:
        """Each token as text; special tokens are empty."""
        if not self.config.tokenizer_bytes:
            return [bytes([i - SPECIALS]).decode("latin-1") if i >= SPECIALS else "" for i in ids]
        return [self._tokenizer().decode([i], skip_special_tokens=True) for i in ids]

    def _tokenizer(self) -> Any:
        if self._parsed is None:
            from tokenizers import Tokenizer

            text = bytes(cast(Tensor, self.tokenizer).cpu().numpy()).decode()
            self._parsed = Tokenizer.from_str(text)
            self._parsed.no_padding()
            self._parsed.no_truncation()
        return self._parsed

    def load_folder(self, folder: Path) -> None:
        """Take weights and tokenizer from a checkpoint folder of transformers.

        Raises:
            InputError: The folder is not of a RoBERTa of this size.
        """
        transformers = _transformers()
        try:
            found = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of many kinds, for a damaged or foreign folder
            reason = reason_of(error)
            raise InputError(f"cannot be read as a text model ({reason})", path=folder) from error
        theirs = found.state_dict()
        own = self.encoder.state_dict()
        names = {name: name.replace(".base_layer.", ".") for name in own if ".lora_" not in name}
        wrong = [
            name
            for name, other in names.items()
            if "pooler" not in other
            and (other not in theirs or theirs[other].shape != own[name].shape)
        ]
        if wrong:
            raise InputError(
                f"is not the model of the settings: {wrong[0]} differs",
                path=folder,
                remedy="let --training.text-folder settle the settings of the text tower",
            )
        weights = {n: theirs[other] for n, other in names.items() if other in theirs}
        self.encoder.load_state_dict(weights, strict=False)
        blob = torch.frombuffer(bytearray(tokenizer_json(folder)), dtype=torch.uint8)
        if len(blob) != self.config.tokenizer_bytes:
            raise InputError("has another tokenizer than at the start of training", path=folder)
        cast(Tensor, self.tokenizer).copy_(blob)
        self._parsed = None


def folder_config(folder: Path, config: TextConfig) -> TextConfig:
    """`config` with the sizes of a checkpoint folder.

    Raises:
        InputError: It is not a folder of a RoBERTa with a tokenizer.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError("does not exist", path=path, remedy="give a folder of transformers")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"is not JSON ({error})", path=path) from None
    if found.get("model_type") not in _FAMILY:
        raise InputError(
            f"is of the type {found.get('model_type')!r}, not of {', '.join(_FAMILY)}", path=path
        )
    try:
        positions = int(found.get("max_position_embeddings", 514))
        return replace(
            config,
            vocabulary=int(found["vocab_size"]),
            dim=int(found["hidden_size"]),
            depth=int(found["num_hidden_layers"]),
            heads=int(found["num_attention_heads"]),
            hidden=int(found["intermediate_size"]),
            positions=positions,
            max_tokens=min(config.max_tokens, positions - 2),
            norm_eps=float(found.get("layer_norm_eps", 1e-5)),
            tokenizer_bytes=len(tokenizer_json(folder)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"has no usable {error}", path=path) from None


def tokenizer_json(folder: Path) -> bytes:
    """The tokenizer of a checkpoint folder as one JSON document.

    Raises:
        InputError: There is none that can be read, or its special tokens are not RoBERTa's.
    """
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # of many kinds, for a damaged or foreign folder
        reason = reason_of(error)
        raise InputError(f"has no tokenizer that can be read ({reason})", path=folder) from error
    found = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    if found != (START, PADDING, END):
        raise InputError(
            f"numbers <s>, <pad>, </s> as {found}, not {(START, PADDING, END)}", path=folder
        )
    return text.encode()


def _roberta(config: TextConfig) -> Any:
    transformers = _transformers()
    encoder = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            max_position_embeddings=config.positions,
            type_vocab_size=1,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            layer_norm_eps=config.norm_eps,
            initializer_range=initial_std(config.dim),
            bos_token_id=START,
            pad_token_id=PADDING,
            eos_token_id=END,
        )
    )
    if not config.lora_rank:
        return encoder
    try:
        import peft
    except ImportError:
        raise MissingExtra("peft", "heed-medical[text]") from None
    adapters = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=["query", "value"],
        bias="all",
    )
    return peft.inject_adapter_in_model(adapters, encoder)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "heed-medical[text]") from None
    return transformers


def _cut_longest(parts: list[list[int]], most: int) -> list[list[int]]:
    """Take tokens off the end of the longer part until all have room."""
    parts = [list(part) for part in parts]
    while (extra := sum(map(len, parts)) - most) > 0:
        lengths = sorted(map(len, parts))
        longest = max(parts, key=len)
        other = lengths[-2] if len(lengths) > 1 else 0
        del longest[len(longest) - min(extra, max(len(longest) - other, 1)) :]
    return parts
