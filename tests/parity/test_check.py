import dataclasses
import json

import numpy as np
import pytest

import reference.sampler as sampler
from parity.bundle.reading import read_bundle, write_bundle
from parity.comparison.check import UnsupportedTask, check_bundle, check_recording, limits_of, record_bundle, trusted_of
from parity.comparison.verdict import MEDIAN, limits_from
from parity.errors import ParityError, one_line
from parity.lance import replay_torch
from parity.lance.given import wanted
from parity.lance.replay_torch import layout_reference
from parity.lance.trusted import load_run
from parity.oracle.bounds import EQUAL, FALSE_ALARM, Bound, bounds_of, scale_of
from parity.oracle.floors import Floors, logits_of
from parity.oracle.floors_file import floors_of, judged
from parity.oracle.oracle import FREE
from parity.oracle.verify import SOUND, verify_bundle
from parity.report.run_page import error_of
from parity.tensors.recording import Tap, write_tensors
from reference.numerics import Numerics
from reference.request import Renorm

LAYER = "cond.step0/language_model.model.layers.1"


def scaled(factor):
    return lambda array: array * np.float32(factor)


def moved(error, seed=0):
    """Change an array by a relative error; what lies in [-1, 1], as pixels do, stays there."""

    def change(array):
        noise = np.random.default_rng(seed).standard_normal(array.shape)
        noise *= error * np.linalg.norm(array.astype(np.float64)) / np.linalg.norm(noise)
        if np.abs(array).max() <= 1:
            noise = np.where(np.abs(array + noise) > 1, -noise, noise)
        return (array + noise).astype(np.float32)

    return change


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


@pytest.mark.parametrize("tap", ["sampler.x_t1", "velocity_call1", "sampler.timestep3", "velocity_call2", "pixels"])
def test_a_tap_diverges_beyond_its_bound_and_not_before(bundle, replayed, tap):
    limits, alarm = limits_of(read_bundle(bundle))
    limit = limits[tap].allowed
    assert 2 * limits[tap].floor <= limit <= limits[tap].floor * alarm.threshold * (1 + 1e-9)
    result = check(bundle, replayed(changed={tap: moved(0.9 * limit)}))
    assert result.verdict == "agree" and result.alarm == alarm
    result = check(bundle, replayed(changed={tap: moved(1.2 * limit)}))
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
    result = check(bundle, replayed(changed={"sampler.x_t2": change, "pixels": scaled(-1)}))
    assert result.verdict == "diverge" and result.first_divergence["tap"] == "sampler.x_t2"
    assert result.worst.tap.name == "sampler.x_t2" and words in result.worst.difference.mismatch
    assert error_of(result.worst.difference) == ("–" if "shape" in words else "NaN")
    assert result.to_json()["worst"]["rel_l2"] is None and result.first_divergence["rel_l2"] is None


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
    with pytest.raises(UnsupportedTask, match="'depth' is none of t2i, "):
        check_bundle(bundle, replayed())


def test_a_bundle_without_noise_cannot_be_replayed(bundle):
    oracle = read_bundle(bundle)
    taps = {name: tap for name, tap in oracle.taps.items() if name != "sampler.noise"}
    write_bundle(bundle, oracle.manifest, oracle.inputs, taps)
    with pytest.raises(ParityError, match="sampler.noise"):
        check_bundle(bundle, "reference")


def test_whatever_an_implementation_raises_becomes_one_line():
    with pytest.raises(ParityError, match="^mlx cannot run: RuntimeError: a b$"), one_line("mlx cannot run"):
        raise RuntimeError("a\n b")
    with pytest.raises(ParityError, match="^mlx cannot run: no tap$"), one_line("mlx cannot run"):
        raise ParityError("no tap")


def test_both_agree_with_every_oracle(judged_oracle):
    # Both in one test: the floors of a bundle that holds none are measured once.
    for implementation in ("mlx", "reference"):
        result = check(judged_oracle, implementation)
        assert result.verdict == "agree" and result.missing == [] and result.reason == ""
        taps = read_bundle(judged_oracle).taps
        assert result.compared == len(taps) + (taps["tokens"].size if "tokens" in taps else 0)
        assert result.floor_median < MEDIAN


# What nothing can be said about is inconclusive, and never agreement.


def test_what_differs_between_two_equal_runs_is_inconclusive(bundle, unsteady):
    result = check(bundle, unsteady("velocity_call1"))
    assert result.verdict == "inconclusive"
    assert result.reason == "two equal runs differ first at velocity_call1"
    # What is random is not compared at all: neither agreement nor divergence.
    wrong = check(bundle, unsteady("velocity_call1", changed={"latent": scaled(2)}))
    assert wrong.verdict == "inconclusive"


# Beside the test above: what rounding does to a bundle is measured once.
def test_every_bundle_there_is_is_sound(judged_oracle):
    found = verify_bundle(judged_oracle)
    assert (found.problems, found.verdict) == ([], SOUND)
    manifest = json.loads((judged_oracle / "manifest.json").read_text(encoding="utf-8"))
    assert found.tensors > len(manifest["taps"]) and found.derived >= 10


