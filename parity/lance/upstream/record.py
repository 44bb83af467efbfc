"""Records what a clone of bytedance/Lance computes for a request, as the bundles in oracles/ were."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.bundle.reading import ENTRIES, Bundle
from parity.errors import ParityError, one_line
from parity.lance.publish import checkpoint_name, place_media, publish, staging_beside, with_media
from parity.lance.record import NUMERICS, variant_for
from parity.lance.sequence_layouts import FORMAT as LAYOUT_FORMAT
from parity.lance.sequence_layouts import TOKENIZER_FILES, read_layout
from parity.lance.upstream.clone import check_clone
from parity.lance.upstream.process import Run, default_python, run_worker
from parity.tensors.recording import read_tensors, write_tensors
from parity.tensors.sketch_file import SKETCH, WHOLE, check_level, read_sketches
from reference.model import VIT_FOLDER
from reference.request import Request

IMPLEMENTATION = "bytedance/Lance"
"""What a manifest names as its source."""
VAE = "Wan2.2_VAE.pth"
# Sizes of Qwen2.5-VL's vision tower that no width changes, and ids of its tokens, where no llm_config.json gives them.
QWEN = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 128000,
    "hidden_act": "silu",
    "vision_config": {
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0],
        "hidden_act": "silu",
    },
}


@dataclass(frozen=True)
class Clone:
    """A checked clone of bytedance/Lance and the Python that runs it.

    `commit` is None where it is not known; `warning` says in a line what is doubtful about the clone.
    """

    path: Path
    python: Path = field(default_factory=default_python)
    commit: str | None = None
    warning: str | None = None

    @classmethod
    def at(cls, path: Path, python: Path | None = None) -> "Clone":
        """Check a clone; raises ParityError for a folder that is none."""
        return cls(path.resolve(), python or default_python(), *check_clone(path))


def record_upstream(
    out: Path,
    clone: Clone,
    checkpoint: Path,
    request: dict[str, Any],
    entry: str = "kv_cache",
    dtype: str = "bfloat16",
    copy_checkpoint: bool = False,
    given: Bundle | None = None,
    progress: Callable[[str], None] | None = None,
    level: str = WHOLE,
    whole: Sequence[str] = (),
) -> Run:
    """Run a request on a clone and write the bundle `out`, whole or not at all; see parity.lance.record.record.

    `given` is a bundle whose noise and preprocessed visuals are used in place of the run's own. Else upstream's
    launcher draws: the noise from the request's seed on the device that it runs on, the rest from its global seed.

    Raises ParityError for what cannot be recorded, in a line that says why.
    """
    for what, value, allowed in (("numerics", dtype, NUMERICS), ("entry", entry, ENTRIES)):
        if value not in allowed:
            raise ParityError(f"{what} {value!r} is not one of {', '.join(allowed)}")
    check_level(level, whole)
    checkpoint = Path(checkpoint)
    name = checkpoint_name(out, checkpoint)
    asked, variant = _checked(request, entry)
    for part in (f"{variant}/llm_config.json", f"{VIT_FOLDER}/vit.safetensors", f"{VIT_FOLDER}/config.json", VAE):
        if not (checkpoint / part).is_file():
            raise ParityError(f"checkpoint {checkpoint} lacks {part}, which upstream reads: put it there")
    with staging_beside(out) as staging:
        folder = staging / "run"
        folder.mkdir()
        job = _job(clone, request, folder) | {
            "checkpoint": str(checkpoint.resolve()),
            "variant": variant,
            "entry": entry,
            "dtype": dtype,
            "weights": True,
            "given": None,
            "level": level,
            "whole": list(whole),
        }
        if given is not None:
            job["given"] = str(folder / "given.safetensors")
            write_tensors(folder / "given.safetensors", _given(given))
        run = run_worker(clone.python, job, folder, progress)
        inputs, taps = (read_tensors(folder / f"{kind}.safetensors") for kind in ("inputs", "taps"))
        sketches = None
        if level == SKETCH:
            listed = json.loads((folder / "sketches.json").read_text(encoding="utf-8"))
            sketches = read_sketches(folder, {"level": level, "taps": listed})
        manifest = {
            "source": _source(clone) | {"entry": entry, "device": run.device, "dtype": dtype}
            | {"torch": run.versions.pop("torch"), "packages": run.versions, "stood_in": run.stood_in},
            "checkpoint": name,
            "variant": variant,
            "request": with_media(request, asked, out.parent, staging),
        }  # fmt: skip
        publish(out, staging, checkpoint, manifest, inputs, taps, copy_checkpoint, sketches)
    return run


def record_upstream_layout(
    out: Path,
    clone: Clone,
    tokenizer: Path,
    request: dict[str, Any],
    progress: Callable[[str], None] | None = None,
) -> Run:
    """Lay out a request with a clone, without weights, and write `out`.npz and `out`.json; see sequence_layouts.

    `tokenizer` is a folder of the tokenizer's files, or a checkpoint that holds one. Images and videos are copied into
    media/ beside the folder of `out` unless they lie below it. Raises ParityError for what cannot be laid out.
    """
    asked, variant = _checked(request, "kv_cache")
    place = next((p for p in (tokenizer, tokenizer / variant) if (p / TOKENIZER_FILES[0]).is_file()), None)
    if place is None:
        raise ParityError(f"no tokenizer ({', '.join(TOKENIZER_FILES)}) in {tokenizer} or in {variant} there")
    finals = [out.with_name(out.name + ending) for ending in (".npz", ".json")]
    for path in finals:
        if os.path.lexists(path):
            raise ParityError(f"{path} exists already: remove it, or record under another name")
    root = out.parent.resolve().parent
    with staging_beside(out) as staging:
        folder = staging / "run"
        folder.mkdir()
        config = place / "llm_config.json"
        if not config.is_file():
            config = folder / "llm_config.json"
            config.write_text(json.dumps(QWEN), encoding="utf-8")
        job = _job(clone, request, folder) | {
            "checkpoint": str(tokenizer.resolve()),
            "tokenizer": str(place.resolve()),
            "llm_config": str(config.resolve()),
            "entry": "kv_cache",
            "dtype": "float32",
            "weights": False,
        }
        run = run_worker(clone.python, job, folder, progress)
        document = {"format": LAYOUT_FORMAT, "name": out.name, "source": _source(clone)}
        document["request"] = with_media(request, asked, root, staging)
        (folder / "layout.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        read_layout(folder / "layout.npz")
        place_media(root, staging)
        for path in finals:
            os.rename(folder / f"layout{path.suffix}", path)
    return run


def request_of(bundle: Bundle) -> dict[str, Any]:
    """Return a bundle's request with the paths of its images and videos as they are from here."""
    return _with_files(bundle.request, lambda file: bundle.path.parent / file)


