"""Faults of the sequence, of preprocessing, and of what is supported at all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from PIL import Image

from lance_mlx.errors import LanceError
from lance_mlx.media import preprocess
from lance_mlx.model.lance import Lance
from lance_mlx.requests.request import Request, Task
from lance_mlx.sampling import flow
from lance_mlx.sequence import positions, prompt
from lance_mlx.sequence.segments import AttentionMode, Role, Segment, Sequence
from lance_mlx.sequence.tokenizer import LanceTokenizer
from parity.bundle.reading import Bundle
from parity.lance.faults.base import (
    ALL,
    DRAWS,
    EDITS,
    IMAGES,
    LOOKS,
    VIDEOS,
    Fault,
    Need,
    Patch,
    Target,
    function,
    items,
    replaced,
    together,
    wrapped,
)
from parity.lance.faults.vision import grids_of


def _strings(table: str, change: Callable[[Mapping[str, str]], dict[str, str]]) -> Patch:
    """Change strings of the prompt data; `change` returns those that are different."""

    def patch(target: Target) -> AbstractContextManager[object]:
        strings = prompt.PROMPT_DATA[table]
        return items(strings, change(strings))

    return patch


def _ascii(instructions: Mapping[str, str]) -> dict[str, str]:
    return {task: text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") for task, text in instructions.items()}


def _instruction_of(other: str, tasks: frozenset[str]) -> Patch:
    return _strings("instructions", lambda instructions: dict.fromkeys(tasks, instructions[other]))


def _without_breaks(template: Mapping[str, str]) -> dict[str, str]:
    return {part: text.replace("\n", "") for part, text in template.items()}


def _blocks(change: Callable[[np.ndarray, LanceTokenizer], None]) -> Patch:
    """Change the token ids of every visual block in place."""

    def visual_block(original: Callable, role: Role, mode: AttentionMode, grid: tuple, *rest: object) -> Segment:
        segment = original(role, mode, grid, *rest)
        change(segment.ids, rest[0])
        return segment

    return function(prompt, "_visual_block", visual_block)


def _image_pads(ids: np.ndarray, tokenizer: LanceTokenizer) -> None:
    ids[1:-1] = tokenizer.token_id("<|image_pad|>")


def _no_closing(ids: np.ndarray, tokenizer: LanceTokenizer) -> None:
    ids[-1] = tokenizer.token_id("<|video_pad|>")


def _without_template(original: Callable, request: Request, *rest: object) -> Sequence:
    if request.task.takes:
        return original(request, *rest)
    return original(replace(request, text_template=False), *rest)


def _segments(change: Callable[[tuple[Segment, ...]], tuple[Segment, ...]]) -> Patch:
    """Change the segments of a request that is drawn."""

    def build(original: Callable, *args: object) -> Sequence:
        return Sequence(tuple(change(original(*args).segments)))

    return function(prompt, "build_sequence", build)


def _without_vit(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    return tuple(segment for segment in segments if segment.role is not Role.VIT)


def _without_source(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    return tuple(segment for segment in segments if segment.role is not Role.SOURCE)


def _text_first(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    first, *others = segments
    return (first, *sorted(others, key=lambda segment: segment.role is not Role.TEXT))


def _open_ended(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Without what closes the template behind the target."""
    return segments[:-1] if segments[-1].grid is None else segments


