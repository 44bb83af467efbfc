"""Floors: what the equally right variants do, and what is kept of it beside a bundle."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

import reference.sampler
from parity import floors as measuring
from parity import floors_file
from parity.bundle import CHECKSUMS, CHECKSUMS_FORMAT, read_bundle, write_bundle
from parity.cli import app
from parity.errors import ParityError
from parity.floors import FREE, LOCAL, Floors, floats_of, measure_free, measure_local, run_variant, variants_of
from parity.floors_file import FILE, free_floors, local_floors, write_floors
from parity.oracle import Oracle
from parity.recording import Tap, to_tap
from parity.store import entry_of, listed
from reference.request import Request

SMALL = "t2i-fp32-nokv"


# Variants.


@pytest.mark.parametrize("kind", [LOCAL, FREE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variants_have_names_and_several_families(dtype, kind):
    variants = variants_of(dtype, kind)
    assert len({variant.name for variant in variants}) == len(variants)
    assert not any(":" in variant.name for variant in variants)
    assert len({variant.family for variant in variants}) >= 5
    assert all(variant.numerics.dtype in (dtype, "float64") for variant in variants)


def test_a_bfloat16_run_of_its_own_is_drawn_more_often():
    local, free = ({v.name for v in variants_of("bfloat16", kind)} for kind in (LOCAL, FREE))
    assert len(free - local) == 4 and not local - free
    assert variants_of("float32", LOCAL) == variants_of("float32", FREE)


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


@pytest.fixture(scope="module")
def measured(oracle_of):
    """Both kinds of floors of the smallest bundle, measured here."""
    oracle = oracle_of(SMALL)
    return measure_local(oracle), measure_free(oracle.bundle)


def test_what_is_measured_is_what_is_kept(oracle_of, measured):
    oracle = oracle_of(SMALL)
    for now, kept in zip(measured, (local_floors(oracle), free_floors(oracle.bundle)), strict=True):
        assert now.variants == kept.variants and list(now.errors) == list(kept.errors)
        assert now.count.keys() == kept.count.keys() and now.leading == kept.leading
        # Another processor rounds otherwise, but not by another order of magnitude.
        mine, stored = (np.array([errors.max() for errors in floors.errors.values()]) for floors in (now, kept))
        assert np.median(mine / np.maximum(stored, 1e-12)) == pytest.approx(1, abs=0.3)


def test_every_variant_rounds_in_its_own_way_and_none_computes_something_else(oracle_of, measured):
    local, free = measured
    assert local.variants[0] == "the reference itself:own"
    for floors, limit in ((local, 2e-5), (free, 2e-4)):
        table = np.stack(list(floors.errors.values()))
        assert table.shape == (len(floors.errors), len(floors.variants)) and np.all(table < limit)
        for name, column in zip(floors.variants[1:], table.T[1:], strict=True):
            # Of few rows, and on some processors, these two change nothing.
            assert name.startswith(("two threads", "padded")) or np.count_nonzero(column), name
    # A unit in the last place, drawn evenly, is an error of 2**-23 / sqrt(3).
    errors = np.stack([values for name, values in local.errors.items() if name.endswith("hidden_in")])
    drawn = [index for index, name in enumerate(local.variants) if name.endswith(":last place")]
    assert np.allclose(errors[:, drawn], 2.0**-23 / 3**0.5, rtol=0.3)


def test_threads_are_given_back(oracle_of, monkeypatch):
    import torch

    before, seen = torch.get_num_threads(), set()

    def record(run, names=None):
        seen.add(torch.get_num_threads())
        return oracle_of(SMALL).bundle.taps

    monkeypatch.setattr(measuring.TorchReplay, "record", record)
    measure_free(oracle_of(SMALL).bundle)
    assert 2 in seen and torch.get_num_threads() == before

    def fails(run, names=None):
        if torch.get_num_threads() == 2:
            raise ValueError("no")
        return oracle_of(SMALL).bundle.taps

    monkeypatch.setattr(measuring.TorchReplay, "record", fails)
    with pytest.raises(ParityError, match="^reference cannot run bundle t2i-fp32-nokv: ValueError: no$"):
        measure_free(oracle_of(SMALL).bundle)
    assert torch.get_num_threads() == before


# What is kept beside a bundle.


@pytest.fixture
def never_measured(monkeypatch):
    """Measuring fails: floors can only be read."""

    def measure(*arguments):
        raise AssertionError("measured")

    for name in ("measure_local", "measure_free"):
        monkeypatch.setattr(floors_file, name, measure)


def test_all_embedded_bundles_have_floors_that_fit_them(oracles, oracle_of, never_measured):
    found = sorted(path.parent.name for path in oracles.glob("*/manifest.json"))
    assert len(found) >= 8
    for name in found:
        local, free = local_floors(oracle_of(name)), free_floors(oracle_of(name).bundle)
        assert list(local.errors) == floats_of(oracle_of(name).taps)
        assert list(free.errors) == floats_of(oracle_of(name).bundle.taps)
        for kind, floors in ((LOCAL, local), (FREE, free)):
            names = [v.name for v in variants_of(oracle_of(name).bundle.dtype, kind)]
            assert [v.rpartition(":")[0] for v in floors.variants[1:]] == names
        assert bool(free.upstream) == (oracle_of(name).bundle.dtype == "bfloat16") and not local.upstream


def test_reading_free_floors_needs_no_weights(bundle, never_measured):
    read = read_bundle(bundle)
    assert not list(read.checkpoint.rglob("*.safetensors"))
    assert set(free_floors(read).errors) == set(floats_of(read.taps))


def invented(names, seed, upstream=()):
    draw = np.random.default_rng(seed)
    errors = {name: np.exp2(draw.uniform(-25, -3, 3)).astype(np.float32) for name in names}
    errors[next(iter(errors))][1] = 0
    ratios = {"float32": np.array([5.0, 1, 0.25], np.float32), "bfloat16": np.zeros(0, np.float32)}
    distances = {name: float(value) for name, value in zip(upstream, draw.uniform(0.001, 0.1, 999), strict=False)}
    return Floors(("a:a", "b:a", "c:c"), errors, ratios, {"float32": 77, "bfloat16": 0}, distances, 3 + seed)


@pytest.fixture
def stored(oracle_of, copy_bundle):
    """The smallest bundle with invented floors beside it, and those."""
    path = copy_bundle(SMALL)
    own = read_bundle(path)
    oracle = replace(oracle_of(SMALL), bundle=own)
    local = invented(floats_of(oracle.taps), 0)
    free = invented(floats_of(own.taps), 1, upstream=floats_of(own.taps))
    write_floors(path / FILE, oracle, local, free)
    return oracle, local, free


def test_what_is_written_is_read(stored, never_measured):
    oracle, local, free = stored
    for written, read in ((local, local_floors(oracle)), (free, free_floors(oracle.bundle))):
        assert read.variants == written.variants and read.count == written.count
        assert list(read.errors) == list(written.errors)
        for name, errors in written.errors.items():
            assert read.errors[name] == pytest.approx(errors, rel=0.01), name
        for dtype, values in written.ratios.items():
            assert read.ratios[dtype] == pytest.approx(values, rel=0.01)
    assert local_floors(oracle).leading == free_floors(oracle.bundle).leading == free.leading
    assert free_floors(oracle.bundle).upstream == pytest.approx(free.upstream, rel=0.01)


def test_writing_replaces_the_whole_file_or_nothing(stored, monkeypatch):
    oracle, local, free = stored
    path = oracle.bundle.path / FILE
    before = path.read_bytes()
    monkeypatch.setattr("parity.recording.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_floors(path, oracle, free, local)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir() if item.name.startswith(".")] == []


class Measured(Exception):
    pass


@pytest.fixture
def measuring_is_seen(monkeypatch):
    def measure(*arguments):
        raise Measured

    for name in ("measure_local", "measure_free"):
        monkeypatch.setattr(floors_file, name, measure)


def test_floors_of_another_capture_are_measured_again(stored, measuring_is_seen):
    oracle, _, _ = stored
    bundle = oracle.bundle
    kept = (bundle.path / FILE).read_bytes()
    taps = dict(bundle.taps)
    taps["latent"] = Tap(np.nextafter(taps["latent"].array, np.float32(9)), "float32")
    write_bundle(bundle.path, bundle.manifest, bundle.inputs, taps)
    again = read_bundle(bundle.path)
    for _ in range(2):
        with pytest.raises(Measured):
            free_floors(again)
        with pytest.raises(Measured):
            local_floors(replace(oracle, bundle=again))
        (bundle.path / FILE).write_bytes(kept)


def test_floors_of_other_taps_of_the_reference_are_measured_again(stored, measuring_is_seen):
    oracle, _, _ = stored
    fewer = {name: tap for name, tap in oracle.taps.items() if name != "frames"}
    with pytest.raises(Measured):
        local_floors(replace(oracle, taps=fewer))
    # The same in another order are other rows of the table.
    names = list(oracle.taps)
    with pytest.raises(Measured):
        local_floors(replace(oracle, taps={name: oracle.taps[name] for name in [*names[1:], names[0]]}))
    # Those of the bundle's own taps still fit.
    assert free_floors(oracle.bundle).leading == 4


def test_floors_of_another_format_are_measured_again(stored, measuring_is_seen):
    path = stored[0].bundle.path / FILE
    with safe_open(path, "np") as file:
        facts = json.loads(file.metadata()["floors"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    save_file(arrays, path, {"floors": json.dumps(facts | {"format": "lance-floors/0"})})
    with pytest.raises(Measured):
        free_floors(stored[0].bundle)
    save_file(arrays, path)
    with pytest.raises(Measured):
        free_floors(stored[0].bundle)


def damages():
    def told(facts):
        return {"floors": json.dumps(facts)}

    def cut(path, arrays, facts):
        path.write_bytes(path.read_bytes()[:-10])

    def without(name):
        return lambda path, arrays, facts: save_file(
            {key: value for key, value in arrays.items() if key != name}, path, told(facts)
        )

    def shorter(path, arrays, facts):
        save_file(arrays | {"free": arrays["free"][:-1], "local": arrays["local"][:-1]}, path, told(facts))

    def unnamed(path, arrays, facts):
        save_file(arrays, path, told({key: value for key, value in facts.items() if key != "free_variants"}))

    def garbled(path, arrays, facts):
        save_file(arrays, path, {"floors": json.dumps(facts)[:-1]})

    def listed(path, arrays, facts):
        save_file(arrays, path, {"floors": "[1, 2]"})

    def empty(path, arrays, facts):
        path.write_bytes(b"")

    def folder(path, arrays, facts):
        path.write_bytes(b"\0" * 20)

    return [cut, without("free"), shorter, unnamed, garbled, listed, empty, folder]


@pytest.mark.parametrize("damage", damages())
def test_damaged_floors_are_named_in_one_line(stored, damage, never_measured):
    oracle = stored[0]
    path = oracle.bundle.path / FILE
    with safe_open(path, "np") as file:
        facts = json.loads(file.metadata()["floors"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    damage(path, arrays, facts)
    with pytest.raises(ParityError) as caught:
        free_floors(oracle.bundle)
    text = str(caught.value)
    assert "floors.safetensors is not a complete file of floors" in text and "\n" not in text


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
    _, local, free = stored
    monkeypatch.setattr(measuring, "measure_local", lambda oracle, progress: local)
    monkeypatch.setattr(measuring, "measure_free", lambda bundle, progress: free)
    before = {item.name: item.read_bytes() for item in path.iterdir()}
    result = lance_parity("floors", path)
    assert result.exit_code == 0 and result.stderr == ""
    assert f"{path / FILE}: {len(local.errors)} taps, 3 variants" in result.stdout.replace("\n", "")
    after = {item.name: item.read_bytes() for item in path.iterdir()}
    assert after.keys() - before.keys() == {FILE} and after.items() >= before.items()
    oracle = Oracle.of(read_bundle(path))
    assert local_floors(oracle).variants == local.variants


def test_floors_that_are_listed_are_listed_anew(lance_parity, linked_bundle, stored, monkeypatch):
    path = linked_bundle(SMALL)
    _, local, free = stored
    monkeypatch.setattr(measuring, "measure_local", lambda oracle, progress: local)
    monkeypatch.setattr(measuring, "measure_free", lambda bundle, progress: free)
    name = f"{SMALL}/{FILE}"
    listing = {"format": CHECKSUMS_FORMAT, "files": {name: entry_of(path / FILE), "other": {"sha256": "0"}}}
    (path.parent / CHECKSUMS).write_text(json.dumps(listing))
    assert lance_parity("floors", path).exit_code == 0
    files = listed(path.parent)
    assert files["other"] == {"sha256": "0"}
    assert files[name] == entry_of(path / FILE) != listing["files"][name]
    read_bundle(path)


def test_floors_of_bad_folders_are_one_line(lance_parity, tmp_path, bundle):
    for folder, words in ((tmp_path / "nothing", "nothing"), (bundle, "reference cannot run bundle")):
        result = lance_parity("floors", folder)
        assert result.exit_code == 2
        assert result.stderr.startswith("lance-parity: ") and result.stderr.count("\n") == 1
        assert words in result.stderr
