"""From the options of `lance-parity record` to a request in the form of a bundle's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.prompt_data import PROMPT_DATA
from parity.errors import ParityError
from parity.lance.requests import ANSWERED, DRAWN_FROM_TEXT, SUPPORTED_TASKS, check_request
from reference.request import Request

IMAGE_TASKS = ("t2i", "image_edit", "image_idip", "x2t_image")
"""Tasks that are about still images: what they make is one frame."""
SIZED_BY_SOURCE = ("i2v", "image_edit", "video_edit")
_DRAWING = ("prompt", "width", "height", "num_frames", "steps", "guidance", "guidance_interval", "guidance_renorm",
            "timestep_shift", "text_template", "vae_resolution")  # fmt: skip
_ANSWERING = ("question", "instruction", "max_new_tokens")
_VISUAL = ("images", "videos", "resolution", "vae_resolution", "vit_resolution")


@dataclass(frozen=True)
class Options:
    """What the command line says; None is the launcher's default."""

    prompt: str | None = None
    question: str | None = None
    instruction: str | None = None
    images: Sequence[Path] = ()
    videos: Sequence[Path] = ()
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_renorm: str | None = None
    timestep_shift: float | None = None
    text_template: bool | None = None
    resolution: str | None = None
    vae_resolution: int | None = None
    vit_resolution: int | None = None
    max_new_tokens: int | None = None
    seed: int = 42

    def given(self, names: Sequence[str]) -> str | None:
        """The first of some options that the command line gives, as it is spelt there."""
        name = next((name for name in names if getattr(self, name) not in (None, ())), None)
        return name and "--" + {"images": "image", "videos": "video"}.get(name, name).replace("_", "-")


def build_request(task: str, options: Options) -> dict[str, Any]:
    """Return the request that a task and its options stand for; raises ParityError for what does not go together.

    An option that would change nothing is refused. `subject` is lance_mlx's name of `idip`.
    """
    task = "idip" if task == "subject" else task
    if task not in SUPPORTED_TASKS:
        raise ParityError(f"task {task!r} is not one of {', '.join(SUPPORTED_TASKS)}")
    refused = options.given(_ANSWERING if task not in ANSWERED else _DRAWING)
    if refused is None and task in DRAWN_FROM_TEXT:
        refused = options.given(_VISUAL)
    if refused is None and task == "i2v":
        refused = options.given(("vit_resolution",))
    if refused:
        raise ParityError(f"{refused} means nothing to {task}: leave it out")
    if task in SIZED_BY_SOURCE and (size := options.given(("width", "height"))):
        raise ParityError(f"{task} takes its size from the image or video: leave {size} out")
    if options.num_frames is not None and task in (*IMAGE_TASKS, "video_edit"):
        why = "makes one frame" if task != "video_edit" else "takes its frames from the video"
        raise ParityError(f"{task} {why}: leave --num-frames out")
    if task not in DRAWN_FROM_TEXT and not (options.images or options.videos):
        raise ParityError(f"{task} needs {'a --video' if task in ('video_edit', 'x2t_video') else 'an --image'}")
    request = _question(task, options) if task in ANSWERED else _drawing(task, options)
    check_request(request, f"record {task}", "give another")
    return request


def _question(task: str, options: Options) -> dict[str, Any]:
    if options.question is None:
        raise ParityError(f"{task} needs a --question")
    instruction = options.instruction
    if instruction is None:
        instruction = PROMPT_DATA["instructions"][task]
    limit = options.max_new_tokens
    return {
        "task": task,
        "spec": _spec([instruction, options.question, ""], options, asks=True),
        "vit_resolution": _resolutions(task, options)["vit_resolution"],
        "text_template": True,
        "max_new_tokens": Request.max_new_tokens if limit is None else limit,
        "seed": options.seed,
    }


def _drawing(task: str, options: Options) -> dict[str, Any]:
    if options.prompt is None:
        raise ParityError(f"{task} needs a --prompt")

    def chosen(option: str, field: str) -> Any:
        value = getattr(options, option)
        return getattr(Request, field) if value is None else value

    from_text = task in DRAWN_FROM_TEXT
    renorm = options.guidance_renorm
    return {
        "task": task,
        "spec": options.prompt if from_text else _spec(options.prompt, options, asks=False),
        "height": chosen("height", "height"),
        "width": chosen("width", "width"),
        "num_frames": 1 if task in IMAGE_TASKS else chosen("num_frames", "num_frames"),
        "text_template": chosen("text_template", "text_template"),
        **({} if from_text else _resolutions(task, options)),
        "num_steps": chosen("steps", "num_steps"),
        "timestep_shift": chosen("timestep_shift", "timestep_shift"),
        "cfg_text_scale": chosen("guidance", "cfg_text_scale"),
        "cfg_interval": list(chosen("guidance_interval", "cfg_interval")),
        "cfg_renorm_type": Request.cfg_renorm_type.value if renorm is None else renorm,
        "cfg_renorm_min": Request.cfg_renorm_min,
        "seed": options.seed,
    }


def _spec(text: str | list[str], options: Options, asks: bool) -> dict[str, list]:
    """Upstream's interleaved array: a prompt before its visuals, a question after them."""
    visuals = [(str(path), kind, 0) for kind in ("image", "video") for path in getattr(options, f"{kind}s")]
    texts = [(text, "text", int(asks))]
    ordered = visuals + texts if asks else texts + visuals
    names = ("interleave_array", "element_dtype_array", "istarget_in_interleave")
    return {name: list(values) for name, values in zip(names, zip(*ordered, strict=True), strict=True)}


def _resolutions(task: str, options: Options) -> dict[str, int]:
    name = options.resolution or ("image_768res" if task in IMAGE_TASKS else "video_480p")
    if name not in RESOLUTIONS:
        raise ParityError(f"resolution {name!r} is not one of {', '.join(RESOLUTIONS)}")
    pair = dict(zip(("vae_resolution", "vit_resolution"), RESOLUTIONS[name], strict=True))
    given = {key: getattr(options, key) for key in pair if getattr(options, key) is not None}
    return pair | given
