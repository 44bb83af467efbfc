"""Make the oracle and the reference disagree in many ways, and see that none of them passes for agreement.

    python scripts/blindness.py [--bundle PATH]... [--output FILE]
    python scripts/blindness.py [--bundle PATH]... --weights FACTOR

Each way changes a copy: a weight of the checkpoint, a tap of the capture, its noise, or what upstream computes (what a
reference with another mask, stride or guidance computes takes the place of the capture). `check` and `localize` get
every copy, with lance_mlx, which runs from the same copy; for the first of each kind floors are measured anew, for the
others those of the bundle are kept with it. A way that leaves the reference's values as they are, to the bit, is no
disagreement and is left out. With --weights every weight of one layer and one block, and of what is in none, is scaled
by itself, and the bundle alone is judged; no table is written. Exit status: 0 when every way is refused or called wrong
and what was changed is named, 1 otherwise.
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tables import README, replace_between

import reference.model
import reference.mot
import reference.sampler
import reference.sequence
from parity.bundle.reading import read_bundle
from parity.cli.errors import one_line_errors
from parity.comparison.check import check_bundle
from parity.comparison.verdict import AGREE
from parity.errors import ParityError
from parity.lance.trusted import load_run
from parity.localize.investigation import localize
from parity.oracle.floors_file import FILE, floors_of, judge_bundle, write_floors
from parity.oracle.judgement import Cause
from parity.oracle.oracle import Oracle
from parity.report.runner import limit_threads
from parity.report.terminal import progress_bar
from parity.tensors.recording import Recording, Tap, read_tensors, write_tensors
from reference.numerics import Numerics

SHARED = Path(__file__).parents[2] / "shared" / "oracles"
ORACLES = Path(__file__).parents[1] / "oracles"
BUNDLES = tuple((SHARED if SHARED.is_dir() else ORACLES) / name for name in (
    "t2i-fp32-kv", "t2v-bf16-kv", "image_edit-fp32-nokv", "x2t_image-bf16-kv"))  # fmt: skip
WEIGHTS, CAPTURE, INPUTS, CODE = "weights", "capture", "inputs", "code"
NAMED = {WEIGHTS: {Cause.WEIGHTS}, CODE: {Cause.CODE, Cause.INPUTS}, INPUTS: {Cause.INPUTS}, CAPTURE: {Cause.CAPTURE}}
"""What has to be among the causes that are named of each kind."""


class Unchanged(Exception):
    """A way changes nothing in a bundle."""


@dataclass(frozen=True)
class Way:
    """One way to disagree: what is changed, its kind, and how the copy in a folder is changed."""

    name: str
    kind: str
    change: Callable[[Path], None]


def ways(folder: Path) -> Iterator[Way]:
    """The ways that fit the bundle in a folder."""
    bundle = read_bundle(folder)
    llm = f"{bundle.variant}/model.safetensors"
    layer = "language_model.model.layers.1."
    drawn = "sampler.noise" in bundle.taps
    attention = ["q_proj.weight", "v_proj.weight"]
    families = [layer + "mlp.down_proj.weight", layer + "input_layernorm.weight", "language_model.model.norm.weight",
                "language_model.model.embed_tokens.weight"]  # fmt: skip
    if drawn:
        attention = ["o_proj_moe_gen.weight", "v_proj_moe_gen.weight", "k_norm_moe_gen.weight"]
        families = [layer + "mlp_moe_gen.down_proj.weight", layer + "mlp_moe_gen.gate_proj.weight",
                    "language_model.model.norm_moe_gen.weight", "llm2vae.weight", "vae2llm.bias",
                    "time_embedder.mlp.0.weight"]  # fmt: skip
    families += [f"{layer}self_attn.{name}" for name in attention]
    for name in families:
        for factor in (1.001, 1.05, 1.5):
            yield Way(f"{name} times {factor}", WEIGHTS, _weight(llm, name, lambda w, factor=factor: w * factor))
    yield Way(f"{families[0]} of another seed", WEIGHTS, _weight(llm, families[0], _redrawn))
    yield Way(f"{families[1]} upside down", WEIGHTS, _weight(llm, families[1], lambda w: w.flip(0)))
    yield Way("all weights cast to float16", WEIGHTS, _weight(llm, "", lambda w: w.half().float()))
    yield Way("the other variant's weights", WEIGHTS, _swapped(bundle.variant))
    given = (".eps", "noise", "x_init", "x_t0")
    floats = [name for name, tap in bundle.taps.items() if tap.dtype != "int32" and not name.endswith(given)]
    floats = [name for name in floats if not name.startswith(("sampler.timestep", "vae.latent"))]
    middle = [name for name in floats if name.endswith(("hidden_out", "layers.1.mlp", "layers.1.mlp_moe_gen"))]
    results = [name for name in ("latent", "pixels", "vit_model0") if name in floats]
    velocities = [name for name in floats if name.startswith("velocity_call")]
    chosen = list(dict.fromkeys([floats[0], *middle[:1], *results, *velocities[1:2]]))
    for name in chosen:
        for what, change in _TAPS.items():
            yield Way(f"tap {name} {what}", CAPTURE, _tap(name, change))
        yield Way(f"tap {name} with noise", CAPTURE, _tap(name, _noisy(_NOISE[bundle.dtype])))
    if drawn:
        yield Way("other noise", INPUTS, _tap("sampler.noise", lambda x: np.random.default_rng(1).permuted(x, axis=0)))
    for name, patched in _CODE.items():
        yield Way(f"upstream with {name}", CODE, _recaptured(patched))


def every_weight(folder: Path, factor: float) -> Iterator[Way]:
    """One weight after the other times a factor, of one layer and one block, of the bundle's variant and of the ViT."""
    checkpoint = folder.parent / "checkpoint-a"
    for path in (
        checkpoint / read_bundle(folder).variant / "model.safetensors",
        *checkpoint.glob("*ViT/*.safetensors"),
    ):
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if not re.search(r"\.layers\.(?!1\.)|\bblocks\.(?!0\.)", n)]  # noqa: SIM118
        for name in names:
            change = _weight(str(path.relative_to(checkpoint)), name, lambda w: w * factor)
            yield Way(f"{name} times {factor}", WEIGHTS, change)


