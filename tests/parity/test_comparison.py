import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import parity
from parity.cli.main import app
from parity.comparison.check import check_bundle
from parity.comparison.compare import EQUALITY, FLOORS, WITHIN, compare_runs
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE, UNUSABLE
from parity.errors import ParityError
from parity.lance.ports import PORTS
from parity.tensors.recording import Tap, read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
ORACLES = ROOT / "oracles"
T2I = ORACLES / "t2i-fp32-kv"
LAYER = "language_model.model.layers.1"
VALUES = np.linspace(-3, 5, 24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def use(monkeypatch):
    """Put implementations in the place of mlx and the reference."""

    def replace(**implementations):
        for name, implementation in implementations.items():
            monkeypatch.setitem(PORTS, name, implementation)

    return replace


@pytest.fixture
def lance_parity():
    def invoke(*arguments):
        result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def doubled(array):
    return array * 2


def test_a_bundle_and_its_replay_are_judged_by_its_floors():
    result = check_bundle(T2I, "mlx")
    limits = {tap.tap.name: tap.limit.allowed for tap in result.taps}
    for a, b in ((T2I, f"{T2I}@mlx"), (f"{T2I}@mlx", T2I), (T2I, "@reference"), (f"{T2I}@reference", "@mlx")):
        compared = parity.compare(a, b)
        assert (compared.judged_by, compared.only_a) == (FLOORS, [])
        assert compared.verdict == (result.verdict if {a, b} == {T2I, f"{T2I}@mlx"} else AGREE), compared.describe()
        assert len(compared.taps) == 408 and compared.taps[0].name == "inputs/text_ids"
        assert {tap.name: tap.limit for tap in compared.taps if not tap.name.startswith("inputs/")} == limits


def test_a_replay_that_departs_is_named(use, replayed):
    tap = f"cond.step0/{LAYER}.self_attn.q_norm_moe_gen"
    use(mlx=replayed(changed={tap: doubled, "pixels": doubled}), reference=replayed(name="reference"))
    for a in (T2I, f"{T2I}@reference"):
        compared = parity.compare(a, f"{T2I}@mlx")
        assert compared.verdict == DIVERGE and compared.first_divergence.name == tap
        assert compared.first_divergence.component == "layers.1.self_attn.q_norm_moe_gen"
        assert compared.reason == "diverging: 2 of 408 taps"
    use(mlx=replayed(dropped=("pixels",)))
    compared = parity.compare(T2I, "@mlx")
    assert (compared.verdict, compared.only_a, compared.reason) == (UNUSABLE, ["pixels"], "1 tap missing")
    assert parity.compare(T2I, "@mlx", allow_missing=True).verdict == AGREE


def test_what_a_port_resizes_is_compared_beside_its_taps():
    compared = parity.compare(ORACLES / "image_edit-fp32-nokv", "@mlx")
    assert compared.verdict == AGREE, compared.describe()
    assert {"inputs/vae_pixels0", "inputs/vit_patches0"} <= {row.name for row in compared.taps}


def test_two_numerics_are_inconclusive_without_a_bound():
    a, b = f"{T2I}@mlx:float32", "@mlx:bfloat16"
    compared = parity.compare(a, b)
    assert (compared.verdict, compared.judged_by) == (INCONCLUSIVE, EQUALITY)
    assert compared.a.endswith("@mlx:float32") and compared.b.endswith("@mlx:bfloat16")
    # Integers are equal in both, and differing dtypes are what was asked for.
    assert not any(tap.diverges for tap in compared.taps)
    assert {tap.dtype_b for tap in compared.taps} == {"bfloat16", "float32", "int32"}
    worst = max(tap.difference.rel_l2 for tap in compared.taps)
    assert parity.compare(a, b, within=1.01 * worst).verdict == AGREE
    assert parity.compare(a, b, within=0.99 * worst).verdict == DIVERGE
    assert parity.compare(a, b, within=1.0, check_dtype=True).verdict == DIVERGE


def test_a_bound_that_is_given_comes_before_the_floors():
    compared = parity.compare(T2I, "@mlx", within=1e-9)
    assert (compared.verdict, compared.judged_by, compared.within) == (DIVERGE, WITHIN, 1e-9)


def test_bundles_dumps_and_files_are_compared_from_where_they_lie(tmp_path):
    taps = read_tensors(T2I / "taps.safetensors")
    write_tensors(tmp_path / "dump" / "taps.safetensors", taps)
    compared = parity.compare(tmp_path / "dump", str(tmp_path / "dump" / "taps.safetensors"))
    assert (compared.verdict, compared.judged_by, len(compared.taps)) == (AGREE, EQUALITY, 399)
    assert parity.compare(T2I, T2I).verdict == AGREE
    with_inputs = parity.compare(T2I, tmp_path / "dump")
    assert with_inputs.verdict == UNUSABLE and set(with_inputs.only_a) >= {"inputs/text_ids", "inputs/modality"}
    assert parity.compare(T2I, tmp_path / "dump", allow_missing=True).verdict == AGREE
    assert parity.compare(tmp_path / "dump", T2I).only_b == with_inputs.only_a
    taps["sampler.x_t1"] = Tap(taps["sampler.x_t1"].array + np.float32(1e-6), "float32")
    write_tensors(tmp_path / "dump" / "taps.safetensors", taps)
    compared = parity.compare(tmp_path / "dump", T2I)
    assert compared.verdict == INCONCLUSIVE and "not equal: 1 of 399 taps" in compared.reason
    assert parity.compare(tmp_path / "dump", T2I, within=1e-5).verdict == AGREE
    # Taps come in order of execution, whatever the order of the file.
    names = [tap.name for tap in compared.taps]
    assert names[0] == "sampler.noise" and names[-1] == "pixels"
    assert names.index("cond.step0/hidden_in") < names.index(f"cond.step0/{LAYER}") < names.index("sampler.x_t1")


ARRAYS = {
    "numpy": lambda values: values,
    "torch": torch.from_numpy,
    "torch with gradients": lambda values: torch.from_numpy(values).requires_grad_(),
    "mlx": mx.array,
    "tap": lambda values: Tap(values, "float32"),
    "transposed": lambda values: np.ascontiguousarray(values.T).T,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind_are_compared(kind):
    made = ARRAYS[kind]
    assert parity.compare({"x": VALUES}, {"x": made(VALUES)}).verdict == AGREE
    off = VALUES.copy()
    off[2, 3] += 0.5
    compared = parity.compare({"x": VALUES}, {"x": made(off)}, within=1e-3)
    first = compared.first_divergence
    assert compared.verdict == DIVERGE and first.difference.at == (2, 3)
    assert first.difference.rel_l2 == pytest.approx(0.5 / np.linalg.norm(VALUES), rel=1e-5)


def test_bfloat16_and_integers_are_compared_across_libraries():
    half = torch.from_numpy(VALUES).bfloat16()
    other = mx.array(VALUES).astype(mx.bfloat16)
    assert parity.compare({"x": half}, {"x": other}).verdict == AGREE
    compared = parity.compare({"x": half}, {"x": half.float()}, within=0.1)
    assert compared.verdict == DIVERGE and "dtype float32 instead of bfloat16" in compared.describe()
    assert parity.compare({"x": half}, {"x": half.float()}, check_dtype=False).verdict == AGREE
    ids = np.arange(5)
    for same in (ids.astype(np.uint8), torch.arange(5), mx.arange(5), [0, 1, 2, 3, 4]):
        assert parity.compare({"ids": ids}, {"ids": same}).verdict == AGREE
    # No bound makes integers that differ alike, or stand for floats.
    assert parity.compare({"ids": ids}, {"ids": ids + 1}, within=10.0).verdict == DIVERGE
    assert (
        parity.compare({"ids": ids}, {"ids": ids.astype(np.float32)}, within=1.0, check_dtype=False).verdict == DIVERGE
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"x": VALUES.astype(np.float64)}, {"x": VALUES}, "x is float64: cast it"),
        ({"x": torch.ones(2, dtype=torch.float16)}, {"x": np.ones(2, np.float16)}, "x is float16: cast it"),
        ({"x": np.array([2**40])}, {"x": np.array([1])}, "integers that int32 cannot"),
        ({"x": np.array(["a"])}, {"x": np.array(["a"])}, "cast it"),
        (3, {"x": VALUES}, "int is no run"),
        ("nothing", {"x": VALUES}, "nothing does not exist"),
        (ORACLES, {"x": VALUES}, "is no bundle and holds no taps.safetensors"),
        (ROOT / "README.md", {"x": VALUES}, "is not a complete safetensors file"),
        (f"{T2I}@torch", T2I, "there is no implementation 'torch': name mlx, reference, or FILE.py:NAME"),
        (f"{T2I}@mlx:fp8", T2I, "numerics 'fp8' is not one of float32, bfloat16"),
        ("@mlx", T2I, "which bundle?"),
        ("nowhere@mlx", T2I, "nowhere does not exist: name the folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(a, b, message):
    with pytest.raises(ParityError) as caught:
        parity.compare(a, b)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_bound_must_be_one():
    for within in (-1.0, float("nan")):
        with pytest.raises(ParityError, match="within must be"):
            parity.compare({"x": VALUES}, {"x": VALUES}, within=within)


def test_a_damaged_bundle_is_refused(bundle):
    taps = read_tensors(bundle / "taps.safetensors")
    del taps["latent"]
    write_tensors(bundle / "taps.safetensors", taps)
    with pytest.raises(ParityError, match="lack latent"):
        parity.compare(bundle, bundle)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["taps"][0]["name"] = ["a"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ParityError, match=r"lack \['a'\]"):
        parity.compare(bundle, bundle)


@pytest.mark.parametrize(
    ("a", "b"),
    [({}, {}), ({"x": VALUES}, {"y": VALUES}), ({"x": VALUES[:0]}, {"x": VALUES[:0]}), ({"x": VALUES}, {})],
)
def test_nothing_never_agrees(a, b):
    for within in (None, 1.0):
        compared = parity.compare(a, b, within=within, allow_missing=True)
        assert compared.verdict == UNUSABLE
        with pytest.raises(AssertionError, match="nothing was compared"):
            parity.assert_agrees(a, b, within=within, allow_missing=True)


def test_what_is_not_finite_or_of_another_shape_diverges_whatever_the_bound():
    nan = VALUES.copy()
    nan[1, 1] = np.nan
    for other, words in ((nan, "nan at [1, 1]"), (VALUES.T, "shape [6, 4] instead of [4, 6]"), (-nan, "nan")):
        compared = parity.compare({"x": VALUES}, {"x": other}, within=1e9)
        assert compared.verdict == DIVERGE and words in compared.describe()
    assert parity.compare({"x": nan}, {"x": nan}).verdict == AGREE


def test_minus_zero_is_within_any_bound_but_not_equal():
    zero, minus = {"x": np.zeros(3, np.float32)}, {"x": -np.zeros(3, np.float32)}
    assert parity.compare(zero, minus).verdict == INCONCLUSIVE
    assert parity.compare(zero, minus, within=0.0).verdict == AGREE


def test_assert_agrees_names_the_first_divergence():
    parity.assert_agrees({"x": VALUES}, {"x": VALUES * np.float32(1.00001)}, within=1e-4)
    expected = {"cond.step1/llm2vae": VALUES, "cond.step0/llm2vae": VALUES, "ids": np.arange(4), "extra": VALUES}
    got = {"cond.step1/llm2vae": VALUES * 2, "cond.step0/llm2vae": VALUES * 3, "ids": np.arange(4)}
    with pytest.raises(AssertionError) as caught:
        parity.assert_agrees(expected, got, within=1e-3)
    lines = str(caught.value).splitlines()
    assert lines[0] == "b against a: diverge, diverging: 2 of 3 taps"
    assert lines[1] == "first divergence: cond.step0/llm2vae: error 2, limit 0.001"
    assert lines[2].startswith("  largest difference at [3, 5]: 15 instead of 5")
    assert lines[3] == "b lacks extra"
    # An integer decides what the rest means.
    with pytest.raises(AssertionError, match="first divergence: ids"):
        parity.assert_agrees(expected, got | {"ids": np.arange(4) + 1}, within=1e-3)
    for other in ({"x": VALUES + np.float32(1e-3)}, {"x": VALUES, "y": VALUES}):
        with pytest.raises(AssertionError, match="give a bound|b lacks y"):
            parity.assert_agrees({"x": VALUES, **{k: v for k, v in other.items() if k == "y"}}, {"x": other["x"]})


def test_frames_have_a_row_for_each_tap():
    compared = parity.compare(T2I, "@mlx")
    frame = compared.to_frame()
    columns = ["tap", "call", "component", "shape", "dtype", "rel_l2", "max_abs", "cosine", "bits_equal"]
    assert len(frame) == 408 and set(columns) <= set(frame.columns)
    row = frame.set_index("tap").loc[f"cond.step0/{LAYER}.mlp_moe_gen"]
    assert (row["call"], row["component"], row["shape"]) == ("cond.step0", "layers.1.mlp_moe_gen", (24, 64))
    assert 0 < row["rel_l2"] < 2e-5 and row["bits_equal"] < 1 and row["cosine"] == pytest.approx(1)
    assert frame.groupby("call")["rel_l2"].max()["vae.decode.chunk0"] < 1e-4
    assert list(parity.compare({}, {}).to_frame().columns) == list(frame.columns)
    document = json.loads(json.dumps(compared.to_json(), allow_nan=False))
    assert document["compared"] == 408 and document["taps"][9]["tap"] == "sampler.noise"


PEAK = """
import sys
from pathlib import Path
import parity
from parity import memory
from parity.comparison.compare import compare_runs
warm = compare_runs(sys.argv[1], sys.argv[1])
memory.reset_peak()
before = memory.peak()
compared = compare_runs(sys.argv[2], sys.argv[3], within=1e-3)
print(compared.verdict, len(compared.taps), memory.peak() - before)
"""


def test_files_are_compared_in_the_memory_of_two_taps(tmp_path):
    count, side = 12, 2_000_000
    values = np.random.default_rng(0).standard_normal(side, np.float32)
    taps = {f"cond.step{step}/llm2vae": Tap(values, "float32") for step in range(count)}
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", taps)
    write_tensors(tmp_path / "warm.safetensors", {"latent": Tap(values[:1000], "float32")})
    command = [sys.executable, "-c", PEAK, *(tmp_path / f"{name}.safetensors" for name in ("warm", "a", "b"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    verdict, compared, grown = done.stdout.split()
    assert (verdict, compared) == ("agree", str(count))
    # A tap of each side, and something for what the allocator keeps; all together would be 24 of them.
    assert int(grown) < 3.5 * values.nbytes


def test_the_command_exits_by_the_verdict(lance_parity, use, replayed, tmp_path):
    use(mlx=replayed())
    result = lance_parity(T2I, "@mlx")
    assert result.exit_code == 0 and "✓ agree, 408 taps compared" in result.stdout
    result = lance_parity(f"{T2I}@mlx", f"{ORACLES / 't2i-fp32-nokv'}@mlx", "--allow-missing", "--within", "1e-5")
    assert result.exit_code == 1 and "first divergence" in result.stdout
    write_tensors(tmp_path / "a.safetensors", {"latent": Tap(VALUES, "float32")})
    write_tensors(tmp_path / "b.safetensors", {"latent": Tap(VALUES + np.float32(1e-3), "float32")})
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    result = lance_parity(*files)
    assert result.exit_code == 2 and "? inconclusive" in result.stdout
    assert lance_parity(*files, "--within", "1e-2").exit_code == 0
    assert lance_parity(*files, "--within", "1e-6").exit_code == 1
    result = lance_parity(files[0], tmp_path / "c.safetensors", "--format", "json", "--output", tmp_path / "r.json")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "does not exist" in result.stderr
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["verdict"] == "unusable"


def test_progress_is_told_of_what_is_computed(use, replayed):
    use(mlx=replayed())
    told = []
    compare_runs(T2I, "@mlx", start=lambda name: told.append(name) or told.append)
    assert told[:3] == [str(T2I), "@mlx", "step0"]


def test_importing_parity_loads_nothing_heavy():
    script = "import sys, parity, parity.cli.main; assert not {'mlx', 'pandas', 'reference'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(getattr(parity, name) is not None for name in parity.__all__)
    with pytest.raises(AttributeError, match="no attribute 'contrast'"):
        _ = parity.contrast


def test_what_check_dumped_is_judged_by_the_bundle_s_floors(tmp_path, lance_parity):
    done = CliRunner().invoke(app, ["check", str(T2I), "--impl", "mlx", "--dump", str(tmp_path)])
    assert done.exit_code == 0 and lance_parity(T2I, tmp_path).exit_code == 0
    judged = parity.compare(T2I, tmp_path)
    assert (judged.verdict, judged.judged_by, judged.only_a, judged.only_b) == (AGREE, FLOORS, [], [])
    taps = read_tensors(tmp_path / "taps.safetensors")
    name = f"cond.step0/{LAYER}.mlp_moe_gen"
    write_tensors(tmp_path / "taps.safetensors", taps | {name: replace(taps[name], array=taps[name].array * 1.001)})
    found = parity.compare(T2I, tmp_path)
    assert (found.verdict, found.first_divergence.name) == ("diverge", name)
    del taps["latent"]
    write_tensors(tmp_path / "taps.safetensors", taps)
    assert parity.compare(T2I, tmp_path).verdict == "unusable"
    assert parity.compare(T2I, tmp_path, allow_missing=True).verdict == AGREE
