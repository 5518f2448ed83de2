"""The network of IVGN: counts, identities, decoding."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from heed_core import observe
from heed_core.blocks import BlockConfig
from heed_core.sites import sites
from heed_medical.ivgn import (
    GlobalIntensiveAttention,
    GuidedDecoder,
    Ivgn,
    IvgnConfig,
    beam_search,
    load_backbone,
    report_loss,
)

TINY = IvgnConfig(words=20, backbone="conv", dim=32, heads=4, hidden=48, depth=2)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny(**changes: object) -> Ivgn:
    torch.manual_seed(0)
    fields = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    model = Ivgn(IvgnConfig(**{**fields, **changes})).eval()
    if model.gia is not None:
        nn.init.constant_(model.gia.strength, 0.7)
    return model


def pictures(batch: int = 2, views: int = 2) -> Tensor:
    return torch.randn(batch, views, 3, 40, 24, generator=torch.Generator().manual_seed(1))


def words(batch: int = 2, length: int = 9) -> Tensor:
    found = torch.randint(1, 21, (batch, length), generator=torch.Generator().manual_seed(2))
    found[:, 0] = 0
    return found


def test_parameters_of_the_paper_size():
    with torch.device("meta"):
        model = Ivgn(IvgnConfig())
        base = Ivgn(IvgnConfig(gia=False, gate=False))
    assert count(model) == 59_055_270
    assert count(base) == 56_954_169
    assert model.gia is not None
    assert {
        "extractor": count(model.extractor),
        "gia": count(model.gia),
        "projection": count(model.project),
        "encoder": count(model.encoder),
        "decoder": count(base.decoder),
        "gates": count(model.decoder) - count(base.decoder),
        "embedding": count(model.embed),
        "logits": count(model.logits),
    } == {
        "extractor": 42_500_160,
        "gia": 526_701,
        "projection": 1_049_088,
        "encoder": 4_734_976,
        "decoder": 7_889_920,
        "gates": 1_574_400,
        "embedding": 389_632,
        "logits": 390_393,
    }


@pytest.fixture
def gia() -> GlobalIntensiveAttention:
    torch.manual_seed(0)
    module = GlobalIntensiveAttention(32)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter)
    return module.eval()


def test_gia_starts_as_the_identity(gia):
    x = torch.randn(2, 32, 7, 5)
    assert torch.equal(gia(x), x)
    nn.init.constant_(gia.strength, 1.0)
    assert not torch.equal(gia(x), x)


def alone(gia: GlobalIntensiveAttention, view: int, x: Tensor) -> Tensor:
    """The gate of one view, from the output of the module with that view alone."""
    with torch.no_grad():
        gia.strength.fill_(1.0)
        gia.mixture.fill_(-1e4)
        gia.mixture[view] = 0.0
        return gia(x) / x - 1


def test_each_view_gates_what_it_is_named_after(gia):
    x = torch.rand(2, 32, 7, 5) + 0.5
    depth, space, pixel = (alone(gia, view, x) for view in range(3))
    gates = gia.views(x)
    for got, wanted in zip((depth, space, pixel), gates, strict=True):
        torch.testing.assert_close(got, wanted.expand_as(x), atol=1e-5, rtol=0)
    assert depth.flatten(2).std(2).max() < 1e-5 < depth.std(1).min()
    assert space.std(1).max() < 1e-5 < space.flatten(2).std(2).min()
    assert pixel.std(1).min() > 1e-5
    assert pixel.flatten(2).std(2).min() > 1e-5


def test_depth_and_pixel_views_commute_with_permutations_of_places(gia):
    x = torch.randn(1, 32, 7, 5)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))

    def moved(t: Tensor) -> Tensor:
        return t.flatten(2)[..., order].unflatten(2, (7, 5))

    before, after = gia.views(x), gia.views(moved(x))
    torch.testing.assert_close(after.depth, before.depth)
    torch.testing.assert_close(after.pixel, moved(before.pixel))
    assert (after.space - moved(before.space)).abs().max() > 1e-3


class PlainDecoder(nn.Module):
    """A pre-norm Transformer decoder written out, on the weights of a guided one."""

    def __init__(self, decoder: GuidedDecoder, heads: int) -> None:
        super().__init__()
        self.decoder, self.heads = decoder, heads

    def attention(self, module: nn.Module, x: Tensor, context: Tensor, causal: bool) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(2, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(module.query(x)), split(module.key(context)), split(module.value(context))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        return module.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        for layer in self.decoder.layers:
            y = layer.self_norm(x)
            x = x + self.attention(layer.self_attention, y, y, True)
            x = x + self.attention(layer.image_attention, layer.image_norm(x), image, False)
            hidden = layer.feed.expand(layer.feed_norm(x)).relu()
            x = x + layer.feed.contract(hidden)
        return self.decoder.norm(x)


def force_gate(decoder: GuidedDecoder, bias: float) -> None:
    for layer in decoder.layers:
        nn.init.zeros_(layer.gate.weight)
        nn.init.constant_(layer.gate.bias, bias)


def test_an_open_gate_is_a_plain_decoder():
    torch.manual_seed(0)
    config = BlockConfig(dim=32, heads=4, hidden=40, activation="relu", dropout=0.1)
    decoder = GuidedDecoder(config, depth=2).eval()
    x, image = torch.randn(2, 6, 32), torch.randn(2, 11, 32)
    plain = PlainDecoder(decoder, 4)(x, image)
    assert (decoder(x, image)[0] - plain).abs().max() > 1e-2
    force_gate(decoder, 1e4)
    got, reliance = decoder(x, image)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)
    assert reliance.eq(1).all()


def test_a_closed_gate_does_not_see():
    model = tiny()
    tokens = words()
    assert not torch.equal(model(pictures(), tokens), model(-pictures(), tokens))
    force_gate(model.decoder, -1e4)
    assert torch.equal(model(pictures(), tokens), model(-pictures(), tokens))


def test_reliance_lies_within_zero_and_one_and_starts_visual():
    reliance = tiny().decode(words(), tiny().encode(pictures())).reliance
    assert 0 < reliance.min() < reliance.max() < 1
    assert 0.7 < reliance.mean() < 0.95


def test_log_probabilities_sum_to_one_and_later_words_change_nothing():
    model, tokens = tiny(), words()
    before = model(pictures(), tokens)
    torch.testing.assert_close(before.exp().sum(-1), torch.ones(2, 9))
    changed = tokens.clone()
    changed[:, 5] = changed[:, 5] % 20 + 1
    after = model(pictures(), changed)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.equal(after[:, 5], before[:, 5])


def test_the_order_of_views_means_nothing():
    model = tiny()
    swapped = model(pictures().flip(1), words())
    torch.testing.assert_close(swapped, model(pictures(), words()), atol=1e-5, rtol=1e-5)


def test_patches_that_are_told_their_place_are_not_alike():
    model = tiny(patch_positions="sine")
    assert (model(pictures().flip(1), words()) - model(pictures(), words())).abs().max() > 1e-4


def test_a_view_that_is_not_there_means_nothing():
    model, tokens = tiny(), words()
    views = torch.tensor([[True, False], [True, True]])
    images = pictures()
    before = model(images, tokens, views)
    images[0, 1] = 5.0
    assert torch.equal(model(images, tokens, views), before)
    single = model(images[:1, :1], tokens[:1])
    torch.testing.assert_close(before[:1], single, atol=1e-5, rtol=1e-5)
    none = model(images, tokens, torch.zeros(2, 2, dtype=torch.bool))
    assert none.isfinite().all()


def test_a_view_that_is_not_there_does_not_move_the_running_means():
    model, tokens, images = tiny(), words(), pictures()
    views = torch.tensor([[True, False], [True, True]])
    buffers = []
    for value in (0.0, 9.0):
        images[0, 1] = value
        trained = copy.deepcopy(model).train()
        trained(images, tokens, views)
        buffers.append({n: b for n, b in trained.named_buffers() if "running" in n})
    assert buffers[0]
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name


def test_steps_with_a_cache_give_what_the_whole_gives():
    model, tokens = tiny(), words()
    memory = model.encode(pictures())
    whole = model.decode(tokens, memory)
    cache = model.decoder.new_cache(2, 9)
    with torch.no_grad():
        parts = [model.decode(tokens[:, i : i + 1], memory, cache=cache) for i in range(9)]
    steps = torch.cat([part.log_probabilities for part in parts], dim=1)
    torch.testing.assert_close(steps, whole.log_probabilities, atol=1e-5, rtol=1e-5)
    reliance = torch.cat([part.reliance for part in parts], dim=1)
    torch.testing.assert_close(reliance, whole.reliance, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beam", [1, 3])
def test_generation_is_the_same_with_and_without_cache(beam):
    model = tiny()
    with_cache = model.generate(pictures(4), beam=beam, most=12)
    without = model.generate(pictures(4), beam=beam, most=12, use_cache=False)
    assert torch.equal(with_cache.tokens, without.tokens)
    torch.testing.assert_close(with_cache.scores, without.scores, atol=1e-4, rtol=0)


def test_generation_does_not_depend_on_the_batch():
    model, images = tiny(), pictures(5)
    together = model.generate(images, beam=3, most=12).tokens
    alone = torch.cat([model.generate(one[None], beam=3, most=12).tokens for one in images])
    assert torch.equal(together, alone)


def test_scores_are_sums_of_log_probabilities():
    model, images = tiny(), pictures(6)
    tokens, scores = model.generate(images, beam=3, most=12)
    inputs = torch.cat([torch.zeros(6, 1, dtype=torch.long), tokens[:, :-1]], dim=1)
    chances = model(images, inputs).gather(2, tokens[..., None])[..., 0].double()
    behind = (inputs == 0) & (torch.arange(12) > 0)
    torch.testing.assert_close(scores, chances.masked_fill(behind, 0).sum(1), atol=1e-4, rtol=0)


def table_step(table: Tensor):
    """A model whose words depend on the row's whole past, which it keeps."""
    past: list[Tensor] = []

    def step(last: Tensor, parents: Tensor) -> Tensor:
        past[:] = [word[parents] for word in past] + [last]
        key = sum(word * (5**i) for i, word in enumerate(past))
        return table[key % len(table)].log_softmax(-1)

    return step


