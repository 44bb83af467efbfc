"""Floors: what the equally right variants do, here and on other machines, and what is kept of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from typer.testing import CliRunner

import reference.sampler
from parity.bundle.reading import CHECKSUMS, CHECKSUMS_FORMAT, read_bundle
from parity.bundle.store import entry_of, listed
from parity.cli.main import app
from parity.errors import ParityError
from parity.lance.variants import exact_variant, run_variant, variants_of
from parity.oracle import floors as measuring
from parity.oracle import floors_file, machines
from parity.oracle.bounds import EQUAL, bounds_of
from parity.oracle.floors import Floors, floats_of, logits_of, measure, pooled
from parity.oracle.floors_file import CACHE, FILE, floors_of, write_floors
from parity.oracle.judgement import Cause, Departure, Judgement
from parity.oracle.machines import machine, record_elsewhere, settings
from parity.oracle.oracle import FREE, KINDS, LOCAL, SEGMENT, Oracle
from parity.tensors.metrics import compare
from parity.tensors.names import parse
from parity.tensors.recording import Tap, to_tap
from reference.request import Request

SMALL = "t2i-fp32-nokv"


# Variants.


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variants_have_names_and_several_families(dtype, carried):
    variants = [exact_variant(dtype), *variants_of(dtype, carried)]
    assert len({variant.name for variant in variants}) == len(variants)
    assert not any(":" in variant.name for variant in variants)
    assert len({variant.family for variant in variants}) >= 5
    assert all(variant.numerics.dtype in (dtype, "float64") for variant in variants)


def test_a_bfloat16_run_of_its_own_is_drawn_more_often():
    once, carried = ({v.name for v in variants_of("bfloat16", carried)} for carried in (False, True))
    assert len(carried - once) == 4 and not once - carried
    assert variants_of("float32") == variants_of("float32", carried=True)


def test_a_norm_near_the_middle_of_two_numbers_may_be_either():
    def guided():
        return {"sampler.velocity0": to_tap(reference.sampler.guide(cond, 0 * cond, request))}

    # Its length is just below the middle of two bfloat16 numbers, 218 and 219.
    cond = torch.zeros(1024, 48, dtype=torch.bfloat16)
    cond.view(-1)[:47742] = 1
    request = Request.from_dict({"task": "t2i", "spec": "a bird", "cfg_text_scale": 1.5, "height": 32, "width": 32})
    assert 218.499 < cond.double().norm() < 218.5
    plain = guided()["sampler.velocity0"].array
    others = [run_variant(v, guided)["sampler.velocity0"].array for v in variants_of("bfloat16") if v.family == "sums"]
    assert any(not np.array_equal(other, plain) for other in others)


# What is measured.


@pytest.fixture(scope="module")
def measured(oracle_of):
    """The floors of the smallest bundle, measured here and in no other process."""
    return measure(oracle_of(SMALL), environments={})


def test_what_is_measured_is_what_is_kept(oracle_of, measured):
    kept = floors_of(oracle_of(SMALL))
    for kind in KINDS:
        assert list(measured[kind].levels) == list(kept[kind].levels)
        assert set(measured[kind].variants) <= set(kept[kind].variants)
        # Another processor rounds otherwise, but not by another order of magnitude.
        mine, stored = (np.array(list(floors[kind].levels.values())) for floors in (measured, kept))
        assert np.median(mine / np.maximum(stored, 1e-12)) == pytest.approx(1, abs=0.3)


def test_every_kind_has_the_taps_that_it_is_about(oracle_of, measured):
    oracle = oracle_of(SMALL)
    assert list(measured[LOCAL].levels) == floats_of(oracle.taps)
    assert list(measured[SEGMENT].levels) == list(measured[FREE].levels) == floats_of(oracle.bundle.taps)
    assert all(0 < level < 2e-4 for kind in KINDS for level in measured[kind].levels.values())
    # What is computed at once is off by less than what has added up since upstream's tap before it.
    name = "velocity_call1"
    assert measured[LOCAL].levels[name] < measured[SEGMENT].levels[name] < 10 * measured[FREE].levels[name]


def test_no_floor_hangs_on_what_the_oracle_holds(oracle_of, measured):
    oracle = oracle_of(SMALL)
    pixels = oracle.bundle.taps["pixels"].array.copy()
    pixels.reshape(-1)[:400] = 0
    taps = oracle.bundle.taps | {"pixels": Tap(pixels, "float32")}
    damaged = Oracle.of(replace(oracle.bundle, taps=taps))
    told = []
    again = measure(damaged, told.append, environments={})
    assert [what.partition(":")[0] for what in told] == [f"floors {i + 1} of {len(told)}" for i in range(len(told))]
    for kind in KINDS:
        assert again[kind].levels["pixels"] == pytest.approx(measured[kind].levels["pixels"])


def test_threads_are_given_back(oracle_of, monkeypatch):
    oracle, before, seen = oracle_of(SMALL), torch.get_num_threads(), set()

    def record(run, names=None, force=None):
        seen.add(torch.get_num_threads())
        if torch.get_num_threads() == 2:
            raise ValueError("no")
        return dict(oracle.bundle.taps)

    monkeypatch.setattr("parity.lance.replay_torch.TorchReplay.record", record)
    with pytest.raises(ParityError, match="^reference cannot run bundle t2i-fp32-nokv: ValueError: no$"):
        measure(oracle, environments={})
    assert 2 in seen and torch.get_num_threads() == before


def test_pooled_floors_are_the_largest(measured):
    local = measured[LOCAL]
    larger = replace(local, levels={name: 2 * level for name, level in local.levels.items()}, variants=("other",))
    both = pooled([local, larger])
    assert both.levels == larger.levels and both.flips == local.flips
    assert both.variants == (*local.variants, "other") and both.machines == local.machines


def test_a_float32_tap_behind_a_rounding_of_bfloat16_may_have_one_that_no_variant_had(oracle_of):
    oracle = oracle_of("t2v-bf16-kv")
    floors = floors_of(oracle)
    norm, path = "cond.step0/language_model.model.layers.0.self_attn.k_norm", "cond.step0/language_model.model.layers.0"
    rate = max(
        floors[LOCAL].flips[f"{path}.self_attn.{part}_proj{expert}"] for part in "qkv" for expert in ("", "_moe_gen")
    )
    values = oracle.own[norm].array.reshape(-1)
    for kind in (SEGMENT, FREE):
        assert floors[kind].flips[norm] == pytest.approx(rate) and rate > 1e-5
        allowed = bounds_of(floors[kind], oracle.own, "bfloat16").allowed(norm)
        for index in range(values.size):
            flipped = values.copy()
            flipped[index : index + 1].view(np.uint32)[:] += 0x10000
            assert compare(Tap(values, "float32"), Tap(flipped, "float32")).rel_l2 <= allowed
        assert allowed < 0.01
    # What is given what comes before it has none, and neither has what no bfloat16 is before.
    assert floors[LOCAL].flips[norm] == floors[SEGMENT].flips["sampler.timestep2"] == 0


# Other machines.


def test_only_instructions_that_the_processor_has_are_asked_for(monkeypatch):
    monkeypatch.setattr(machines.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machines, "cpu_flags", lambda: {"avx2"})
    assert set(machines.others()) == {"baseline"} and "avx512" not in str(settings())
    monkeypatch.setattr(machines, "cpu_flags", lambda: {"avx2", "avx512f", "amx_tile"})
    assert set(machines.others()) == {"baseline", "AVX2", "AVX-512"}
    assert {"MKL_CBWR": "AVX2"} in settings().values()
    monkeypatch.setattr(machines.platform, "machine", lambda: "arm64")
    assert machines.others() == settings() == {}


def test_a_bundle_is_run_as_another_machine_does(oracle_of):
    oracle = oracle_of(SMALL)
    dies = {"PYTHONHOME": "/nowhere"}
    found = record_elsewhere(oracle.bundle, oracle.passes, {"plain": {}, "dies": dies})
    assert list(found) == ["plain"]
    local, segment, free = found["plain"]
    # The same settings compute the same.
    for name in ("velocity_call0", "pixels"):
        assert np.array_equal(local[name].array, oracle.own[name].array)
        assert np.array_equal(segment[name].array, oracle.own[name].array)
    assert set(free) > set(floats_of(oracle.bundle.taps))
    with pytest.raises(ParityError, match="cannot be run in a process of its own"):
        record_elsewhere(oracle.bundle, oracle.passes, {"dies": dies})


# What is kept beside a bundle, and in the cache.


@pytest.fixture
def never_measured(monkeypatch):
    """Measuring fails: floors can only be read."""

    def measured(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(floors_file, "measure", measured)


def test_all_embedded_bundles_have_floors_that_fit_them(oracles, oracle_of, never_measured, monkeypatch):
    found = sorted(path.parent.name for path in oracles.glob("*/manifest.json"))
    assert len(found) >= 8
    for name in found:
        oracle = oracle_of(name)
        kept = floors_file.read_floors(oracle.bundle.path / FILE, oracle)
        assert list(kept[LOCAL].levels) == floats_of(oracle.taps)
        assert list(kept[SEGMENT].levels) == floats_of(oracle.bundle.taps)
        assert list(kept[FREE].levels) == floats_of(oracle.bundle.taps | logits_of(oracle.own))
        assert {v.name for v in variants_of(oracle.bundle.dtype)} < set(kept[LOCAL].variants)
        assert {"baseline", "AVX2", "MKL_CBWR=COMPATIBLE"} < set(kept[LOCAL].variants)
        assert bool(kept[FREE].upstream) == (oracle.bundle.dtype == "bfloat16") and not kept[LOCAL].upstream


def invented(names, seed, machines=("here",)):
    draw = np.random.default_rng(seed)

    def table(low, high):
        return {name: float(np.exp2(draw.uniform(low, high))) for name in names}

    levels = table(-25, -8)
    levels[next(iter(levels))] = 0.0
    return Floors(levels, table(-20, -3), table(-9, 0), ("a", "b"), machines)


@pytest.fixture
def stored(oracle_of, copy_bundle, monkeypatch, tmp_path):
    """The smallest bundle with invented floors of this machine beside it, and those; the cache is empty."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    path = copy_bundle(SMALL)
    oracle = replace(oracle_of(SMALL), bundle=read_bundle(path))
    names = {LOCAL: floats_of(oracle.taps), SEGMENT: floats_of(oracle.bundle.taps)}
    names[FREE] = names[SEGMENT]
    floors = {kind: invented(each, seed, (machine(),)) for seed, (kind, each) in enumerate(names.items())}
    write_floors(path / FILE, oracle, floors)
    return oracle, floors


