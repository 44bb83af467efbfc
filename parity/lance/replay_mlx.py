"""Replaying a bundle's request on lance_mlx, and laying out requests with it."""

import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

import lance_mlx.requests.visuals
from lance_mlx.backend.numerics import policy
from lance_mlx.checkpoint.layouts import variants_in
from lance_mlx.errors import LanceError
from lance_mlx.media import write as media
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.pipeline import Pipeline, Prepared, load
from lance_mlx.requests.request import Entry, Question, Request, Task, Visual
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.schedule import timesteps
from lance_mlx.sequence.positions import latent_position_ids, position_ids, rope_index, unconditional_position_ids
from lance_mlx.sequence.prompt import answer_start, build_question, build_sequence
from lance_mlx.sequence.segments import AttentionMode, Sequence
from lance_mlx.sequence.tokenizer import LanceTokenizer
from parity.lance.arrays_mlx import channels_first
from parity.lance.boundaries_mlx import MlxBoundaries
from parity.lance.capture_mlx import MlxCapture
from parity.ports.mending import Mending
from parity.tensors.recording import ExactInputs, Observed, Replay, Tap

_REQUEST_KEYS = {
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "num_steps": "num_steps",
    "timestep_shift": "timestep_shift",
    "text_template": "text_template",
    "cfg_text_scale": "guidance_scale",
    "cfg_interval": "guidance_interval",
    "cfg_renorm_min": "guidance_renorm_min",
    "vae_resolution": "vae_resolution",
    "vit_resolution": "vit_resolution",
}
"""Names of the bundles' requests, which are upstream's, and what lance_mlx calls them."""
_TASKS = {"idip": "subject", "image_idip": "subject", "video_idip": "subject"}
_IMAGE_TASKS = ("t2i", "image_edit", "image_idip")
_LAYOUT_TOKENS = 16
"""Answer tokens whose positions a layout of a question holds when its request names no number."""


def request_from_bundle(request: dict, entry: str, media: Path | None = None) -> Request | Question:
    """The lance_mlx request that a bundle's request stands for; raises LanceError for one it cannot run.

    `media` is the folder that the paths of visuals start from.
    """
    name = _TASKS.get(request["task"], request["task"])
    if name not in list(Task):
        raise LanceError(f"task '{request['task']}' is not supported")
    task = Task(name)
    texts, visuals = _elements(request["spec"], media)
    if task.answers and not request.get("text_template", True):
        raise LanceError("a question is always put into the template: text_template false is not supported")
    if request.get("resolution") in RESOLUTIONS:
        named = dict(zip(("vae_resolution", "vit_resolution"), RESOLUTIONS[request["resolution"]], strict=True))
        request = named | request
    if task.answers:
        instruction, question, answer = texts[0]
        given = {"instruction": instruction, "question": question, "answer": answer}
        given |= {key: request[key] for key in ("vit_resolution", "max_new_tokens") if key in request}
        return Question.from_dict({"task": task, "entry": entry, "visuals": visuals, "as_upstream": True, **given})
    values = {ours: request[theirs] for theirs, ours in _REQUEST_KEYS.items() if theirs in request}
    if "cfg_renorm_type" in request:
        kind = request["cfg_renorm_type"]
        values["guidance_renorm"] = "none" if kind is None or kind.lower() in ("", "none", "null") else kind
    if request["task"] in _IMAGE_TASKS:
        values["num_frames"] = 1
    if visuals:
        values["vision_type"] = request["spec"]["element_dtype_array"][-1]
        values["as_upstream"] = True
    return Request.from_dict(values | {"task": task, "prompt": texts[0], "entry": entry, "visuals": visuals})


def _elements(spec: str | dict, media: Path | None) -> tuple[list, list[Visual]]:
    """The texts and the visuals of a request: a prompt, or upstream's interleaved array."""
    if isinstance(spec, str):
        return [spec], []
    texts, visuals = [], []
    kinds = spec["element_dtype_array"]
    if "text" in kinds[1:-1]:
        raise LanceError("the text of a request must come before or after all its images and videos")
    for element, kind in zip(spec["interleave_array"], kinds, strict=True):
        if kind == "text":
            texts.append(element)
        else:
            visuals.append(Visual(str(media / element if media else element), kind))
    return texts, visuals


def load_for(request: Request | Question, folder: Path, numerics: str) -> Pipeline:
    """Load what a request needs of the variant in a folder, whichever that is, under the policy of that name, for
    questions as they are answered; raises LanceError."""
    pipeline = load(folder, variants_in(folder)[0], policy(numerics), request.task.takes is not None)
    if isinstance(request, Question):
        pipeline.join_projections()
    return pipeline