def _with_files(request: dict[str, Any], placed: Callable[[str], Path]) -> dict[str, Any]:
    """The request with the path of every image and video changed."""
    spec = request["spec"]
    if not isinstance(spec, dict):
        return request
    pairs = zip(spec["interleave_array"], spec["element_dtype_array"], strict=True)
    elements = [element if kind == "text" else str(placed(element)) for element, kind in pairs]
    return request | {"spec": spec | {"interleave_array": elements}}


def _checked(request: dict[str, Any], entry: str) -> tuple[Request, str]:
    """A request as the reference reads it, and the checkpoint's folder for its task."""
    with one_line("the request cannot be recorded"):
        asked, variant = Request.from_dict(request), variant_for(request, entry)
    for element in asked.visuals:
        if not Path(element.content).is_file():
            raise ParityError(f"{element.content} does not exist: name an image or a video")
    return asked, variant


def _job(clone: Clone, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    absolute = _with_files(request, lambda file: Path(file).resolve())
    return {"clone": str(clone.path), "request": absolute, "out": str(folder.resolve())}


def _given(bundle: Bundle) -> dict:
    """What a run is given of a bundle: its noise, drawn and preprocessed."""
    noise = {name: tap for name, tap in bundle.taps.items() if name == "sampler.noise" or name.endswith(".eps")}
    visuals = ("vae_pixels", "vit_patches")
    return noise | {name: tap for name, tap in bundle.inputs.items() if name.startswith(visuals)}


def _source(clone: Clone) -> dict[str, str]:
    return {"implementation": IMPLEMENTATION} | ({"commit": clone.commit} if clone.commit else {})