def test_what_is_written_is_read(stored, never_measured):
    oracle, floors = stored
    for kind, read in floors_of(oracle).items():
        assert read.variants == floors[kind].variants and read.machines == (machine(),)
        for table in ("levels", "flips", "spreads"):
            assert getattr(read, table) == pytest.approx(getattr(floors[kind], table), rel=0.01)


def test_another_machine_measures_its_own_once_and_pools_them(stored, monkeypatch):
    oracle, floors = stored
    monkeypatch.setattr(floors_file, "machine", lambda: "elsewhere")
    counted = []

    def mine(oracle, progress):
        counted.append(1)
        return {kind: replace(each, levels={n: 2 * level for n, level in each.levels.items()}, machines=("elsewhere",))
                for kind, each in floors.items()}  # fmt: skip

    monkeypatch.setattr(floors_file, "measure", mine)
    monkeypatch.setattr(floors_file, "judge", lambda *arguments: Judgement(()))
    for _ in range(2):
        found = floors_of(oracle)[LOCAL]
        doubled = {name: 2 * level for name, level in floors[LOCAL].levels.items()}
        assert found.levels == pytest.approx(doubled, rel=0.01) and set(found.machines) == {machine(), "elsewhere"}
    assert len(counted) == 1
    # What the cache cannot give is measured again.
    (kept,) = floors_file.cache_folder().iterdir()
    kept.write_bytes(b"no")
    floors_of(oracle)
    assert len(counted) == 2