def exhaustive(table: Tensor, most: int) -> float:
    """The best score over all sequences, by trying all."""

    def best(past: list[int]) -> float:
        if len(past) > 1 and (past[-1] == 0 or len(past) > most):
            return 0.0
        key = sum(word * 5**i for i, word in enumerate(past)) % len(table)
        chances = table[key].log_softmax(-1).double().tolist()
        return max(chance + best([*past, word]) for word, chance in enumerate(chances))

    return best([0])


@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_finds_the_best_of_all_sequences(seed):
    table = torch.randn(97, 4, generator=torch.Generator().manual_seed(seed))
    found = beam_search(table_step(table), batch=1, beam=256, most=4)
    assert found.scores.item() == pytest.approx(exhaustive(table, 4), abs=1e-6)


def test_beams_are_rarely_worse_than_greedy():
    worse = 0
    for seed in range(40):
        table = torch.randn(97, 5, generator=torch.Generator().manual_seed(seed))
        scores = [
            beam_search(table_step(table), batch=1, beam=k, most=6).scores.item() for k in (1, 3)
        ]
        worse += scores[1] < scores[0] - 1e-9
    assert worse <= 2


def test_one_beam_is_greedy():
    table = torch.randn(97, 5, generator=torch.Generator().manual_seed(3))
    step, row, tokens = table_step(table), torch.zeros(1, dtype=torch.long), []
    last = row
    for _ in range(6):
        last = step(last, row).argmax(-1)
        tokens.append(int(last))
        if last == 0:
            break
    found = beam_search(table_step(table), batch=1, beam=1, most=6).tokens[0].tolist()
    assert found == tokens + [0] * (6 - len(tokens))


