"""Observing and steering transformers models: what runs, what it equals, what is left behind."""

import gc
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

from heed_core import Attend, observe, steer
from heed_core.adapters import transformers as adapter
from heed_core.adapters.transformers import UnsupportedModelError, adapt, register
from heed_core.sites import attach_points
from heed_core.testing.tiny_vlms import IMAGE_TOKEN, PLAIN, VLMS, build_tiny, tiny_inputs

GENERATING = [*VLMS, "llama", "gpt2", "gemma2", "gpt_oss", "t5"]
FUSABLE = [*VLMS, "llama", "gpt2", "bert", "vit"]


def unchanged(tensor, call):
    """An edit that changes nothing, in a new tensor."""
    return tensor.clone()


def inputs_of(name):
    inputs = tiny_inputs(name)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    return inputs


@torch.no_grad()
def run(model, inputs, **options):
    return model(**inputs, **options)[0]


def generate(model, name, **options):
    """Six greedy tokens, with the raw scores of every step."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return model.generate(
        **tiny_inputs(name), return_dict_in_generate=True, output_logits=True, **settings
    )


def assert_same(one, two):
    assert torch.equal(one.sequences, two.sequences)
    assert torch.equal(torch.stack(one.logits), torch.stack(two.logits))


def site(name, layer):
    return f"{VLMS[name].text_prefix}.{layer}.self_attn"


def without_image(head):
    """The edit that takes the placeholders of the image from one head and renormalises."""

    def edit(weights, call):
        kept = weights[:, head].masked_fill(call.key_spans[:, None] >= 0, 0.0)
        edited = weights.clone()
        edited[:, head] = kept / kept.sum(-1, keepdim=True).clamp_min(1e-30)
        return edited

    return edit


@pytest.mark.parametrize("name", VLMS)
def test_the_tiny_models_have_the_specified_size(name):
    assert sum(p.numel() for p in build_tiny(name).parameters()) == VLMS[name].parameters


@pytest.mark.parametrize("at", ["scores", "weights", "output"])
@pytest.mark.parametrize("name", [*VLMS, *PLAIN])
def test_an_edit_that_changes_nothing_equals_eager_to_the_last_bit(name, at):
    model, inputs = build_tiny(name), inputs_of(name)
    before = run(model, inputs)
    with steer(model, unchanged, at=at):
        assert torch.equal(run(model, inputs), before)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_under_an_edit_that_changes_nothing_equals_eager(name, beams):
    model = build_tiny(name)
    plain = generate(model, name, num_beams=beams)
    with steer(model, unchanged):
        assert_same(generate(model, name, num_beams=beams), plain)


@pytest.mark.parametrize("name", VLMS)
def test_a_row_padded_on_the_left_equals_the_row_alone(name):
    model, inputs = build_tiny(name), tiny_inputs(name)
    alone = {key: value[1:] for key, value in inputs.items()}
    if "image_grid_thw" in inputs:
        alone["pixel_values"] = inputs["pixel_values"].chunk(2)[1]
    length = int(inputs["attention_mask"][1].sum())
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in alone:
            alone[key] = alone[key][:, -length:]
    with steer(model, unchanged):
        padded, single = run(model, inputs)[1, -length:], run(model, alone)[0]
    torch.testing.assert_close(padded, single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VLMS)
def test_a_head_can_be_blinded_for_the_image_and_the_context_leaves_no_trace(name):
    model, inputs = build_tiny(name), tiny_inputs(name)
    image = inputs["input_ids"] == IMAGE_TOKEN
    plain = generate(model, name, output_attentions=True)
    with (
        adapt(model, key_spans=adapter.token_spans(inputs["input_ids"], IMAGE_TOKEN)),
        steer(model, without_image(3), site(name, 1)),
    ):
        edited = generate(model, name, output_attentions=True)
    for step, layers in enumerate(edited.attentions):
        on_image = layers[1][..., : image.shape[1]] * image[:, None, None]
        mass = on_image.sum(-1)[:, :, -1]  # (b, h) of the newest row
        assert (on_image[:, 3] == 0).all()
        assert (mass[:, 2] > 0).all()
        torch.testing.assert_close(layers[1][:, 3, -1].sum(-1), torch.ones(2))
        assert not torch.equal(edited.logits[step], plain.logits[step])
    prompt, unedited = edited.attentions[0][1], plain.attentions[0][1]
    others = [head for head in range(8) if head != 3]
    assert torch.equal(prompt[:, others], unedited[:, others])
    assert torch.equal(edited.attentions[0][0], plain.attentions[0][0])
    assert_same(generate(model, name), plain)


def run_attentions(model, inputs):
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


@pytest.mark.parametrize("name", [*VLMS, "llama", "gpt2", "gemma2", "gpt_oss", "bert", "vit"])
def test_the_record_is_what_transformers_returns_as_attentions(name):
    model, inputs = build_tiny(name), inputs_of(name)
    expected = run_attentions(model, inputs)
    with observe(model) as record:
        run(model, inputs)
    assert len(record) == len(expected)
    for weights, reference in zip(record.values(), expected, strict=True):
        assert torch.equal(weights, reference)


@pytest.mark.parametrize("name", FUSABLE)
def test_beside_fused_attention_the_record_is_the_same_within_rounding(name):
    model, inputs = build_tiny(name), inputs_of(name)
    expected = run_attentions(model, inputs)
    model.set_attn_implementation("sdpa")
    with observe(model) as record:
        run(model, inputs)
    for weights, reference in zip(record.values(), expected, strict=True):
        torch.testing.assert_close(weights, reference, rtol=0, atol=1e-5)


def test_asked_for_attentions_transformers_returns_the_edited_ones():
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    model.set_attn_implementation("sdpa")
    with steer(model, lambda w, call: w * 0.5, site("llava", 2)), observe(model) as record:
        returned = run_attentions(model, inputs)
    torch.testing.assert_close(returned[2].sum(-1), torch.full((2, 8, 14), 0.5))
    torch.testing.assert_close(returned[1].sum(-1), torch.ones(2, 8, 14))
    for weights, shown in zip(record.values(), returned, strict=True):
        assert torch.equal(weights, shown)


@pytest.mark.parametrize("name", FUSABLE)
def test_sites_without_an_edit_run_fused_attention(name, monkeypatch):
    model, inputs = build_tiny(name), inputs_of(name)
    expected = run(model, inputs)
    model.set_attn_implementation("sdpa")
    layers = list(attach_points(model))
    explicit = []
    eager = adapter.attend_eager
    monkeypatch.setattr(
        adapter, "attend_eager", lambda *args: explicit.append(args) or eager(*args)
    )
    with adapt(model):
        found = run(model, inputs)
        assert not explicit
        with steer(model, unchanged, layers[1]):
            steered = run(model, inputs)
    assert len(explicit) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_without_its_mask_the_function_refuses_to_run(monkeypatch):
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    register()
    from transformers import AttentionMaskInterface

    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "heed")
    monkeypatch.setattr(adapter, "register", lambda: None)
    with (
        pytest.raises(RuntimeError, match="got no mask"),
        steer(model, unchanged),
    ):
        run(model, inputs)
    assert model.config.get_text_config()._attn_implementation == "eager"


def test_registering_again_changes_nothing():
    from transformers import AttentionInterface, AttentionMaskInterface

    register()
    before = [dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)]
    register()
    assert before == [
        dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)
    ]
    assert "heed" in before[0]
    assert "heed" in before[1]


@pytest.mark.parametrize("name", VLMS)
def test_other_parts_stay_on_their_own_implementation(name):
    model, inputs = build_tiny(name), tiny_inputs(name)
    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "eager"})
    with observe(model) as record:
        assert model.config.text_config._attn_implementation == "heed"
        assert model.config.vision_config._attn_implementation == "sdpa"
        run(model, inputs)
    assert list(record) == [site(name, layer) for layer in range(3)]
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", VLMS)
def test_other_parts_can_be_asked_for(name):
    model, inputs = build_tiny(name), tiny_inputs(name)
    expected = run(model, inputs)
    with adapt(model, parts=("text", "vision")), observe(model) as record:
        assert torch.equal(run(model, inputs), expected)
    towers = [key for key in record if key not in {site(name, layer) for layer in range(3)}]
    assert len(towers) == len(record) - 3 >= 2
    for tower in towers:
        torch.testing.assert_close(record[tower].sum(-1), torch.ones(record[tower].shape[:-1]))
    assert model.config.vision_config._attn_implementation == "eager"


def test_the_maps_of_a_vision_tower_are_those_of_eager():
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    tower = model.model.vision_tower
    with torch.no_grad():
        expected = tower(inputs["pixel_values"], output_attentions=True).attentions
    with adapt(model, parts=["vision"]), observe(model, "model.vision_tower.*") as record:
        run(model, inputs)
    for weights, reference in zip(record.values(), expected, strict=True):
        assert torch.equal(weights, reference)


def test_two_models_at_once_share_nothing():
    one, two = build_tiny("llava"), build_tiny("llava", seed=5)
    inputs = tiny_inputs("llava")
    plain_one, plain_two = run(one, inputs), run(two, inputs)
    with steer(one, lambda w, call: w * 0.5):
        alone = run(one, inputs)
        assert torch.equal(run(two, inputs), plain_two)
        with observe(two) as record, steer(two, lambda w, call: w * 0.25):
            assert torch.equal(run(one, inputs), alone)
            assert not record
            quarter = run(two, inputs)
            assert torch.equal(run(one, inputs), alone)
        assert torch.equal(run(two, inputs), plain_two)
        assert torch.equal(run(one, inputs), alone)
    assert not torch.equal(alone, plain_one)
    assert not torch.equal(quarter, plain_two)
    assert torch.equal(run(one, inputs), plain_one)


@pytest.mark.parametrize("name", VLMS)
def test_an_error_inside_generate_restores_the_model(name):
    model = build_tiny(name)
    plain = generate(model, name)

    def failing(weights, call):
        if call.step == 2:
            raise KeyError("stop")
        return weights * 0.5

    with pytest.raises(KeyError, match="stop"), steer(model, failing):
        generate(model, name)
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert not adapter._BINDINGS
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert_same(generate(model, name), plain)


def test_contexts_may_end_in_any_order():
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    plain = run(model, inputs)
    outer, inner = steer(model, lambda w, call: w * 0.5), steer(model, lambda w, call: w * 0.25)
    outer.__enter__()
    half = run(model, inputs)
    inner.__enter__()
    outer.__exit__(None, None, None)
    quarter = run(model, inputs)
    inner.__exit__(None, None, None)
    assert torch.equal(run(model, inputs), plain)
    assert not torch.equal(half, quarter)
    assert model.config.text_config._attn_implementation == "eager"


def test_a_part_of_a_model_and_the_model_can_be_watched_together():
    model, inputs = build_tiny("llava"), tiny_inputs("llava")
    with observe(model.model.language_model) as inner, observe(model) as outer:
        run(model, inputs)
    assert list(inner) == [f"layers.{layer}.self_attn" for layer in range(3)]
    assert list(outer) == [site("llava", layer) for layer in range(3)]
    for left, right in zip(inner.values(), outer.values(), strict=True):
        assert torch.equal(left, right)
    assert model.config.text_config._attn_implementation == "eager"


def test_a_half_that_is_watched_already_keeps_its_record():
    model, inputs = build_tiny("t5"), inputs_of("t5")
    with observe(model.encoder) as half, observe(model) as whole:
        run(model, inputs)
    assert len(half) == 2
    assert len(whole) == 6
    for name, weights in half.items():
        assert torch.equal(weights, whole[f"encoder.{name}"])
    for stack in (model, model.encoder, model.decoder):
        assert stack.config._attn_implementation == "eager"


def test_a_model_of_both_kinds_shows_all_its_sites():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = build_tiny("bert")
            self.attend = Attend()

        def forward(self, **inputs):
            tokens = self.text(**inputs).last_hidden_state.unsqueeze(1)
            return self.attend(tokens, tokens, tokens)

    model, inputs = Both(), tiny_inputs("bert")
    with observe(model) as record, torch.no_grad():
        model(**inputs)
    assert set(record) == {*(f"text.encoder.layer.{i}.attention.self" for i in range(2)), "attend"}
    with adapt(model) as adaptation:
        assert adaptation.model is model.text


def test_a_model_that_left_its_context_can_be_collected():
    model, inputs = build_tiny("llama"), tiny_inputs("llama")
    with observe(model):
        run(model, inputs)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_module_on_the_name_without_a_context_is_plain_eager():
    model, inputs = build_tiny("llama"), tiny_inputs("llama")
    expected = run(model, inputs)
    register()
    model.set_attn_implementation("heed")
    assert torch.equal(run(model, inputs), expected)


def test_models_that_cannot_switch_are_refused_and_left_alone(monkeypatch):
    model = build_tiny("llava")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, request: None)
    with pytest.raises(UnsupportedModelError, match="did not change its attention"):
        observe(model).__enter__()
    assert model.config.text_config._attn_implementation == "eager"
    assert not adapter._BINDINGS
    from transformers import ResNetConfig, ResNetModel

    convolutional = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    with pytest.raises(UnsupportedModelError, match="no attention to adapt"), adapt(convolutional):
        pass
    with pytest.raises(UnsupportedModelError, match="has 0"), adapt(nn.Linear(2, 2)):
        pass


def test_adapting_says_what_is_wrong_with_its_arguments():
    model = build_tiny("llava")
    with pytest.raises(ValueError, match=r"\['audio'\].*\['vision', 'text'\]"):
        adapt(model, parts=["audio"]).__enter__()
    with observe(model), pytest.raises(ValueError, match="enter `adapt` once and first"):
        adapt(model).__enter__()
    assert model.config.text_config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="no attention site matches"):
        observe(model, "model.vision_tower.*").__enter__()
