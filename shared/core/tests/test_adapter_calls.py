"""What an edit and a record see of a transformers model: phases, positions, spans, reductions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from heed_core import observe, steer
from heed_core.adapters import transformers as adapter
from heed_core.adapters.transformers import During, ModelCall, adapt, token_spans
from heed_core.testing.tiny_vlms import IMAGE_TOKEN, VLMS, build_tiny, tiny_inputs

LLAVA_LAYERS = [f"model.language_model.layers.{layer}.self_attn" for layer in range(3)]


@torch.no_grad()
def run(model, inputs, **options):
    return model(**inputs, **options)[0]


def generate(model, name, tokens=6, **options):
    return model.generate(
        **tiny_inputs(name),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


class Calls(list):
    """An edit that changes nothing and keeps the calls."""

    def __call__(self, tensor, call):
        self.append(call)
        return tensor


def halved(weights, call):
    return weights * 0.5


def test_calls_tell_layer_phase_step_and_position():
    model, calls = build_tiny("llava"), Calls()
    with steer(model, calls):
        generate(model, "llava", tokens=4)
        generate(model, "llava", tokens=2)
    prompt = tiny_inputs("llava")["input_ids"].shape[1]
    seen = [(c.layer, c.phase, c.step, c.q_offset, c.query.shape[2], c.key.shape[2]) for c in calls]
    expected = [
        (layer, "decode", step, prompt + step - 1, 1, prompt + step)
        if step
        else (layer, "prefill", 0, 0, prompt, prompt)
        for steps in (4, 2)
        for step in range(steps)
        for layer in range(3)
    ]
    assert seen == expected
    assert [c.index for c in calls if c.layer == 1] == list(range(6))
    assert {c.site for c in calls} == set(LLAVA_LAYERS)
    assert isinstance(calls[0], ModelCall)
    assert calls[0].module is model.model.language_model.layers[0].self_attn


def test_the_mask_of_a_call_is_causality_and_padding():
    model, inputs, calls = build_tiny("llama"), tiny_inputs("llama"), Calls()
    with steer(model, calls):
        run(model, inputs)
    real = inputs["attention_mask"].bool()
    for row, (mask, kept) in enumerate(zip(calls[0].allowed[:, 0], real, strict=True)):
        for i in range(len(kept)):
            if kept[i]:
                want = [j <= i and bool(kept[j]) for j in range(len(kept))]
                assert mask[i].tolist() == want, (row, i)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_edit_of_one_phase_leaves_the_other(implementation):
    model = build_tiny("llava")
    model.set_attn_implementation(implementation)
    with adapt(model):
        plain = generate(model, "llava").logits
        with steer(model, During("decode", halved)):
            decode = generate(model, "llava").logits
        with steer(model, During("prefill", halved)):
            prefill = generate(model, "llava").logits
    assert torch.equal(decode[0], plain[0])
    assert not torch.equal(decode[1], plain[1])
    assert not torch.equal(prefill[0], plain[0])


def test_the_two_phases_together_are_the_whole_edit():
    model = build_tiny("llava")
    with steer(model, During("decode", halved)), steer(model, During("prefill", halved)):
        parts = generate(model, "llava").logits
    with steer(model, halved):
        whole = generate(model, "llava").logits
    assert torch.equal(torch.stack(parts), torch.stack(whole))


def test_a_phase_without_its_edit_runs_fused_attention(monkeypatch):
    model = build_tiny("llava")
    model.set_attn_implementation("sdpa")
    explicit = []
    eager = adapter.attend_eager
    monkeypatch.setattr(
        adapter, "attend_eager", lambda *args: explicit.append(args[2]) or eager(*args)
    )
    with steer(model, During("decode", halved), LLAVA_LAYERS[1]):
        generate(model, "llava", tokens=4)
    assert [(call.phase, call.step, call.layer) for call in explicit] == [
        ("decode", step, 1) for step in (1, 2, 3)
    ]


@pytest.mark.bad_input
def test_an_unknown_phase_is_named():
    with pytest.raises(ValueError, match="phase must be one of"):
        During("both", halved)


def test_a_growing_cache_is_needed():
    model = build_tiny("llava")
    with pytest.raises(ValueError, match="StaticCache of fixed size"), observe(model):
        generate(model, "llava", cache_implementation="static")
    assert model.config.text_config._attn_implementation == "eager"
    generate(model, "llava", cache_implementation="static")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", VLMS)
def test_spans_follow_the_keys_through_generation(name, beams):
    model, inputs, calls = build_tiny(name), tiny_inputs(name), Calls()
    image = inputs["input_ids"] == IMAGE_TOKEN
    with adapt(model, key_spans=token_spans(inputs["input_ids"], IMAGE_TOKEN)), steer(model, calls):
        generate(model, name, num_beams=beams)
    assert len(calls) == 18
    prompt = image.shape[1]
    for call in calls:
        assert call.key_spans.shape == (2 * beams, call.key.shape[2])
        marked = call.key_spans >= 0
        assert torch.equal(marked[:, :prompt], image.repeat_interleave(beams, dim=0))
        assert not marked[:, prompt:].any()


def test_spans_move_with_a_sliding_window():
    model, inputs, calls = build_tiny("gemma2"), tiny_inputs("gemma2", lengths=(9,)), Calls()
    prompt = inputs["input_ids"].shape[1]  # longer than the window of 6
    positions = torch.arange(prompt)[None]  # every token its own span
    with adapt(model, key_spans=positions), steer(model, calls):
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    sliding = [call for call in calls if call.layer == 0 and call.phase == "decode"]
    assert [call.key.shape[2] for call in sliding] == [6, 6]
    for step, call in enumerate(sliding, start=1):
        newest = prompt + step - 1
        want = [j if j < prompt else -1 for j in range(newest - 5, newest + 1)]
        assert call.key_spans[0].tolist() == want


def test_spans_of_another_prompt_are_refused():
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    spans = token_spans(inputs["input_ids"], IMAGE_TOKEN)
    with adapt(model, key_spans=spans) as adaptation, steer(model, halved):
        run(model, inputs)
        longer = tiny_inputs("llava", lengths=(12, 5))
        with pytest.raises(ValueError, match="of a prompt of 14 tokens, this one has 17"):
            run(model, longer)
        adaptation.key_spans = longer["input_ids"] == IMAGE_TOKEN
        run(model, longer)
        three = tiny_inputs("llava", lengths=(12, 5, 4))
        with pytest.raises(ValueError, match="key_spans have 2 rows, the call has 3"):
            run(model, three)
    t5, ids = build_tiny("t5"), tiny_inputs("t5")["input_ids"]
    with (
        adapt(t5, key_spans=ids == 3),
        steer(t5, halved),
        pytest.raises(ValueError, match="encoder-decoder"),
    ):
        run(t5, {"input_ids": ids, "decoder_input_ids": ids})


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_spans_number_the_runs_of_every_row(rows):
    spans = token_spans(torch.tensor(rows).long() * 5, 5)
    for row, found in zip(rows, spans.tolist(), strict=True):
        span, want, before = -1, [], False
        for marked in row:
            span += marked and not before
            want.append(span if marked else -1)
            before = marked
        assert found == want


def test_spans_of_given_lengths_may_touch():
    ids = torch.tensor([[1, 7, 7, 7, 2], [7, 7, 2, 7, 7]])
    assert token_spans(ids, 7, lengths=[2, 1, 1, 3]).tolist() == [
        [-1, 0, 0, 1, -1],
        [0, 1, -1, 1, 1],
    ]
    for wrong in ([2, 1, 4, 1], [2, 1, 2], [2, 1, 4, 0]):
        with pytest.raises(ValueError, match="lengths"):
            token_spans(ids, 7, lengths=wrong)


def test_edits_compose_and_the_record_shows_both_ends():
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    with observe(model) as plain:
        run(model, inputs)
    site = LLAVA_LAYERS[0]
    with (
        observe(model, site, stage="raw") as raw,
        observe(model, site) as final,
        steer(model, lambda w, call: w + 1, site),
        steer(model, lambda w, call: w * 2, site),
    ):
        run(model, inputs)
    assert torch.equal(raw[site], plain[site])
    allowed = plain[site] > 0
    assert torch.equal(final[site][allowed], ((plain[site] + 1) * 2)[allowed])


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e30])
@pytest.mark.parametrize("name", ["llava", "gemma2", "gpt_oss"])
def test_no_edit_of_scores_opens_the_future(name, factor):
    model, inputs = build_tiny(name), tiny_inputs(name)
    with steer(model, lambda s, call: s * factor, at="scores"), observe(model) as record:
        assert run(model, inputs).isfinite().all()
    for weights in record.values():
        real = weights[0]  # the row without padding
        assert (real.triu(1) == 0).all()
        assert (real.sum(-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("name", ["llava", "gpt_oss"])
def test_a_row_without_scores_attends_to_nothing(name):
    model, inputs = build_tiny(name), tiny_inputs(name)
    minus = torch.tensor(-torch.inf)
    with steer(model, lambda s, call: s + minus, at="scores"), observe(model) as record:
        assert run(model, inputs).isfinite().all()
    for weights in record.values():
        assert (weights == 0).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_head_outputs_can_be_edited(implementation):
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    model.set_attn_implementation(implementation)

    def without_head_two(tensor, call):
        return tensor.index_fill(1, torch.tensor([2]), 0.0)

    with steer(model, without_head_two, at="output"):
        outputs = run(model, inputs)
    with steer(model, without_head_two, at="weights"):
        weights = run(model, inputs)
    with adapt(model):
        plain = run(model, inputs)
    torch.testing.assert_close(outputs, weights, rtol=0, atol=1e-5)
    assert (outputs - plain).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_reduced_records_hold_no_map_during_generation(implementation):
    model = build_tiny("llava")
    model.set_attn_implementation(implementation)
    with observe(model, keep="all") as full:
        generate(model, "llava")
    with (
        observe(model, reduce="heads", keep="all") as heads,
        observe(model, queries=[-1], heads=[3, 6], keep="all") as newest,
        observe(model, reduce="stats") as stats,
    ):
        generate(model, "llava")
    for site in LLAVA_LAYERS:
        maps = full.calls(site)
        assert len(maps) == 6
        close = {"rtol": 0, "atol": 1e-5}
        for whole, mean, row in zip(maps, heads.calls(site), newest.calls(site), strict=True):
            torch.testing.assert_close(mean, whole.mean(1), **close)
            torch.testing.assert_close(row, whole[:, [3, 6], -1:], **close)
        rows = [whole.transpose(0, 1).flatten(1, 2).double() for whole in maps]  # (h, b n, m)
        largest = torch.cat([one.amax(-1) for one in rows], dim=1).mean(1)
        torch.testing.assert_close(stats[site][:, 1], largest, **close)
        assert stats[site].shape == (8, 3)


def test_the_gradient_of_recorded_weights_is_that_of_the_loss():
    # All of this model computes in float64, which the difference quotient needs.
    model, inputs = build_tiny("gpt2").double(), tiny_inputs("gpt2")
    site = "transformer.h.1.attn"

    def loss_of(output):
        return output[0].log_softmax(-1)[:, -1, 7].sum()

    with observe(model, site, grad=True) as record:
        (gradient,) = torch.autograd.grad(loss_of(model(**inputs)), record[site])
    direction = torch.randn(record[site].shape, dtype=torch.float64).tril()
    step = 1e-5
    values = []
    for sign in (1, -1):
        move = direction * (sign * step)
        with steer(model, lambda w, call, move=move: w + move, site), torch.no_grad():
            values.append(loss_of(model(**inputs)))
    # The permission is re-applied after an edit, so forbidden pairs do not move.
    moved = direction * (record[site] > 0)
    expected = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradient * moved).sum(), expected, rtol=1e-6, atol=1e-9)


def test_training_drops_weights_as_eager_does():
    model, inputs = build_tiny("llama"), tiny_inputs("llama")
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(3)
    expected = run(model, inputs)
    torch.manual_seed(3)
    with steer(model, lambda w, call: w.clone()), observe(model) as record:
        assert torch.equal(run(model, inputs), expected)
    torch.testing.assert_close(record["model.layers.0.self_attn"].sum(-1), torch.ones(2, 8, 10))


def test_every_tiny_vlm_gives_the_gradient_of_its_weights():
    for name in VLMS:
        model, inputs = build_tiny(name), tiny_inputs(name)
        with observe(model, "*.layers.1.*", grad=True) as record:
            loss = model(**inputs).logits[:, -1, 7].sum()
        (gradient,) = torch.autograd.grad(loss, list(record.values()))
        assert gradient[:, :, -1].abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_models_own(dtype):
    model, inputs = build_tiny("llama").to(dtype), tiny_inputs("llama", lengths=(9,))
    expected = run(model, inputs)
    with steer(model, lambda w, call: w.clone()):
        assert torch.equal(run(model, inputs), expected)
    assert expected.dtype == dtype


def test_a_boolean_mask_is_a_permission():
    model, calls = build_tiny("llama"), Calls()
    inputs = tiny_inputs("llama", lengths=(9,))
    expected = run(model, inputs)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length).tril().bool()
    with steer(model, calls):
        assert torch.equal(run(model, inputs), expected)
    assert torch.equal(calls[0].allowed, inputs["attention_mask"])


def test_continuous_batching_is_refused():
    query = torch.randn(1, 2, 3, 4)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="paged"):
        adapter.attend_eager_or_fused(module, query, query, query, None, cache=object())