def repeats(past: list[int], word: int) -> int:
    """How often the last two words of a past were followed by a word, one place after another."""
    return sum(past[i : i + 3] == [*past[-2:], word] for i in range(len(past) - 2))


@pytest.mark.parametrize("seed", range(5))
def test_repeated_trigrams_are_penalised_as_often_as_they_occurred(seed):
    """Greedy by hand, with a model that would write the same three words again and again."""
    generator = torch.Generator().manual_seed(seed)
    table = 4 * torch.randn(5, 5, generator=generator)
    table[:, 0] = -9.0
    chances = table.log_softmax(-1).double()
    words: list[int] = []
    score = 0.0
    for _ in range(30):
        row = chances[words[-1] if words else 0].clone()
        for word in range(5):
            row[word] -= 2 * math.log(2) * repeats(words, word)
        score += float(row.max())
        words.append(int(row.argmax()))
    options = {"batch": 1, "most": 30, "beam": 1}
    found = beam_search(lambda last, _: chances[last], trigram_penalty=2 * math.log(2), **options)
    assert found.tokens[0].tolist() == words
    assert found.scores.item() == pytest.approx(score)
    plain = beam_search(lambda last, _: chances[last], **options).tokens[0].tolist()
    assert most_repeated(words) < most_repeated(plain)
    with pytest.raises(ValueError, match="trigram_penalty"):
        beam_search(lambda last, _: chances[last], trigram_penalty=-1.0, **options)


