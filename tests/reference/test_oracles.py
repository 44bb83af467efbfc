"""The reference against what upstream computed: every bundle and layout there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from parity.lance.replay_torch import TorchReplay, layout_reference
from parity.tensors.recording import Recording, Replay, to_tap
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.request import Request

ROOT = Path(__file__).parents[2]
# More bundles of the same kind may lie beside the repository.
ORACLES = [folder for folder in (ROOT / "oracles", ROOT.parent / "shared" / "oracles") if folder.is_dir()]


def found(pattern: str) -> list[Path]:
    """Paths of the first folder that has them, by name."""
    paths: dict[str, Path] = {}
    for folder in ORACLES:
        for path in sorted(folder.glob(pattern)):
            paths.setdefault(path.name, path)
    return [path for _, path in sorted(paths.items())]


BUNDLES = [path for path in found("*") if (path / "manifest.json").is_file()]
LAYOUTS = found("layouts/*.npz")


@pytest.mark.skipif(len(ORACLES) < 2, reason="no oracles beside the repository: only the embedded ones are compared")
def test_every_task_and_entry_is_compared():
    kinds = {tuple(path.name.split("-")) for path in BUNDLES}
    tasks = ("t2i", "t2v", "i2v", "image_edit", "video_edit", "x2t_image", "x2t_video")
    assert kinds >= {(task, *kind) for task in tasks for kind in (("fp32", "kv"), ("fp32", "nokv"), ("bf16", "kv"))}


def read(path: Path) -> Recording:
    with safe_open(path, "pt") as file:
        return {name: to_tap(file.get_tensor(name)) for name in file.keys()}


def given(inputs: Recording, taps: Recording) -> Replay:
    def numbered(source: Recording, pattern: str) -> tuple[np.ndarray, ...]:
        names = [pattern.format(i) for i in range(len(source))]
        return tuple(source[name].array for name in names if name in source)

    grids = inputs["vit_video_grid_thw"].array.tolist() if "vit_video_grid_thw" in inputs else []
    return Replay(
        noise=taps["sampler.noise"].array if "sampler.noise" in taps else None,
        vae_pixels=numbered(inputs, "vae_pixels{}"),
        vit_patches=numbered(inputs, "vit_patches{}"),
        vit_grids=tuple(tuple(grid) for grid in grids),
        eps=numbered(taps, "vae.encode{}.eps"),
    )


def replay(bundle: Path, linear: str = "float32") -> tuple[Recording, Recording]:
    """The oracle's taps and the reference's recording; raises where integers, names or shapes differ."""
    torch.set_num_threads(1)
    manifest = json.loads((bundle / "manifest.json").read_text())
    inputs, taps = read(bundle / "inputs.safetensors"), read(bundle / "taps.safetensors")
    source = manifest["source"]
    numerics = Numerics(source["dtype"], linear=linear)
    pipeline = Pipeline.load(bundle.parent / manifest["checkpoint"], manifest["variant"], numerics, "cpu")
    request = Request.from_dict(manifest["request"])
    recording = TorchReplay(pipeline, request, source["entry"], given(inputs, taps)).record()
    for name, tap in inputs.items():
        if tap.dtype == "int32":
            np.testing.assert_array_equal(recording[name].array, tap.array, err_msg=name)
    for name, tap in taps.items():
        ours = recording[name]
        assert (ours.dtype, ours.array.shape) == (tap.dtype, tap.array.shape), name
        if tap.dtype == "int32":
            np.testing.assert_array_equal(ours.array, tap.array, err_msg=name)
    return taps, recording


def distances(taps: Recording, recording: Recording) -> dict[str, float]:
    out = {}
    for name, tap in taps.items():
        if tap.dtype != "int32":
            there, here = tap.array.astype(np.float64), recording[name].array
            out[name] = float(np.linalg.norm(here - there) / max(np.linalg.norm(there), 1e-30))
    return out


@pytest.mark.parametrize("bundle", [b for b in BUNDLES if "fp32" in b.name], ids=lambda bundle: bundle.name)
def test_float32_bundle(bundle):
    assert max(distances(*replay(bundle)).values()) < 2e-5


@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param(bundle, marks=() if bundle.name.startswith(("t2v", "x2t_image")) else pytest.mark.exhaustive)
        for bundle in BUNDLES
        if "bf16" in bundle.name
    ],
    ids=lambda bundle: bundle.name,
)
def test_bfloat16_bundle(bundle):
    taps, recording = replay(bundle)
    found = distances(taps, recording)
    assert np.median(list(found.values())) < 1e-2
    assert max(found.values()) < 5e-2
    # What comes before the first attention and matrix product has no order of summation to differ in.
    first = "cond.prefix0" if "cond.prefix0/hidden_in" in taps else "cond.prefill0"
    for name in (f"{first}/hidden_in", f"{first}/language_model.model.layers.0.input_layernorm"):
        np.testing.assert_array_equal(recording[name].array, taps[name].array)


BITS = """
import sys
sys.path.insert(0, "tests/reference")
from pathlib import Path
from test_oracles import replay
for path in sys.argv[1:]:
    taps, recording = replay(Path(path), "native")
    equal = sum((recording[name].array == tap.array).sum() for name, tap in taps.items())
    print(equal / sum(tap.array.size for tap in taps.values()))
"""


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available(),
    reason="the kernels of the capture need AVX-512 and MKL",
)
def test_bfloat16_bundles_bit_for_bit_with_the_kernels_of_the_capture():
    # Only the order of summation is the processor's: with that of the capture, every rounding is upstream's.
    kernels = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
    bundles = [bundle for bundle in BUNDLES if "bf16" in bundle.name]
    command = [sys.executable, "-c", BITS, *map(str, bundles)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | kernels, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for bundle, equal in zip(bundles, map(float, done.stdout.split()), strict=True):
        # Rarely a bit of an attention still differs, and what follows from it then differs by rounding.
        assert equal > (0.7 if bundle.name.startswith(("i2v", "video_edit")) else 0.999), bundle.name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda path: path.stem)
def test_layout(layout):
    wanted = np.load(layout)
    request = json.loads(layout.with_suffix(".json").read_text())["request"]
    arrays = layout_reference(request, ROOT / "tests" / "data" / "tokenizer", layout.parents[1])
    assert set(arrays) == set(wanted)
    for name in wanted:
        assert arrays[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(arrays[name], wanted[name], err_msg=name)