def _part(x: np.ndarray) -> slice:
    return slice(0, max(x.size // 8, 1))


def _changed(x: np.ndarray, change: Callable[[np.ndarray], object]) -> np.ndarray:
    flat = x.reshape(-1).copy()
    change(flat)
    return flat.reshape(x.shape)


_TAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeroed in part": lambda x: _changed(x, lambda flat: flat.__setitem__(_part(flat), 0)),
    "shifted": lambda x: np.roll(x, 1, axis=-1),
    "permuted": lambda x: np.random.default_rng(2).permuted(x, axis=0) if len(x) > 1 else np.flip(x, -1).copy(),
    "with NaN": lambda x: _changed(x, lambda flat: flat.__setitem__(0, np.nan)),
}
_NOISE = {"float32": 0.001, "bfloat16": 0.25}
"""Noise as a part of a tap's mean size: well beyond what rounding does to any tap, pixels included."""


def _noisy(size: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x + size * np.abs(x).mean() * np.random.default_rng(3).standard_normal(x.shape)


@contextmanager
def _causal() -> Iterator[None]:
    real = reference.mot.attend

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *how: object
    ) -> torch.Tensor:
        past = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        return real(q, k, v, past if mask is None else mask & past, *how)

    with patch.object(reference.mot, "attend", attend):
        yield


@contextmanager
def _stride() -> Iterator[None]:
    real = reference.sequence.build_layout

    def build(request: object, tokenizer: object, sizes: object, *stride: object) -> object:
        return real(request, tokenizer, sizes, 1)

    with patch.object(reference.model, "build_layout", build):
        yield


@contextmanager
def _renorm() -> Iterator[None]:
    real = reference.sampler.guide

    def guide(cond: torch.Tensor, uncond: torch.Tensor, request: object) -> torch.Tensor:
        return uncond + (cond - uncond) * request.cfg_text_scale + 0 * real(cond, uncond, request)

    with patch.object(reference.sampler, "guide", guide):
        yield


_CODE = {"a causal mask throughout": _causal, "another temporal stride": _stride, "no renorm": _renorm}


def _weight(file: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder.parent / "checkpoint-a" / file
        tensors = load_file(path)
        tensors |= {key: change(w) for key, w in tensors.items() if not name or key == name}
        path.unlink()
        save_file({key: w.contiguous() for key, w in tensors.items()}, path)

    return apply


def _redrawn(w: torch.Tensor) -> torch.Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(7)) * w.std()


def _swapped(variant: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        checkpoint = folder.parent / "checkpoint-a"
        other = "Lance_3B" if variant == "Lance_3B_Video" else "Lance_3B_Video"
        mine, theirs = (load_file(checkpoint / each / "model.safetensors") for each in (variant, other))
        path = checkpoint / variant / "model.safetensors"
        path.unlink()
        save_file(mine | {name: w.contiguous() for name, w in theirs.items() if name in mine}, path)

    return apply


def _tap(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        taps = read_tensors(folder / "taps.safetensors")
        dtype = taps[name].dtype
        array = np.asarray(change(taps[name].array), np.float32)
        if dtype == "bfloat16":
            array = torch.from_numpy(array.copy()).bfloat16().float().numpy()
        write_tensors(folder / "taps.safetensors", taps | {name: Tap(np.ascontiguousarray(array), dtype)})

    return apply


def _recaptured(patched: Callable[[], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        bundle = read_bundle(folder)
        run = load_run(bundle, Numerics(bundle.dtype))
        plain: Recording = run.record()
        # The layout is kept with a run, and made anew under the patch.
        with patched():
            recording: Recording = load_run(bundle, Numerics(bundle.dtype)).record()
        if all(np.array_equal(recording[name].array, tap.array) for name, tap in plain.items() if name in recording):
            raise Unchanged
        taps = {name: recording.get(name, tap) for name, tap in bundle.taps.items()}
        if any(taps[n].array.shape != tap.array.shape for n, tap in bundle.taps.items()):
            taps = {n: taps[n] if taps[n].array.shape == tap.array.shape else tap for n, tap in bundle.taps.items()}
        write_tensors(folder / "taps.safetensors", taps)

    return apply


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(path, Path(folder) / path.name, ignore=shutil.ignore_patterns("floors.*"))
        shutil.copytree(path.parent / "checkpoint-a", Path(folder) / "checkpoint-a")
        (Path(folder) / "media").symlink_to(path.parent / "media", target_is_directory=True)
        yield Path(folder) / path.name


def main(
    bundle: Annotated[list[Path] | None, typer.Option(metavar="PATH", help="Bundles to try.")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="File that holds the table.")] = README,
    weights: Annotated[float | None, typer.Option(metavar="FACTOR", help="Scale every weight by itself.")] = None,
) -> None:
    """Try every way on every bundle, and write the table."""
    with one_line_errors():
        limit_threads()
        rows, missed, counted = [], [], 0
        paths = bundle or list(BUNDLES)
        with progress_bar(len(paths), "bundle") as start:
            for path in paths:
                tell, fresh = start(path.name), set[str]()
                whole = Oracle.of(read_bundle(path))
                floors = floors_of(whole, tell)
                for way in ways(path) if weights is None else every_weight(path, weights):
                    tell(way.name)
                    with _copied(path) as copy:
                        try:
                            way.change(copy)
                        except Unchanged:
                            continue
                        if way.kind == WEIGHTS and _unchanged(copy, whole):
                            continue
                        if way.kind in fresh:
                            write_floors(copy / FILE, whole, floors)
                        fresh.add(way.kind)
                        said = _said(copy) if weights is None else _judged(copy)
                    for command, (verdict, why) in said.items():
                        counted += 1
                        likely = why.partition("; likely ")[2].partition(":")[0]
                        named = any(cause in likely for cause in NAMED[way.kind])
                        # What cannot be read is refused by the name of what is broken.
                        named |= verdict == "refused" and way.name.split()[1] in why
                        if verdict == AGREE or not named:
                            missed.append(f"{path.name}, {command}: {way.name}: {verdict}, {why}")
                rows += [(path.name, len(fresh))]
        text = f"{counted} trials, {len(missed)} passed for agreement or named wrongly.\n"
        if weights is None:
            replace_between(output, "blindness", text)
        print(text, end="")
        print("".join(f"{line}\n" for line in missed), end="", file=sys.stderr)
        raise typer.Exit(bool(missed) or not counted)


def _unchanged(copy: Path, whole: Oracle) -> bool:
    """Whether the reference computes from a copy what it computes from the bundle, and both hold the same."""
    try:
        oracle = Oracle.of(read_bundle(copy))
    except ParityError:
        return False
    names = oracle.bundle.expected
    return all(
        np.array_equal(oracle.own[n].array, whole.own[n].array)
        and np.array_equal(oracle.bundle.expected[n].array, whole.bundle.expected[n].array)
        for n in names
    )


def _said(copy: Path) -> dict[str, tuple[str, str]]:
    said = {}
    for command, run in (("check", lambda: check_bundle(copy, "mlx")), ("localize", lambda: localize(copy))):
        try:
            result = run()
            first = getattr(result, "first_divergence", None) or getattr(result, "first", None)
            said[command] = str(result.verdict), result.reason or json.dumps(first, default=str)
        except ParityError as error:
            said[command] = "refused", str(error)
    return said


def _judged(copy: Path) -> dict[str, tuple[str, str]]:
    found = judge_bundle(copy)
    return {"judge": (AGREE if found.agree else "refused", found.sentence())}


if __name__ == "__main__":
    typer.run(main)