def replay_pipeline(
    pipeline: Pipeline,
    request: Request | Question,
    replay: Replay,
    names: Container[str] | None = None,
    progress: Callable[[str], None] | None = None,
    force: Mapping[str, Tap] | None = None,
    exact: ExactInputs | None = None,
) -> Observed:
    """Replay a request on a loaded pipeline, and with `force` and `exact` every part of it from the given values."""
    tell = progress or (lambda call: None)
    with MlxCapture(pipeline, names, force) as capture, MlxBoundaries(capture, exact) as boundaries:
        if isinstance(force, Mending):
            force.recorded = lambda: Observed(capture.recording, {}, {})
        if isinstance(request, Question):
            _record_answer(capture, pipeline, request, replay, tell)
        else:
            _record_generation(capture, boundaries, pipeline, request, replay, tell)
        recording = capture.recording
    if "tokens" in boundaries.computed and force and "tokens" in force:
        recording["tokens"] = boundaries.computed.pop("tokens")
    return Observed(recording, boundaries.computed, boundaries.failures)


def _record_answer(
    capture: MlxCapture, pipeline: Pipeline, question: Question, replay: Replay, tell: Callable[[str], None]
) -> None:
    visuals = visuals_of(replay, question)
    for name, array in _question_layout(question, pipeline.tokenizer, visuals).items():
        capture.keep(name, array)
    tell("vit_model")
    prepared = pipeline.prepare_question(question, visuals)
    tokens = []
    for token in pipeline.answer(prepared):
        tell(f"decode{len(tokens)}")
        tokens.append(token)
    capture.keep("tokens", np.array(tokens, np.int32))


def _record_generation(
    capture: MlxCapture,
    boundaries: MlxBoundaries,
    pipeline: Pipeline,
    request: Request,
    replay: Replay,
    tell: Callable[[str], None],
) -> None:
    visuals = visuals_of(replay, request)
    clean = []
    # Upstream encodes the target's placeholder as well, which nothing then uses.
    for index, pixels in enumerate(replay.vae_pixels):
        tell(f"vae.encode{index}")
        eps = mx.array(replay.eps[index][0].transpose(1, 2, 3, 0))
        clean.append(pipeline.vae.encode(pixels.transpose(1, 2, 3, 0)).sample(eps))
        capture.keep(f"vae.encode{index}.eps", channels_first(eps))
    prepared = pipeline.prepare_encoded(request, visuals, clean[: len(visuals)])
    request = prepared.request
    layout = _layout(request, prepared.sequence, visuals, pipeline.model.config.tokens_per_second)
    for name, array in layout.items():
        capture.keep(name, array)
    # The oracles' states hold every latent of the sequence; clean blocks come before the one that is denoised.
    boundaries.before = list(prepared.conditions.clean) if request.task is not Task.I2V else []
    boundaries.num_steps = request.num_steps
    boundaries.whole_sequence = request.entry is Entry.FULL_SEQUENCE
    _record_steps(capture, boundaries, pipeline, prepared, mx.array(np.asarray(replay.noise, np.float32)), tell)


def _record_steps(
    capture: MlxCapture,
    boundaries: MlxBoundaries,
    pipeline: Pipeline,
    prepared: Prepared,
    noise: mx.array,
    tell: Callable[[str], None],
) -> None:
    request, dtype = prepared.request, pipeline.model.numerics.dtype
    noise = noise.astype(dtype)
    given = sum(map(len, boundaries.before))
    capture.keep("sampler.noise", noise)
    tell("prefix")
    for step in pipeline.denoise(prepared, noise[given:]):
        index = step.state.index
        tell(f"step{index}")
        capture.keep(f"sampler.x_t{index}", boundaries.whole(step.state.x_t))
        capture.keep(f"sampler.timestep{index}", np.concatenate([np.zeros(given, np.float32), step.state.timestep]))
        capture.keep(f"sampler.velocity{index}", step.velocity)
    latent = capture.observe("latent", step.x_next.reshape(*request.latent_grid, -1))
    frames = []
    for pixels in pipeline.decode(request, latent):
        tell(f"chunk{len(frames)}")
        frames.append(pixels)
    pixels = capture.observe("pixels", mx.concatenate(frames).transpose(3, 0, 1, 2))
    capture.keep("frames", media.to_uint8(np.array(pixels)).astype(np.int32))


def visuals_of(replay: Replay, request: Request | Question) -> list[PreparedVisual]:
    """What a bundle's inputs hold of each visual of its request."""
    visuals = []
    for index in range(len(request.visuals)):
        looked_at = index < len(replay.vit_patches)
        encoded = index < len(replay.vae_pixels)
        visuals.append(
            PreparedVisual(
                vit_patches=replay.vit_patches[index] if looked_at else None,
                vit_grid=replay.vit_grids[index] if looked_at else None,
                pixels=replay.vae_pixels[index].transpose(1, 2, 3, 0) if encoded else None,
            )
        )
    return visuals


def preprocess_mlx(request: dict, entry: str, media: Path) -> dict[str, np.ndarray] | None:
    """The visuals of a bundle's request as lance_mlx prepares them, by the names of the bundles' inputs.

    None where there are none or their files are not below `media`. Raises LanceError for a file that cannot be read.
    """
    asked = request_from_bundle(request, entry, media)
    if not asked.visuals or not all(os.path.isfile(visual.path) for visual in asked.visuals):
        return None
    arrays: dict[str, np.ndarray] = {}
    for index, visual in enumerate(lance_mlx.requests.visuals.prepare_visuals(asked)):
        if visual.pixels is not None:
            arrays[f"vae_pixels{index}"] = visual.pixels.transpose(3, 0, 1, 2)
        if visual.vit_patches is not None:
            arrays[f"vit_patches{index}"] = visual.vit_patches
    return arrays


