"""The oracle: upstream's values first, the reference's between them, whole passes cut into the cached entry's calls."""

from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import pytest

from parity.bundle.reading import read_bundle
from parity.errors import ParityError
from parity.hypotheses.tap_probe import site_of
from parity.lance.trusted import cut, load_run, run_passes
from parity.oracle.oracle import Oracle
from parity.tensors.metrics import compare
from parity.tensors.recording import Tap
from reference.layout import Role
from reference.numerics import Numerics

BUNDLES = ("t2i-fp32-kv", "t2v-bf16-kv", "image_edit-fp32-nokv", "i2v-fp32-nokv", "x2t_image-bf16-kv")
# Parts of a run that upstream's captures do not hold.
FINER = (
    "cond.step0/language_model.model.layers.0.self_attn.q_proj_moe_gen",
    "cond.step3/language_model.model.layers.2.mlp_moe_gen.down_proj",
    "uncond.step1/language_model.model.layers.1.self_attn.v_proj",
    "cond.step0/vae2llm",
    "cond.step0/latent_pos_embed",
    "vae.decode.chunk0/decoder.middle.0.residual.2",
    "vae.decode.chunk0/conv2",
    "frames",
)
UNEQUAL = {"float32": 1e-6, "bfloat16": 1e-2}


@pytest.mark.parametrize("name", BUNDLES)
def test_upstreams_taps_win_and_the_others_are_the_references(oracle_of, name):
    oracle = oracle_of(name)
    bundle = oracle.bundle
    assert set(bundle.taps) <= set(oracle.taps) == set(oracle.own)
    assert len(oracle.taps) > 2 * len(bundle.taps)
    for tap, value in oracle.taps.items():
        if tap in bundle.taps:
            assert value is bundle.taps[tap] and oracle.source(tap) == "upstream"
        else:
            assert value is oracle.own[tap] and oracle.source(tap) == "reference"
    # Both are of one kind: what the reference computes from upstream's values is upstream's own, up to rounding.
    for tap, value in bundle.taps.items():
        difference = compare(value, oracle.own[tap])
        assert difference.mismatch is None, tap
        assert difference.rel_l2 <= (0.0 if value.dtype == "int32" else UNEQUAL[bundle.dtype]), tap


def test_finer_parts_than_upstreams_are_there(oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    for tap in FINER:
        assert tap in oracle.taps and oracle.source(tap) == "reference", tap
    # In order of execution.
    order = list(oracle.taps)
    layers = [order.index(f"cond.step0/language_model.model.layers.{layer}") for layer in range(3)]
    assert layers == sorted(layers) < [order.index("latent")]
    assert order.index(FINER[0]) < layers[0] < order.index("cond.step1/hidden_in")


def test_a_bundle_with_a_tap_that_the_reference_lacks_is_refused(oracles):
    bundle = read_bundle(oracles / "t2i-fp32-nokv")
    odd = replace(bundle, taps=bundle.taps | {"velocity_call99": bundle.taps["velocity_call0"]})
    with pytest.raises(ParityError, match="holds velocity_call99, which the reference does not compute"):
        Oracle.of(odd)


# Whole passes, cut, are the calls of the cached entry.


def recorded(oracle, entry):
    run = load_run(replace_entry(oracle.bundle, entry), Numerics("float32"))
    given = {name: tap for name, tap in oracle.bundle.taps.items() if name == "tokens"}
    return run, run_passes(run, given)


def replace_entry(bundle, entry):
    return replace(bundle, manifest=bundle.manifest | {"source": bundle.manifest["source"] | {"entry": entry}})


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "image_edit-fp32-nokv", "i2v-fp32-nokv", "x2t_image-fp32-nokv"])
def test_cut_passes_equal_the_cached_entrys_calls(oracle_of, name):
    oracle = oracle_of(name)
    (cached_run, cached), (run, passes) = (recorded(oracle, entry) for entry in ("kv_cache", "full_sequence"))
    pieces = cut(run, passes)
    assert cut(cached_run, cached) is cached
    later = [f"*.step{step}/*" for step in range(1, 9)] + ["sampler.*", "latent", "pixels", "frames", "vae.decode*"]
    # The unconditional arm has other positions in the two entries from the first split after the user's text on.
    other = [f"uncond.prefix{index}/*" for index in range(after_text(oracle.layout), 9)] + ["uncond.step*"]
    alone = ["*/llm2vae", "*/time_embedder", "velocity_call*"]
    # A whole question is embedded before any pass.
    alone += ["cond.prefill*/language_model.model.embed_tokens", "tokens"]
    compared = 0
    for tap, value in cached.items():
        assert tap in pieces or any(fnmatchcase(tap, pattern) for pattern in alone), tap
        if any(fnmatchcase(tap, pattern) for pattern in (*later, *other, *alone)):
            continue
        difference = compare(value, pieces[tap])
        assert difference.mismatch is None and difference.rel_l2 < 5e-6, tap
        compared += 1
    assert compared > 300
    # The full-sequence entry answers up to a multiple of its block.
    longer = [f"cond.decode{step}/*" for step in range(oracle.run.request.max_new_tokens or 0, 200)]
    extra = [tap for tap in pieces if tap not in cached and not tap.startswith("velocity_call")]
    assert [tap for tap in extra if not any(fnmatchcase(tap, pattern) for pattern in longer)] == []
    if "tokens" in cached:
        tokens = cached["tokens"].array
        assert np.array_equal(pieces["tokens"].array[: len(tokens)], tokens)