def most_repeated(words: list[int]) -> int:
    return max(Counter(zip(words, words[1:], words[2:], strict=False)).values())


def test_of_equal_scores_the_lowest_word_wins():
    even = torch.zeros(1, 4).log_softmax(-1)
    found = beam_search(lambda last, _: even.expand(len(last), -1), batch=2, beam=3, most=3)
    assert found.tokens.tolist() == [[0, 0, 0]] * 2


def test_the_loss_is_the_mean_over_real_words():
    chances = torch.randn(2, 4, 6, dtype=torch.float64).log_softmax(-1)
    tokens, lengths = torch.tensor([[3, 2, 0, 0], [1, 4, 5, 0]]), torch.tensor([3, 4])
    wanted = -sum(chances[i, j, tokens[i, j]] for i in range(2) for j in range(int(lengths[i]))) / 7
    torch.testing.assert_close(report_loss(chances, tokens, lengths), wanted)


def test_every_parameter_learns():
    model = tiny().train()
    tokens = words(4)
    loss = report_loss(model(pictures(4), tokens[:, :-1]), tokens[:, 1:], torch.full((4,), 8))
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a key's bias shifts all scores of a row alike
    assert all(name.endswith("key.bias") for name in idle), idle


def test_every_attention_is_a_site_whose_rows_sum_to_one():
    model = tiny()
    assert len(sites(model)) == 2 + 2 * 2
    with observe(model, "decoder.layers.*.image_attention.attend") as record:
        model(pictures(), words())
    weights = record["decoder.layers.1.image_attention.attend"]
    assert weights.shape == (2, 4, 9, 2 * 5 * 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))


def test_a_resnet_of_torchvision_fills_the_extractor(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(5)
    network = resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    model = tiny(backbone="resnet18", gia=False)
    load_backbone(model, tmp_path / "resnet18.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = model.extractor(x).mean((2, 3))
        torch.testing.assert_close(network.fc(pooled), network(x))
    with pytest.raises(ValueError, match="conv has no weights"):
        load_backbone(tiny(), tmp_path / "resnet18.pth")


@pytest.mark.parametrize(
    "changes", [{"heads": 5}, {"dropout": 1.0}, {"words": 0}, {"reduction": 7}], ids=str
)
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny(**changes)


@pytest.mark.bad_input
def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="images must be"):
        tiny()(torch.randn(2, 3, 40, 24), words())