def _source_first(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    ordered = list(segments)
    for index, segment in enumerate(segments[:-1]):
        if segment.role is Role.VIT and segments[index + 1].role is Role.SOURCE:
            ordered[index : index + 2] = segments[index + 1], segment
    return tuple(ordered)


def _as_template(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    return tuple(replace(segment, role=Role.TEMPLATE) if segment.role is Role.TEXT else segment for segment in segments)


@contextmanager
def _empty_prompt(target: Target) -> Iterator[None]:
    """Steer away from a prompt of no words without template; visual blocks stay."""
    ids = [target.tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>")]
    empty = Segment(Role.TEMPLATE, AttentionMode.CAUSAL, np.array(ids, np.int32))

    def unconditional(original: Callable, sequence: Sequence) -> Sequence:
        return Sequence((empty, *(segment for segment in sequence.segments if segment.grid is not None)))

    def arm(
        original: Callable, self: flow.Arm, name: str, model: Lance, sequence: Sequence, ids: np.ndarray, *rest: object
    ) -> None:
        # The ids were made for the right sequence; where that is used after all they fit.
        if name == "uncond" and ids.shape[1] != len(sequence.ids):
            ids = positions.position_ids(sequence, model.config.tokens_per_second)
        original(self, name, model, sequence, ids, *rest)

    with ExitStack() as stack:
        stack.enter_context(wrapped(flow, "unconditional", unconditional))
        stack.enter_context(wrapped(flow.Arm, "__init__", arm))
        yield


def _no_i2v(original: Callable, request: Request, *rest: object) -> Sequence:
    if request.task is Task.I2V:
        raise LanceError(f"task {request.task} is not supported")
    return original(request, *rest)


def _square(original: Callable, height: int, width: int, resolution: int) -> tuple[int, int]:
    side = preprocess._to_stride(resolution)
    return side, side


def _whole(original: Callable, height: int, width: int, aspect: float) -> tuple[int, int, int, int]:
    return 0, 0, height, width


_BILINEAR = SimpleNamespace(fromarray=Image.fromarray, Resampling=SimpleNamespace(BICUBIC=Image.Resampling.BILINEAR))


def _fault(name: str, explanation: str, patch: Patch, tasks: frozenset[str], about: str) -> Fault:
    return Fault(name, about, "sequence", patch, tasks, explanation=explanation)


def _is_oblong(bundle: Bundle) -> bool:
    """Whether a picture became one that is higher than wide, or the other way round."""
    sides = [(h, w) for _, h, w in grids_of(bundle)]
    sides += [tap.array.shape[-2:] for name, tap in bundle.inputs.items() if name.startswith("vae_pixels")]
    return any(h != w for h, w in sides)


_OBLONG = Need("a picture that is not square", _is_oblong)


def _preprocess(
    name: str, explanation: str, patch: Patch, tasks: frozenset[str], about: str, needs: Need | None = None
) -> Fault:
    return Fault(name, about, "preprocess", patch, tasks, explanation=explanation, needs=needs)


FAULTS = [
    _fault(
        "ascii-apostrophe",
        "the instruction has an ASCII apostrophe",
        _strings("instructions", _ascii),
        EDITS,
        "The instruction has ASCII apostrophes instead of typographic ones.",
    ),
    _fault(
        "instruction-of-t2v",
        "the instruction is that of t2v",
        _instruction_of("t2v", IMAGES),
        IMAGES,
        "The instruction for an image is the one for videos.",
    ),
    _fault(
        "instruction-of-t2i",
        "the instruction is that of t2i",
        _instruction_of("t2i", VIDEOS),
        VIDEOS,
        "The instruction for a video is the one for images.",
    ),
    _fault(
        "template-missing",
        "the template is missing",
        function(prompt, "build_sequence", _without_template),
        frozenset({"t2i", "t2v"}),
        "The prompt is not put into the template.",
    ),
    _fault(
        "template-without-line-breaks",
        "the template has no line breaks",
        _strings("template", _without_breaks),
        ALL,
        "The template has no line breaks after the roles' names.",
    ),
    _fault(
        "image-pad-for-video-pad",
        "image_pad instead of video_pad",
        _blocks(_image_pads),
        ALL,
        "Visual blocks hold <|image_pad|> instead of <|video_pad|>.",
    ),
    _fault(
        "closing-bracket-missing",
        "the closing bracket is one more cell",
        _blocks(_no_closing),
        ALL,
        "Visual blocks do not end in <|vision_end|>.",
    ),
    _fault(
        "closing-im-end-missing",
        "the closing <|im_end|> is missing",
        _segments(_open_ended),
        DRAWS,
        "The sequence ends with the denoised block: nothing closes the template.",
    ),
    _fault(
        "vit-block-missing",
        "the ViT block is missing",
        _segments(_without_vit),
        EDITS,
        "The sequence holds no ViT block.",
    ),
    _fault(
        "source-block-missing",
        "the clean block is missing",
        _segments(_without_source),
        EDITS,
        "The sequence holds no block of clean latents.",
    ),
    _fault(
        "text-before-visuals",
        "the text comes before the visuals",
        _segments(_text_first),
        EDITS,
        "The user's text comes before the visual blocks.",
    ),
    _fault(
        "source-before-vit",
        "the clean block comes before the ViT block",
        _segments(_source_first),
        EDITS,
        "The block of clean latents comes before the ViT block.",
    ),
    _fault(
        "prompt-tagged-as-template",
        "the user's text has the template's role",
        _segments(_as_template),
        DRAWS,
        "The user's text has the template's role, so that the unconditional arm keeps it.",
    ),
    _fault(
        "empty-prompt-guidance",
        "the unconditional arm is an empty prompt",
        _empty_prompt,
        DRAWS,
        "Guidance steers away from an empty prompt without template.",
    ),
    _preprocess(
        "visuals-stretched",
        "pictures are stretched to a square",
        together(
            function(preprocess, "_nearest_bucket", _square),
            function(preprocess, "crop_box", _whole),
        ),
        LOOKS | {"i2v"},
        "Pictures are stretched to a square of the resolution instead of going to the bucket of nearest aspect.",
        _OBLONG,
    ),
    _preprocess(
        "visuals-resized-bilinearly",
        "pictures are resized bilinearly",
        lambda target: replaced(preprocess, "Image", _BILINEAR),
        LOOKS | {"i2v"},
        "Pictures are resized bilinearly instead of bicubically.",
    ),
    _preprocess(
        "vit-pixels-not-clip-normalised",
        "the ViT's pixels are normalised by others: the mean is 0.5 and the deviation is 0.5",
        together(
            lambda target: replaced(preprocess, "_VIT_MEAN", (0.5, 0.5, 0.5)),
            lambda target: replaced(preprocess, "_VIT_STD", (0.5, 0.5, 0.5)),
        ),
        LOOKS,
        "The ViT's pixels are normalised to [-1, 1] instead of by CLIP's mean and deviation.",
    ),
    Fault(
        "i2v-missing",
        "Image to video is refused.",
        "request",
        function(prompt, "build_sequence", _no_i2v),
        frozenset({"i2v"}),
    ),
]
