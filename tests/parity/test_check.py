import dataclasses
import json

import numpy as np
import pytest

import reference.sampler as sampler
from parity import capture_torch
from parity.bundle import read_bundle, write_bundle
from parity.check import ORDERS, UnsupportedTask, check_bundle, check_recording, limits_of, record_bundle
from parity.errors import ParityError
from parity.implementations import Mlx, Reference, one_line, wanted
from parity.recording import Tap, write_tensors
from parity.verdict import FIRST_STEP, LATER, flipped_bits
from reference.request import Renorm

LAYER = "cond.step0/language_model.model.layers.1"


def scaled(factor):
    return lambda array: array * np.float32(factor)


def check(bundle, implementation):
    result = check_bundle(bundle, implementation)
    # Every result must be writable as strict JSON.
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["compared"] == len(document["taps"]) == result.compared
    return result


def test_the_oracle_agrees_with_itself(detailed_bundle, replayed):
    result = check(detailed_bundle, replayed())
    assert result.verdict == "agree" and result.first_divergence is None and not result.missing
    assert result.compared == 399 and len(result.inputs) == 9
    assert result.worst.difference.rel_l2 == 0


@pytest.mark.parametrize(
    ("tap", "limit"),
    [
        ("sampler.x_t1", FIRST_STEP),
        ("velocity_call1", FIRST_STEP),
        ("sampler.timestep3", FIRST_STEP),
        ("sampler.x_t2", LATER),
        ("velocity_call2", LATER),
        ("pixels", LATER),
    ],
)
def test_float32_bounds(bundle, replayed, tap, limit):
    assert check(bundle, replayed(changed={tap: scaled(1 + 0.9 * limit)})).verdict == "agree"
    result = check(bundle, replayed(changed={tap: scaled(1 + 1.2 * limit)}))
    assert result.verdict == "diverge"
    assert result.first_divergence["tap"] == result.worst.tap.name == tap
    assert result.first_divergence["rel_l2"] == pytest.approx(1.2 * limit, rel=0.05)


def test_the_first_divergence_is_the_first_in_time(detailed_bundle, replayed):
    late, early = "cond.step0/hidden_out", f"{LAYER}.self_attn.q_norm_moe_gen"
    result = check(detailed_bundle, replayed(changed={late: scaled(2), early: scaled(1.001)}))
    assert result.first_divergence == {
        "tap": early,
        "call": "cond.step0",
        "component": "layers.1.self_attn.q_norm_moe_gen",
        "rel_l2": pytest.approx(1e-3, rel=1e-3),
    }
    assert result.worst.tap.name == late


def test_integers_come_before_every_float(detailed_bundle, replayed):
    changes = {"cond.prefix0/hidden_in": scaled(2), "uncond.step3/position_ids": lambda ids: ids + 1}
    first = check(detailed_bundle, replayed(changed=changes)).first_divergence
    assert (first["tap"], first["component"]) == ("uncond.step3/position_ids", "positions")
    changes["modality"] = lambda roles: roles[::-1].copy()
    first = check(detailed_bundle, replayed(changed=changes)).first_divergence
    assert (first["tap"], first["call"], first["component"]) == ("inputs/modality", "inputs", "sequence")


@pytest.mark.parametrize("name", ["text_ids", "split_lens", "video_sizes"])
def test_a_single_wrong_integer_diverges(bundle, replayed, name):
    def wrong(array):
        array.flat[-1] += 1
        return array

    result = check(bundle, replayed(changed={name: wrong}))
    assert result.verdict == "diverge" and result.first_divergence["tap"] == f"inputs/{name}"
    assert [r.tap.name for r in result.inputs if r.diverges] == [f"inputs/{name}"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a[:-1], "shape [23, 48] instead of [24, 48]"),
        (lambda a: np.where(np.arange(a.size).reshape(a.shape) == 50, np.nan, a).astype(np.float32), "nan at [1, 2]"),
        (lambda a: np.full_like(a, np.inf), "inf at [0, 0]"),
    ],
)
def test_what_has_no_error_diverges_and_is_the_worst(bundle, replayed, change, words):
    result = check(bundle, replayed(changed={"sampler.x_t2": change, "pixels": scaled(9)}))
    assert result.verdict == "diverge" and result.first_divergence["tap"] == "sampler.x_t2"
    assert result.worst.tap.name == "sampler.x_t2" and words in result.worst.difference.mismatch


def test_another_dtype_diverges(bundle, replayed):
    change = {"latent": lambda a: Tap((a.view(np.uint32) & 0xFFFF0000).view(np.float32), "bfloat16").array}
    result = check(bundle, replayed(changed=change, dtypes={"latent": "bfloat16"}))
    assert result.verdict == "diverge"
    assert "dtype bfloat16 instead of float32" in [r.difference.mismatch for r in result.taps]