def test_without_the_reference_only_what_must_be_equal_is_judged(copy_bundle, replayed):
    # Nothing to run the reference with.
    bundle = copy_bundle("t2i-fp32-nokv", weights=False)
    result = check(bundle, replayed())
    assert result.verdict == "inconclusive" and result.alarm is None
    assert result.reason.startswith("reference cannot run bundle t2i-fp32-nokv")
    assert check(bundle, replayed(changed={"latent": scaled(1.5)})).verdict == "inconclusive"
    assert check(bundle, replayed(changed={"latent": lambda a: a[..., :1]})).verdict == "diverge"
    assert check(bundle, replayed(changed={"text_ids": lambda a: a[::-1].copy()})).verdict == "diverge"
    assert check(bundle, replayed(dropped=("latent",))).verdict == "unusable"


def test_one_tap_is_too_few(bundle, replayed, monkeypatch):
    oracle = read_bundle(bundle)
    monkeypatch.setattr("parity.comparison.check.trusted_of", lambda bundle, progress: trusted)
    monkeypatch.setattr(
        "parity.comparison.check.limits_of",
        lambda oracle, progress: (dict.fromkeys(oracle.taps, Bound(1e-6, 1e-6)), None),
    )
    trusted = trusted_of(oracle)
    for names, verdict in ((["pixels"], "inconclusive"), (["pixels", "latent"], "agree")):
        taps = {name: oracle.taps[name] for name in names}
        write_bundle(bundle, oracle.manifest, oracle.inputs, taps)
        result = check(bundle, replayed())
        assert result.verdict == verdict
    write_bundle(bundle, oracle.manifest, oracle.inputs, {"pixels": oracle.taps["pixels"]})
    result = check(bundle, replayed())
    assert result.reason == "only 1 tap was compared"
    assert check(bundle, replayed(changed={"pixels": scaled(2)})).verdict == "diverge"


