"""MoRE's text tower from checkpoint folders of RoBERTa, BERT, DistilBERT; what cannot serve."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heed_core.errors import InputError
from heed_medical.more import More, TextConfig, TextTower, small_config
from heed_medical.more.attribution import text_map
from heed_medical.more.text import folder_config

transformers = pytest.importorskip("transformers")

TINY = TextConfig(
    vocabulary=260, dim=16, depth=2, heads=2, hidden=32, positions=66, max_tokens=64, lora_rank=4
)
SIZES = {
    "vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40,
}  # fmt: skip
PAIR = ("clear lungs", "edema")
PIECES = ("clear", "lungs", "ed", "##ema", "rate")
BERT = {name: i for i, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *PIECES))}


def write_bert_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(BERT) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def write_roberta_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ("<s>", "<pad>", "</s>", "<unk>", "edema", "lungs", "clear")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip


def write(folder: Path, kind: str) -> Any:
    """A random encoder with a tokenizer; the encoder."""
    torch.manual_seed(0)
    (write_roberta_tokenizer if kind == "roberta" else write_bert_tokenizer)(folder)
    if kind == "roberta":
        sizes = {**SIZES, "vocab_size": 7, "type_vocab_size": 1}
        model = transformers.RobertaModel(transformers.RobertaConfig(**sizes))
    elif kind == "distilbert":
        names = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim")
        config = dict(zip(names, SIZES.values(), strict=False))
        config = transformers.DistilBertConfig(**config, max_position_embeddings=40)
        model = transformers.DistilBertModel(config)
    else:
        model = transformers.BertModel(transformers.BertConfig(**SIZES))
    model.eval().save_pretrained(folder)
    return model


KINDS = pytest.mark.parametrize(
    ("kind", "most", "row", "types"),
    [
        ("roberta", 38, [0, 6, 5, 2, 2, 4, 2], [0] * 7),
        ("bert", 40, [2, 4, 5, 3, 6, 7, 3], [0, 0, 0, 0, 1, 1, 1]),
        ("distilbert", 40, [2, 4, 5, 3, 6, 7, 3], [0, 0, 0, 0, 1, 1, 1]),
    ],
)


@KINDS
def test_a_tower_from_a_folder_is_its_encoder(
    kind: str, most: int, row: list[int], types: list[int], tmp_path: Path
):
    theirs = write(tmp_path, kind)
    config = folder_config(tmp_path, TINY)
    assert (config.dim, config.depth, config.heads, config.hidden) == (16, 2, 2, 32)
    assert (config.max_tokens, config.positions) == (most, 40)
    tower = TextTower(config).eval()
    tower.load_folder(tmp_path)
    tokens = tower.tokens([PAIR, ("", "edema")])
    assert tokens.ids[0].tolist() == row
    assert tokens.types[0].tolist() == types
    assert tokens.ids[1].tolist()[-3:] == [config.padding] * 3
    given = {"attention_mask": tokens.mask.long(), "input_ids": tokens.ids}
    if kind == "bert":
        given["token_type_ids"] = tokens.types
    with torch.no_grad():
        hidden = theirs(**given).last_hidden_state
        wanted = torch.stack([hidden[0].mean(0), hidden[1, : int(tokens.mask[1].sum())].mean(0)])
        assert torch.allclose(tower(*tokens), wanted, atol=1e-6)
        again = TextTower(config).eval()
        again.load_state_dict(tower.state_dict())
        assert torch.equal(again(*again.tokens([PAIR])), tower(*tower.tokens([PAIR])))
    assert len(tower.encode(("clear " * 60, "edema"))) == most


@KINDS
def test_query_and_value_are_adapted(
    kind: str, most: int, row: list[int], types: list[int], tmp_path: Path
):
    write(tmp_path, kind)
    tower = TextTower(folder_config(tmp_path, TINY))
    tower.load_folder(tmp_path)
    trained = {name for name, p in tower.named_parameters() if p.requires_grad}
    adapters = sorted(name for name in trained if ".lora_A." in name)
    names = ("q_lin", "v_lin") if kind == "distilbert" else ("query", "value")
    assert [name.split(".lora_A")[0].rpartition(".")[2] for name in adapters] == [*names, *names]
    assert all("lora_" in name or name.endswith("bias") for name in trained)
    tower.train()(*tower.tokens([PAIR])).sum().backward()
    unused = [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


@KINDS
def test_words_have_the_relevance_of_their_pieces(
    kind: str, most: int, row: list[int], types: list[int], tmp_path: Path
):
    write(tmp_path, kind)
    text = folder_config(tmp_path, TINY)
    model = More(replace(small_config(), modalities=("xray", "text"), text=text)).eval()
    model.text.load_folder(tmp_path)
    words, relevance = text_map(model, PAIR, torch.ones(64) / 8)
    assert words == ["clear", "lungs", "edema"]
    assert relevance.shape == (3,)
    assert (relevance >= 0).all()


def test_a_folder_settles_a_tower_that_needs_no_folder(tmp_path: Path):
    write(tmp_path, "bert")
    config = folder_config(tmp_path, TINY)
    described = json.loads(config.architecture)
    assert described["model_type"] == "bert"
    assert str(tmp_path) not in config.architecture
    for path in tmp_path.iterdir():
        path.unlink()
    assert TextTower(config).encoder.config.hidden_size == 16


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.T5Config(vocab_size=9, d_model=16), "'t5', an encoder and decoder"),
        (transformers.GPT2Config(vocab_size=9, n_embd=16), "'gpt2', a causal model"),
        (transformers.BertConfig(**SIZES, is_decoder=True), "'bert', a causal model"),
        (transformers.ViTConfig(hidden_size=16), "'vit', which does not read text"),
    ],
)
def test_models_that_cannot_serve_are_named(config: Any, said: str, tmp_path: Path):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"config\.json: is of the type {said}"):
        folder_config(tmp_path, TINY)


def test_broken_folders(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        folder_config(tmp_path, TINY)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a text model"):
        folder_config(tmp_path, TINY)
    write(tmp_path, "bert")
    config = folder_config(tmp_path, TINY)
    other = transformers.BertModel(transformers.BertConfig(**{**SIZES, "hidden_size": 8}))
    other.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not the model of the settings"):
        TextTower(config).load_folder(tmp_path)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no weights encoder\.layer\.1.*1 are missing"):
        TextTower(config).load_folder(tmp_path)
    small = transformers.BertModel(transformers.BertConfig(**{**SIZES, "vocab_size": 8}))
    small.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="with the token 8, its encoder knows 8"):
        folder_config(tmp_path, TINY)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no tokenizer"):
        folder_config(tmp_path, TINY)


def test_an_encoder_without_layers_of_its_own_for_query_and_value_takes_no_adapters(
    tmp_path: Path,
):
    write_bert_tokenizer(tmp_path)
    config = transformers.ModernBertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    transformers.ModernBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"modernbert.*set lora_rank to 0"):
        folder_config(tmp_path, TINY)
    tower = TextTower(folder_config(tmp_path, replace(TINY, lora_rank=0)))
    tower.load_folder(tmp_path)
    assert tower(*tower.tokens([PAIR])).shape == (1, 16)


@pytest.mark.parametrize(("pool", "length"), [("mean", 4), ("mean-all", 12)])
def test_prompts_are_shorter_than_reports(pool: str, length: int):
    tower = TextTower(replace(TINY, pool=pool, prompt_tokens=12))  # type: ignore[arg-type]
    assert tower.tokens([("ab", "")], prompt=True).ids.shape == (1, length)
    assert tower.tokens([("a" * 99, "")], prompt=True).ids.shape == (1, 12)
    assert tower.tokens([("a" * 99, "")]).ids.shape == (1, 64)
    with pytest.raises(ValueError, match="prompt_tokens must be at least 8, got 7"):
        replace(TINY, prompt_tokens=7)
