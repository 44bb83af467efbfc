import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.errors import ParityError
from parity.lance.names import CALLS, PATHS, SINGLES, WORDS, locate, parse, velocity_calls

LAYER = "language_model.model.layers.1"


@pytest.mark.parametrize(
    ("name", "call", "component"),
    [
        ("inputs/text_ids", "inputs", "sequence"),
        ("inputs/packed_vae_token_indexes", "inputs", "sequence"),
        ("inputs/video_grid_thw", "inputs", "grids"),
        ("sampler.noise", "sampler", "noise"),
        ("sampler.x_t3", "sampler", "euler"),
        ("sampler.timestep12", "sampler", "schedule"),
        ("time_embedder", "sampler", "time_embedder"),
        ("latent", "sampler", "euler"),
        ("pixels", "vae.decode", "vae.pixels"),
        ("tokens", "decode", "tokens"),
        ("uncond.prefix1/position_ids", "uncond.prefix1", "positions"),
        ("cond.prefix0/hidden_in", "cond.prefix0", "embeddings"),
        (f"cond.step0/{LAYER}", "cond.step0", "layers.1"),
        (f"cond.step0/{LAYER}.self_attn.q_norm_moe_gen", "cond.step0", "layers.1.self_attn.q_norm_moe_gen"),
        (f"cond.step0/{LAYER}.self_attn.q_rope", "cond.step0", "layers.1.self_attn.q_rope"),
        (f"cond.step0/{LAYER}.self_attn.sdpa", "cond.step0", "layers.1.self_attn.sdpa"),
        ("cond.step0/hidden_out", "cond.step0", "norm"),
        ("cond.step2/llm2vae", "cond.step2", "llm2vae"),
        ("vae.decode.chunk0/decoder.upsamples.1", "vae.decode.chunk0", "vae.decoder.upsamples.1"),
        ("vae.decode.chunk1/decoder", "vae.decode.chunk1", "vae.decoder.head"),
        ("vae.encode0.chunk1/encoder.downsamples.2", "vae.encode0.chunk1", "vae.encoder.downsamples.2"),
        ("vit_model0.blocks.3", "vit_model", "vit_model.blocks.3"),
        (f"cond.step0/{LAYER}.mlp.gate_proj", "cond.step0", "layers.1.mlp.gate_proj"),
    ],
)
def test_names_its_call_and_component(name, call, component):
    tap = parse(name)
    assert (tap.call, tap.component) == (call, component)


@pytest.mark.parametrize(
    "name", ["", "sampler", "sampler.x_t", "sampler.x_t01", "x/hidden_in", "cond.step0/", "mid.step0/llm2vae"]
)
def test_refuses_unknown_names(name):
    with pytest.raises(ParityError):
        parse(name)


def test_velocity_calls_follow_the_guided_steps():
    guided = [True, False, True]
    assert velocity_calls(guided) == [("cond", 0), ("uncond", 0), ("cond", 1), ("cond", 2), ("uncond", 2)]
    third = locate("velocity_call2", guided)
    assert (third.call, third.component) == ("cond.step1", "velocity.cond")
    assert locate("velocity_call9", guided).component == "velocity"


def test_places_are_in_order_of_execution():
    names = [
        "inputs/text_ids",
        "sampler.noise",
        "sampler.x_init",
        "cond.prefix0/position_ids",
        "cond.prefix0/hidden_in",
        "cond.prefix0/language_model.model.layers.0.input_layernorm",
        "cond.prefix0/language_model.model.layers.0.self_attn.q_norm",
        "cond.prefix0/language_model.model.layers.0.self_attn.q_rope",
        "cond.prefix0/language_model.model.layers.0.self_attn.sdpa",
        "cond.prefix0/language_model.model.layers.0.mlp",
        "cond.prefix0/language_model.model.layers.0",
        "cond.prefix0/language_model.model.layers.1.input_layernorm",
        "cond.prefix0/language_model.model.layers.10.input_layernorm",
        "cond.prefix0/hidden_out",
        "uncond.prefix0/position_ids",
        "cond.prefix1/position_ids",
        "sampler.x_t0",
        "sampler.timestep0",
        "time_embedder",
        "cond.step0/position_ids",
        "cond.step0/llm2vae",
        "uncond.step0/llm2vae",
        "sampler.velocity0",
        "sampler.x_t1",
        "cond.step1/llm2vae",
        "sampler.x_t10",
        "latent",
        "vae.decode.chunk0/decoder.conv1",
        "vae.decode.chunk0/decoder.upsamples.0",
        "vae.decode.chunk0/decoder.upsamples.1",
        "vae.decode.chunk0/decoder",
        "vae.decode.chunk1/decoder.conv1",
        "pixels",
    ]
    assert sorted(names, key=lambda name: parse(name).place) == names
    calls = [f"velocity_call{number}" for number in range(5)]
    assert sorted(calls, key=lambda name: locate(name, [True, False, True]).place) == calls


def test_knows_every_tap_of_every_oracle(oracle):
    for entry in json.loads((oracle / "manifest.json").read_text(encoding="utf-8"))["taps"]:
        tap = parse(entry["name"])
        assert tap.integer == (entry["dtype"] == "int32")
        assert tap.name == entry["name"] == (f"{tap.call}/{tap.path}" if "/" in entry["name"] else tap.path)
        assert tap.component and "{" not in tap.component
        assert tap.what and (not tap.axes or len(tap.axes.split(", ")) == len(entry["shape"]))


numbers = st.integers(0, 200)


@st.composite
def filled(draw, kinds):
    """A pattern of the tables with its gaps filled, and the numbers that went in."""
    kind = draw(st.sampled_from(kinds))
    words = {
        word: draw(st.sampled_from(choices.split("|")))
        for word, choices in WORDS.items()
        if word in ("arm", "expert", "coder")
    }
    keys = ("index", "step", "number", "layer", "block", "chunk")
    used = {key: draw(numbers) for key in keys if f"{{{key}}}" in kind.pattern}
    return kind.pattern.format(**words, **used, group="packed_vae_token", module="attn.qkv"), used


@given(filled(CALLS), filled(PATHS))
def test_parses_what_calls_and_paths_compose(call, path):
    tap = parse(f"{call[0]}/{path[0]}")
    assert (tap.call, tap.path) == (call[0], path[0])
    assert tap.numbers == call[1] | path[1]


@given(filled(SINGLES))
def test_parses_names_without_a_call(single):
    name, used = single
    assert parse(name).name == name
    assert parse(name).numbers == used