@pytest.fixture
def measuring_once(stored, monkeypatch):
    """Floors are invented rather than measured, and the times counted; the cache is empty, and a bundle has none."""
    oracle, floors = stored
    (oracle.bundle.path / FILE).unlink()
    counted = []
    monkeypatch.setattr(floors_file, "measure", lambda *arguments: counted.append(1) or floors)
    monkeypatch.setattr(floors_file, "judge", lambda *arguments: Judgement(()))
    return oracle, counted


def test_floors_of_another_checkpoint_are_no_floors(measuring_once):
    oracle, counted = measuring_once
    folder = oracle.bundle.checkpoint / oracle.bundle.variant
    file, weights, config = folder / "model.safetensors", "language_model.model.norm.weight", folder / "llm_config.json"
    right = config.read_text(encoding="utf-8"), load_file(file)
    file.unlink()  # a link
    for number, (eps, factor) in enumerate([(1e-6, 1), (1e-6, 30), (1e-5, 1)], 1):
        config.write_text(json.dumps(json.loads(right[0]) | {"rms_norm_eps": eps}), encoding="utf-8")
        save_tensors(right[1] | {weights: right[1][weights] * factor}, file)
        for _ in range(2):
            floors_of(oracle)
            assert len(counted) == number
    config.write_text(right[0], encoding="utf-8")
    floors_of(oracle)
    assert len(counted) == 3