def layout_mlx(request: dict, tokenizer_dir: Path, media: Path | None = None) -> dict[str, np.ndarray]:
    """Lay out a request with the tokenizer in a folder: int32 arrays and the float32 `timesteps` of the layouts."""
    asked = request_from_bundle(request, Entry.FULL_SEQUENCE, media)
    tokenizer = LanceTokenizer(tokenizer_dir)
    visuals = prepare_visuals(asked)
    if isinstance(asked, Question):
        return _question_layout(asked, tokenizer, visuals, request.get("max_new_tokens", _LAYOUT_TOKENS))
    asked = sized_by_source(asked, visuals)
    arrays = _layout(asked, build_sequence(asked, tokenizer, visuals), visuals, tokens_per_second=2)
    if visuals:
        # The target is encoded like a visual, and i2v's picture is its first frame.
        encoded = [] if asked.task is Task.I2V else [visual.pixels.shape for visual in visuals]
        sizes = [*encoded, (asked.num_frames, asked.height, asked.width, 3)]
        arrays["vae_pixel_shapes"] = np.array([(c, t, h, w) for t, h, w, c in sizes], np.int32)
    return arrays | {"timesteps": timesteps(asked.num_steps, asked.timestep_shift)}


def _layout(
    request: Request, sequence: Sequence, visuals: list[PreparedVisual], tokens_per_second: int
) -> dict[str, np.ndarray]:
    """The integers of a sequence under the names of the oracles' inputs and layouts, int32."""
    blocks = [segment for segment in sequence.segments if segment.grid is not None]
    # Upstream gives rows and columns doubled, because the function that reads them halves them.
    grids = [(t, 2 * h, 2 * w) for t, h, w in (block.grid for block in blocks)]
    latent_grids = [grid for grid, block in zip(grids, blocks, strict=True) if block.is_latent]
    shapes = [] if request.task is Task.I2V else [visual.pixels.shape[:3] for visual in visuals]
    arrays = {
        "text_ids": sequence.ids,
        "modality": sequence.roles,
        "split_lens": [len(segment) for segment in sequence.segments],
        "attn_modes": [segment.mode for segment in sequence.segments],
        "packed_vae_token_indexes": sequence.inner_indexes(AttentionMode.FULL_NOISE, AttentionMode.NOISE),
        "mse_loss_indexes": sequence.denoised_indexes(),
        "video_grid_thw": [grids],
        "vae_video_grid_thw": latent_grids,
        "video_sizes": [*shapes, (request.num_frames, request.height, request.width)],
        "position_ids.cond": position_ids(sequence, tokens_per_second),
        "position_ids.uncond": unconditional_position_ids(sequence, tokens_per_second, Entry.FULL_SEQUENCE),
        "latent_position_ids": np.concatenate([latent_position_ids((t, h // 2, w // 2)) for t, h, w in latent_grids]),
    }
    arrays |= _vit_layout(sequence, visuals)
    return {name: np.asarray(array, np.int32) for name, array in arrays.items()}


def _question_layout(
    question: Question, tokenizer: LanceTokenizer, visuals: list[PreparedVisual], tokens: int = _LAYOUT_TOKENS
) -> dict[str, np.ndarray]:
    """The integers of a question under the names of the oracles' inputs and layouts, int32."""
    sequence = build_question(question, tokenizer, visuals)
    start = answer_start(question, tokenizer, sequence)
    positions = rope_index(sequence, tokens_per_second=2)[:, :start]
    following = positions[:, -1:] + 1 + np.arange(tokens)
    arrays = {
        "text_ids": sequence.ids,
        "modality": sequence.roles,
        "split_lens": [len(segment) for segment in sequence.segments],
        "attn_modes": [segment.mode for segment in sequence.segments],
        "video_grid_thw": [[visual.vit_grid for visual in visuals]],
        "ce_loss_indexes": np.arange(start - 1, len(sequence.ids) - 1),
        "position_ids.cond": np.concatenate([positions, following], axis=1),
        "context_len": [start - 1],
    }
    arrays |= _vit_layout(sequence, visuals)
    return {name: np.asarray(array, np.int32) for name, array in arrays.items()}


def _vit_layout(sequence: Sequence, visuals: list[PreparedVisual]) -> dict[str, np.ndarray | list]:
    seen = [visual for visual in visuals if visual.vit_patches is not None]
    if not seen:
        return {}
    return {
        "packed_vit_token_indexes": sequence.inner_indexes(AttentionMode.FULL),
        "vit_video_grid_thw": [visual.vit_grid for visual in seen],
        "vit_patch_shapes": [visual.vit_patches.shape for visual in seen],
    }