def after_text(layout):
    """The number of the unconditional arm's first split behind the user's text."""
    return next((i for i, split in enumerate(layout.splits) if split.role is Role.TEXT), 9)


# The exact inputs.


@pytest.mark.parametrize("name", [*BUNDLES, "x2t_image-fp32-nokv", "t2v-fp32-nokv"])
def test_the_exact_inputs_are_what_the_bundle_holds(oracle_of, name):
    oracle = oracle_of(name)
    bundle, exact = oracle.bundle, oracle.exact
    for integers in ("text_ids", "modality", "split_lens", "attn_modes"):
        assert np.array_equal(exact.arrays[f"inputs/{integers}"], bundle.inputs[integers].array)
    assert np.array_equal(np.concatenate([split.ids for split in exact.splits]), bundle.inputs["text_ids"].array)
    assert [len(split.ids) for split in exact.splits] == bundle.inputs["split_lens"].array.tolist()
    assert [split.mode for split in exact.splits] == bundle.inputs["attn_modes"].array.tolist()
    if bundle.task.startswith("x2t"):
        assert exact.arrays["inputs/answer"].tolist() == [exact.answer]
        # The loss, and so the first logits, is behind the last token of the question.
        assert exact.answer == bundle.inputs["ce_loss_indexes"].array[0] + 1
        assert "inputs/timesteps" not in exact.arrays
    else:
        times = exact.arrays["inputs/timesteps"]
        assert times[:-1].tolist() == bundle.timesteps and times[-1] == 0
        assert exact.arrays["inputs/guided"].astype(bool).tolist() == bundle.guided


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "t2v-bf16-kv", "x2t_image-bf16-kv"])
def test_the_positions_of_the_exact_inputs_are_those_that_upstream_used(oracle_of, name):
    oracle = oracle_of(name)
    for arm in ("cond", "uncond"):
        calls = [n for n in oracle.bundle.taps if fnmatchcase(n, f"{arm}.pre*/position_ids")]
        calls = sorted(calls) + [n for n in oracle.bundle.taps if fnmatchcase(n, f"{arm}.[sd]*0/position_ids")]
        if not calls:
            assert arm == "uncond" and name.startswith("x2t")
            continue
        used = np.concatenate([oracle.bundle.taps[n].array for n in calls], 1)
        given = oracle.exact.arrays[f"inputs/position_ids.{arm}"]
        assert used.shape[1] > 30 and np.array_equal(given[:, : used.shape[1]], used)


@pytest.mark.parametrize("integers", ["text_ids", "modality", "split_lens", "attn_modes"])
def test_an_oracle_whose_reference_lays_out_something_else_does_not_judge(oracle_of, integers):
    oracle = oracle_of("t2i-fp32-nokv")
    wrong = oracle.bundle.inputs[integers].array.copy()
    wrong[0] += 1
    bundle = replace(oracle.bundle, inputs=oracle.bundle.inputs | {integers: Tap(wrong, "int32")})
    with pytest.raises(ParityError, match=f"with other {integers}: it is no judge"):
        replace(oracle, bundle=bundle).exact  # noqa: B018 -- it is computed when it is asked for


# One tap computed anew.


def kinds(oracle):
    """The first and the last tap of every kind of component: those of a run's beginning and of its end."""
    first, last = {}, {}
    for name in oracle.taps:
        component = oracle.bundle.locate(name).component
        kind = ".".join("*" if part.isdigit() else part for part in component.split("."))
        first.setdefault(kind, name)
        last[kind] = name
    # Every third: what lies between is computed by the same calls.
    return [*first.values()][1::3], [*last.values()][::3]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_tap_computed_anew_is_what_the_reference_computed(oracle_of, name):
    oracle = oracle_of(name)
    first, last = kinds(oracle)
    assert len(first) > 8 and any(".prefix" in tap or ".prefill" in tap for tap in first)
    for tap in dict.fromkeys([*first, *last]):
        site = site_of(oracle, tap, oracle.taps[tap].array, oracle.exact.arrays)
        try:
            again = site.recompute()
        except LookupError:
            # What is given to a run is never computed.
            assert tap in ("sampler.noise", "vae.encode0.eps", "vae.encode1.eps", "tokens"), tap
            continue
        assert np.array_equal(again, oracle.own[tap].array), tap


def test_a_site_knows_its_module_its_neighbours_and_its_value(oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    tap = "cond.step0/language_model.model.layers.1.self_attn.q_norm_moe_gen"
    site = site_of(oracle, tap, oracle.taps[tap].array * 2, oracle.exact.arrays)
    assert site.component == "layers.1.self_attn.q_norm_moe_gen" and not site.exact
    assert (site.dtype, site.entry) == ("float32", "kv_cache")
    assert site.module is oracle.run.pipeline.model.language_model.model.layers[1].self_attn.q_norm_moe_gen
    beside = "language_model.model.layers.1.self_attn.q_proj_moe_gen"
    assert site.near(beside) is oracle.taps[f"cond.step0/{beside}"].array
    assert site.value("inputs/text_ids") is oracle.exact.arrays["inputs/text_ids"]
    assert site.near("nothing") is None and site.value("nothing") is None
    assert site_of(oracle, "latent", oracle.taps["latent"].array, {}).module is None
    decoder = "vae.decode.chunk0/decoder.conv1"
    assert site_of(oracle, decoder, oracle.taps[decoder].array, {}).module is oracle.run.pipeline.vae.decoder.conv1
    exact = site_of(oracle, "inputs/text_ids", oracle.layout.text_ids + 1, oracle.exact.arrays)
    assert exact.exact and exact.recompute() is exact.expected