def test_a_bundle_under_another_name_is_measured_no_second_time(measuring_once):
    oracle, counted = measuring_once
    floors_of(oracle)
    path = oracle.bundle.path.rename(oracle.bundle.path.with_name("other"))
    floors_of(replace(oracle, bundle=read_bundle(path)))
    assert len(counted) == 1


def test_floors_are_not_kept_where_oracle_and_reference_disagree(measuring_once, monkeypatch, lance_parity):
    oracle, counted = measuring_once
    departure = Departure(parse("pixels"), compare(oracle.taps["pixels"], oracle.taps["pixels"]), EQUAL)
    disagreeing = Judgement((departure,), (Cause.CODE,), "for a test")
    monkeypatch.setattr(floors_file, "judge", lambda *arguments: disagreeing)
    for _ in range(2):
        floors_of(oracle)
    assert len(counted) == 2 and not list(floors_file.cache_folder().glob("*"))
    monkeypatch.setattr("parity.oracle.judgement.judge", lambda *arguments: disagreeing)
    monkeypatch.setattr(measuring, "measure", lambda *arguments: {SEGMENT: None})
    monkeypatch.setattr(measuring, "carrying", lambda oracle, floors: floors)
    result = lance_parity("floors", oracle.bundle.path)
    assert result.exit_code == 2 and "are not kept: oracle and reference disagree at pixels" in result.stderr
    assert not (oracle.bundle.path / FILE).exists()


def parts(path):
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["floors"]), {name: file.get_tensor(name) for name in file.keys()}


def told(facts):
    return {"floors": json.dumps(facts)}


def summed(arrays, facts):
    return told(facts | {"arrays_sha256": floors_file._arrays_sum(arrays)})


def damages():
    def scaled(path, facts, arrays):
        save_file(arrays | {"local_levels": arrays["local_levels"] + np.float16(7)}, path, told(facts))

    def rounding_of_a_whole(path, facts, arrays):
        more = arrays | {"local_levels": np.full_like(arrays["local_levels"], 3)}
        save_file(more, path, summed(more, facts))

    def not_finite(path, facts, arrays):
        more = arrays | {"free_levels": np.full_like(arrays["free_levels"], np.nan)}
        save_file(more, path, summed(more, facts))

    def of_another_format(path, facts, arrays):
        save_file(arrays, path, told(facts | {"format": "lance-floors/0"}))

    def of_another_capture(path, facts, arrays):
        save_file(arrays, path, told(facts | {"capture_sha256": "0"}))

    def of_other_taps(path, facts, arrays):
        save_file(arrays, path, told(facts | {"names_sha256": dict.fromkeys(facts["names_sha256"], "0")}))

    def shorter(path, facts, arrays):
        less = {name: array[:-1] for name, array in arrays.items()}
        save_file(less, path, summed(less, facts))

    def without_facts(path, facts, arrays):
        save_file(arrays, path)

    def garbled(path, facts, arrays):
        save_file(arrays, path, {"floors": json.dumps(facts)[:-1]})

    def cut(path, facts, arrays):
        path.write_bytes(path.read_bytes()[:-10])

    def empty(path, facts, arrays):
        path.write_bytes(b"")

    return [scaled, rounding_of_a_whole, not_finite, of_another_format, of_another_capture, of_other_taps, shorter,
            without_facts, garbled, cut, empty]  # fmt: skip


@pytest.mark.parametrize("damage", damages(), ids=lambda damage: damage.__name__)
def test_bad_floors_are_refused_in_one_line(stored, damage, never_measured):
    oracle = stored[0]
    path = oracle.bundle.path / FILE
    damage(path, *parts(path))
    with pytest.raises(ParityError) as caught:
        floors_of(oracle)
    text = str(caught.value)
    assert "floors.safetensors" in text and "lance-parity floors" in text and "\n" not in text