def test_damaged_floors_are_one_line(bundle, replayed):
    (bundle / "floors.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ParityError, match="^[^\n]*floors.safetensors is not a complete file[^\n]*$"):
        check(bundle, replayed())
    (bundle / "floors.safetensors").unlink()
    (bundle / "floors.safetensors").mkdir()
    with pytest.raises(ParityError, match="^[^\n]*floors.safetensors is no file: remove [^\n]*$"):
        check(bundle, replayed())


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
    recording = load_run(base, Numerics(dtype)).record(wanted(base))
    # A pass of the full-sequence entry holds all tokens, and its calls are no taps of such a bundle.
    inside = {n for n in oracle.taps if entry == "kv_cache" or "/" not in n}
    names = inside & set(recording) | {n for n in recording if n.startswith("velocity_call")}
    steps = range(request["num_steps"])
    names |= {f"sampler.{kind}{k}" for kind in ("x_t", "timestep") for k in steps} & set(recording)
    write_bundle(path, manifest, oracle.inputs, {name: recording[name] for name in names})
    return path


@pytest.fixture(scope="module", params=["kv_cache", pytest.param("full_sequence", marks=pytest.mark.exhaustive)])
def early_guidance(request, linked_bundle, alone):
    source = linked_bundle("t2i-fp32-kv")
    path = synthesise(source, source.parent / "early", "float32", request.param, cfg_interval=[0.85, 1.0])
    with alone():
        assert check(path, "reference").verdict == "agree"
    return path


def with_request(change, bundle):
    """The first divergence when the reference denoises another request than the bundle's."""

    def denoise(cond, uncond, noise, request):
        return sampler.denoise(cond, uncond, noise, dataclasses.replace(request, **change))

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(replay_torch, "denoise", denoise)
        return check(bundle, "reference").first_divergence


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
    assert with_request(change, early_guidance)["component"] == component


def test_names_the_euler_step(early_guidance, monkeypatch):
    advance = sampler.advance
    monkeypatch.setattr(sampler, "advance", lambda x_t, *rest: advance(x_t, *rest) * 1.01)
    first = check(early_guidance, "reference").first_divergence
    assert (first["tap"], first["component"]) == ("sampler.x_t1", "euler")


def test_positions_are_told_from_the_layout_where_no_tap_holds_them(bundle, replayed, oracles):
    oracle = dataclasses.replace(read_bundle(bundle), checkpoint=oracles / "checkpoint-a")
    assert {"position_ids.cond", "position_ids.uncond"} <= wanted(oracle)
    layout = layout_reference(oracle.request, oracle.checkpoint / oracle.variant, oracles)
    for shift, component in ((0, "velocity.cond"), (1, "positions")):
        extra = {n: Tap(layout[n] + np.int32(shift), "int32") for n in ("position_ids.cond", "position_ids.uncond")}
        implementation = replayed(changed={"velocity_call0": scaled(1.1)}, extra=extra)
        replay = record_bundle(bundle, implementation)
        result = check_recording(dataclasses.replace(replay, bundle=oracle))
        assert result.first_divergence["component"] == component


# bfloat16: what rounding does varies from tap to tap by orders of magnitude.


@pytest.fixture(scope="module")
def rounded(request):
    return request.path.parents[2] / "oracles" / "t2v-bf16-kv"


def to_bfloat16(values):
    return ((values.astype(np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("name", ["t2v-bf16-kv", "t2i-fp32-kv", "i2v-fp32-nokv", "x2t_image-bf16-kv"])
def test_limits_are_bounds_on_what_rounding_does(oracles, oracle_of, name):
    oracle = read_bundle(oracles / name)
    limits, alarm = limits_of(oracle)
    logits = logits_of(trusted_of(oracle).own)
    floors = floors_of(oracle_of(name))[FREE]
    bounds = bounds_of(floors, oracle.taps | logits, oracle.dtype)
    assert set(limits) == set(oracle.taps | logits) and bool(logits) == ("tokens" in oracle.taps)
    for tap, limit in limits.items():
        value = oracle.taps.get(tap) or logits[tap]
        if value.dtype == "int32":
            assert limit == EQUAL
        else:
            assert limit.floor == bounds.floor(tap) >= max(floors.levels[tap], scale_of(value).peak ** 0.5) > 0
            assert limit.floor <= limit.allowed == bounds.allowed(tap) <= limit.floor * alarm.threshold * (1 + 1e-9)
            assert (limit.upstream is None) == (oracle.dtype == "float32" or tap not in oracle.taps)
    assert alarm == bounds.alarm and alarm.rate == FALSE_ALARM
    assert alarm.taps == sum(tap.dtype != "int32" for tap in (oracle.taps | logits).values())
    assert alarm.samples == len(floors.variants) > 10


def test_an_error_smaller_than_upstream_s_own_rounding_is_seen_where_nothing_is_reordered(rounded, replayed):
    # Frequencies of RoPE that are not rounded move the queries by this much, which is less than U.
    name = "cond.prefix0/language_model.model.layers.0.self_attn.q_rope"
    oracle = read_bundle(rounded)
    share = 2.5e-3
    assert share < 0.5 * limits_of(oracle)[0][name].upstream
    noise = np.random.default_rng(0).standard_normal(oracle.taps[name].array.shape) * share
    changed = {name: lambda array: to_bfloat16(array * (1 + noise))}
    first = check(rounded, replayed(changed=changed)).first_divergence
    assert (first["tap"], first["component"]) == (name, "layers.0.self_attn.q_rope")


def test_what_moves_every_tap_by_a_little_is_seen_by_the_median(detailed_bundle, replayed):
    oracle = read_bundle(detailed_bundle)
    limits, alarm = limits_of(oracle)
    assert alarm.threshold > 1.5 * MEDIAN, "no single tap may be too far"
    floats = [name for name, tap in oracle.taps.items() if tap.dtype != "int32"]

    def at(floors):
        changed = {name: moved(floors * limits[name].floor, seed) for seed, name in enumerate(floats)}
        return check(detailed_bundle, replayed(changed=changed))

    few = at(0.8 * MEDIAN)
    assert few.verdict == "agree" and few.floor_median == pytest.approx(0.8 * MEDIAN, rel=0.05)
    result = at(1.2 * MEDIAN)
    assert result.verdict == "diverge" and not any(tap.diverges for tap in result.taps)
    assert result.first_divergence["tap"] == "sampler.noise"


def invented(error, names):
    """Floors that say of every tap that rounding moves it by this."""
    return Floors(dict.fromkeys(names, error), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), ("a", "b"))


def test_an_integer_tap_has_no_limit_and_a_tap_without_a_measured_error_one_rounding(rounded):
    oracle = read_bundle(rounded)
    names = [name for name, tap in oracle.taps.items() if tap.dtype != "int32"]
    limits, alarm = limits_from(oracle, invented(0.0, names), {})
    assert alarm.samples == 2 and limits["cond.step0/position_ids"] == EQUAL
    for name in names:
        peak = scale_of(oracle.taps[name]).peak ** 0.5
        assert limits[name].floor == pytest.approx(peak) and limits[name].allowed <= 2 * peak * (1 + 1e-9)


def test_limits_are_made_once_for_a_bundle_that_stays_the_same(copy_bundle, monkeypatch):
    path = copy_bundle("t2v-bf16-kv")
    made = []

    def judge_anew(oracle, progress):
        made.append(oracle.bundle.name)
        return judged(oracle, progress)

    monkeypatch.setattr("parity.comparison.check.judged", judge_anew)
    for _ in range(2):
        limits_of(read_bundle(path))
        trusted_of(read_bundle(path))
    assert len(made) == 1
    oracle = read_bundle(path)
    write_tensors(path / "taps.safetensors", oracle.taps)
    limits_of(read_bundle(path))
    assert len(made) == 2
    # So is one with another checkpoint.
    config = path.parent / "checkpoint-a" / oracle.variant / "llm_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    limits_of(read_bundle(path))
    assert len(made) == 3