@pytest.mark.parametrize("name", ["pixels", "sampler.x_t1", "text_ids"])
def test_a_missing_tap_is_never_agreement(bundle, replayed, name):
    result = check(bundle, replayed(dropped=(name,)))
    assert result.verdict == "unusable"
    assert result.missing == ["inputs/text_ids" if name == "text_ids" else name]
    assert check(bundle, replayed(dropped=(name,), changed={"latent": scaled(2)})).verdict == "diverge"


def test_comparing_nothing_is_never_agreement(bundle, replayed):
    oracle = read_bundle(bundle)
    result = check(bundle, replayed(dropped=(*oracle.taps, *oracle.inputs)))
    assert result.verdict == "unusable" and result.compared == 0 and result.worst is None
    places = [oracle.locate(name).place for name in result.missing if not name.startswith("inputs/")]
    assert places == sorted(places)
    empty = {"sampler.noise": Tap(np.zeros((0, 48), np.float32), "float32")}
    write_bundle(bundle, oracle.manifest, oracle.inputs, empty)
    assert check(bundle, replayed()).verdict == "unusable"


def test_tasks_that_do_not_exist_yet_are_named(bundle, replayed):
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["request"]["task"] = "depth"
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UnsupportedTask, match="'depth' is not supported yet"):
        check_bundle(bundle, replayed())


def test_a_bundle_without_noise_cannot_be_replayed(bundle):
    oracle = read_bundle(bundle)
    taps = {name: tap for name, tap in oracle.taps.items() if name != "sampler.noise"}
    write_bundle(bundle, oracle.manifest, oracle.inputs, taps)
    with pytest.raises(ParityError, match="sampler.noise"):
        check_bundle(bundle, Reference())


def test_whatever_an_implementation_raises_becomes_one_line():
    with pytest.raises(ParityError, match="^mlx cannot run: RuntimeError: a b$"), one_line("mlx cannot run"):
        raise RuntimeError("a\n b")
    with pytest.raises(ParityError, match="^mlx cannot run: no tap$"), one_line("mlx cannot run"):
        raise ParityError("no tap")


@pytest.mark.parametrize("implementation", [Mlx, Reference])
def test_both_agree_with_every_oracle(supported_oracle, implementation):
    result = check(supported_oracle, implementation())
    assert result.verdict == "agree" and result.missing == []
    assert result.compared == len(read_bundle(supported_oracle).taps)


def test_an_interrupt_stays_one_whatever_wraps_it():
    with pytest.raises(KeyboardInterrupt), one_line("mlx cannot run"):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error


# The component behind a state that differs, told on bundles synthesised with the reference: guidance ends before the
# last steps, so that the embedded oracles' settings are not the only ones seen.


def synthesise(source, path, dtype, entry, **settings):
    """Write a bundle like `source` but for its settings, with the taps that the reference computes for it."""
    oracle = read_bundle(source)
    request = oracle.request | settings
    manifest = oracle.manifest | {"request": request, "source": oracle.manifest["source"] | {"entry": entry}}
    base = dataclasses.replace(oracle, manifest=manifest)
    recording = Reference().record_with(base, dtype)
    names = set(oracle.taps) & set(recording) | {n for n in recording if n.startswith("velocity_call")}
    steps = range(request["num_steps"])
    names |= {f"sampler.{kind}{k}" for kind in ("x_t", "timestep") for k in steps} & set(recording)
    write_bundle(path, manifest, oracle.inputs, {name: recording[name] for name in names})
    return path


@pytest.fixture(params=["kv_cache", "full_sequence"])
def early_guidance(request, copy_bundle):
    source = copy_bundle("t2i-fp32-kv", weights=True)
    return synthesise(source, source.parent / "early", "float32", request.param, cfg_interval=[0.85, 1.0])


def with_request(change, bundle):
    """The first divergence when the reference denoises another request than the bundle's."""

    def denoise(cond, uncond, noise, request):
        return sampler.denoise(cond, uncond, noise, dataclasses.replace(request, **change))

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(capture_torch, "denoise", denoise)
        return check(bundle, Reference()).first_divergence


@pytest.mark.parametrize(
    ("change", "component"),
    [
        ({"cfg_interval": (0.0, 1.0)}, "guidance"),
        ({"cfg_interval": (0.95, 1.0)}, "guidance"),
        ({"cfg_renorm_type": Renorm.CHANNEL}, "guidance"),
        ({"cfg_text_scale": 4.1}, "guidance"),
        ({"timestep_shift": 3.0}, "schedule"),
    ],
)
def test_names_guidance_and_schedule(early_guidance, change, component):
    assert check(early_guidance, Reference()).verdict == "agree"
    assert with_request(change, early_guidance)["component"] == component