def without(name):
    return lambda m: m | {"taps": [entry for entry in m["taps"] if entry["name"] != name]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m | {"variant": "Lance_3B_Video"}, "variant is Lance_3B_Video and was Lance_3B: restore it"),
        (lambda m: m | {"source": m["source"] | {"entry": "kv_cache"}}, "entry is kv_cache and was full_sequence"),
        (lambda m: m | {"taps": m["taps"][::-1]}, "the taps are listed in another order: sort them by name"),
        (without("velocity_call2"), "tap velocity_call2 is missing: copy manifest.json and taps.safetensors again"),
        (lambda m: m | {"request": m["request"] | {"seed": 5}}, "restore the request and the taps in manifest.json"),
    ],
)
def test_what_was_changed_since_floors_were_measured_is_named(stored, never_measured, change, told):
    oracle = stored[0]
    manifest = change(oracle.bundle.manifest)
    taps = {entry["name"]: oracle.bundle.taps[entry["name"]] for entry in manifest["taps"]}
    with pytest.raises(ParityError, match=f"the floors of another capture than the bundle's: {told}"):
        floors_of(replace(oracle, bundle=replace(oracle.bundle, manifest=manifest, taps=taps)))


def test_floors_of_another_bundle_are_told_by_its_name(stored, never_measured):
    oracle = stored[0]
    other = oracle.bundle.path.parent / "other"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps(oracle.bundle.manifest))
    manifest = oracle.bundle.manifest | {"request": oracle.bundle.request | {"seed": 5}}
    with pytest.raises(ParityError, match="bundle's: it is bundle other's: copy this bundle's own there, or remove"):
        floors_of(replace(oracle, bundle=replace(oracle.bundle, manifest=manifest)))


def test_where_nothing_can_be_kept_that_is_said_first(measuring_once, monkeypatch, tmp_path):
    oracle, counted = measuring_once
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / "file" / "cache"))
    told = []
    floors_file.judged(oracle, lambda what: told.append((what, len(counted))))
    words = f"floors cannot be kept in {tmp_path}/file/cache (Not a directory): name a folder in {CACHE}"
    assert told == [(words, 0)] and counted == [1]


def test_writing_replaces_the_whole_file_or_nothing(stored, monkeypatch):
    oracle, floors = stored
    path = oracle.bundle.path / FILE
    before = path.read_bytes()
    monkeypatch.setattr("parity.files.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_floors(path, oracle, floors)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir() if item.name.startswith(".")] == []


# The command.


@pytest.fixture
def lance_parity(monkeypatch):
    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def test_floors_writes_them_beside_the_taps(lance_parity, linked_bundle, stored, monkeypatch):
    path = linked_bundle(SMALL)
    (path / FILE).unlink()
    _, floors = stored
    monkeypatch.setattr(measuring, "measure", lambda oracle, progress, environments: floors)
    before = {item.name: item.read_bytes() for item in path.iterdir()}
    result = lance_parity("floors", path)
    assert result.exit_code == 0 and result.stderr == ""
    assert f"{path / FILE}: {len(floors[LOCAL].levels)} taps, 2 variants" in result.stdout.replace("\n", "")
    after = {item.name: item.read_bytes() for item in path.iterdir()}
    assert after.keys() - before.keys() == {FILE} and after.items() >= before.items()
    assert floors_of(Oracle.of(read_bundle(path)))[LOCAL].variants == floors[LOCAL].variants


def test_floors_that_are_listed_are_listed_anew(lance_parity, linked_bundle, stored, monkeypatch):
    path = linked_bundle(SMALL)
    _, floors = stored
    monkeypatch.setattr(measuring, "measure", lambda oracle, progress, environments: floors)
    name = f"{SMALL}/{FILE}"
    listing = {"format": CHECKSUMS_FORMAT, "files": {name: entry_of(path / FILE), "other": {"sha256": "0"}}}
    (path.parent / CHECKSUMS).write_text(json.dumps(listing))
    assert lance_parity("floors", path).exit_code == 0
    files = listed(path.parent)
    assert files["other"] == {"sha256": "0"}
    assert files[name] == entry_of(path / FILE) != listing["files"][name]
    read_bundle(path)


def test_floors_of_bad_folders_are_one_line(lance_parity, tmp_path, copy_bundle):
    bundle = copy_bundle(SMALL, weights=False)
    for folder, words in ((tmp_path / "nothing", "nothing"), (bundle, "reference cannot run bundle")):
        result = lance_parity("floors", folder)
        assert result.exit_code == 2
        assert result.stderr.startswith("lance-parity: ") and result.stderr.count("\n") == 1
        assert words in result.stderr


def test_check_refuses_them_as_localize_does(lance_parity, stored):
    path = stored[0].bundle.path
    path.joinpath(FILE).write_bytes(b"")
    for command in ("check", "localize"):
        result = lance_parity(command, path, "--impl", "mlx")
        assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
        assert result.stderr.startswith("lance-parity: ") and "is not a complete file of floors" in result.stderr