def test_names_the_euler_step(early_guidance, monkeypatch):
    def denoise(cond, uncond, noise, request):
        for step in sampler.denoise(cond, uncond, noise, request):
            yield dataclasses.replace(step, x_t=step.x_t * (1 + 0.01 * (step.index > 0)))

    monkeypatch.setattr(capture_torch, "denoise", denoise)
    first = check(early_guidance, Reference()).first_divergence
    assert (first["tap"], first["component"]) == ("sampler.x_t1", "euler")


def test_positions_are_told_from_the_layout_where_no_tap_holds_them(bundle, replayed, oracles):
    oracle = dataclasses.replace(read_bundle(bundle), checkpoint=oracles / "checkpoint-a")
    assert {"position_ids.cond", "position_ids.uncond"} <= wanted(oracle)
    layout = Reference().layout(oracle.request, oracle.checkpoint / oracle.variant, oracles)
    for shift, component in ((0, "velocity.cond"), (1, "positions")):
        extra = {n: Tap(layout[n] + np.int32(shift), "int32") for n in ("position_ids.cond", "position_ids.uncond")}
        implementation = replayed(changed={"velocity_call0": scaled(1.1)}, extra=extra)
        replay = record_bundle(bundle, implementation)
        result = check_recording(dataclasses.replace(replay, bundle=oracle))
        assert result.first_divergence["component"] == component


# bfloat16: the limits are measured with the reference.


@pytest.fixture(scope="module")
def rounded(request):
    return request.path.parents[2] / "oracles" / "t2v-bf16-kv"


def test_rounding_floors_are_ordered(rounded):
    oracle = read_bundle(rounded)
    limits = limits_of(oracle)
    assert set(limits) == set(oracle.taps)
    for name, limit in limits.items():
        if oracle.taps[name].dtype == "int32":
            assert limit.error == 0
        elif limit.upstream < FIRST_STEP:
            assert limit.error in (FIRST_STEP, LATER)
        else:
            assert flipped_bits(oracle.taps[name].array.size) <= limit.error
            assert limit.error <= max(2 * max(limit.upstream, limit.order), flipped_bits(oracle.taps[name].array.size))


def test_an_error_smaller_than_upstream_s_own_rounding_is_seen_where_nothing_is_reordered(rounded, replayed):
    # Frequencies of RoPE that are not rounded move the queries by this much, which is less than U.
    name = "cond.prefix0/language_model.model.layers.0.self_attn.q_rope"
    oracle = read_bundle(rounded)
    share = 2.5e-3
    assert share < 0.5 * limits_of(oracle)[name].upstream
    noise = np.random.default_rng(0).standard_normal(oracle.taps[name].array.shape) * share

    def change(array):
        values = (array * (1 + noise)).astype(np.float32)
        return ((values.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)

    first = check(rounded, replayed(changed={name: change})).first_divergence
    assert (first["tap"], first["component"]) == (name, "layers.0.self_attn.q_rope")


def test_the_median_tap_may_not_be_farther_than_upstream_s_own_rounding(rounded, replayed):
    oracle = read_bundle(rounded)
    limits = limits_of(oracle)

    def moved(name):
        def change(array):
            noise = np.random.default_rng(1).standard_normal(array.shape)
            error = 0.95 * limits[name].error * np.linalg.norm(array) / np.linalg.norm(noise)
            values = (array + noise * error).astype(np.float32)
            if oracle.taps[name].dtype == "float32":
                return values
            return ((values.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)

        return change

    wide = [n for n, limit in limits.items() if limit.upstream > FIRST_STEP and limit.error > 1.5 * limit.upstream]
    result = check(rounded, replayed(changed={name: moved(name) for name in wide}))
    assert len(wide) > len(oracle.taps) / 2 and result.upstream_median > 1
    assert result.verdict == "diverge" and result.first_divergence["tap"] in wide


def test_limits_are_measured_once_for_a_bundle_that_stays_the_same(copy_bundle, monkeypatch):
    path = copy_bundle("t2v-bf16-kv")
    runs = []

    def record_with(self, bundle, *numerics):
        runs.append(numerics)
        return bundle.taps

    monkeypatch.setattr(Reference, "record_with", record_with)
    for _ in range(2):
        limits_of(read_bundle(path))
    assert len(runs) == len(set(runs)) == 1 + len(ORDERS)
    oracle = read_bundle(path)
    write_tensors(path / "taps.safetensors", oracle.taps)
    limits_of(read_bundle(path))
    assert len(runs) == 2 * (1 + len(ORDERS))
