"""What clients send: OpenAI's parameters, and this model's own under the names of `Request` and `Question`."""

import json
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lance_mlx.errors import LanceError
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.files import caption_instruction
from lance_mlx.requests.request import Question, Request, Task, Visual
from lance_mlx.serve.bounds import BOUNDS
from lance_mlx.serve.errors import ApiError

MODEL = "lance"
FRAMES_A_SECOND = 12
Text = Annotated[str, Field(max_length=BOUNDS.prompt)]
Parsed = TypeVar("Parsed", bound="Body")
# Sent by clients for OpenAI's own service, and of no consequence here.
_INERT = set(
    "background metadata moderation output_compression quality safety_identifier service_tier store user".split()
)
# OpenAI's own that would have a consequence, at the values at which they have none.
_NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "stop": [],
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "style": "vivid",
    "input_fidelity": "low",
}


class Body(BaseModel):
    """Parameters of one request; one that is not known is refused, as is OpenAI's own where it would do something."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {
                name: value
                for name, value in values.items()
                if not (name in _INERT or value is None or (name in _NEUTRAL and value == _NEUTRAL[name]))
            }
        return values

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.model not in (None, MODEL):
            raise ApiError(404, f"there is no model '{self.model}' here: use '{MODEL}'", "model_not_found", "model")
        return self

    @property
    def chosen_seed(self) -> int:
        """The seed that was given, or a new one."""
        if self.seed is None:
            self.seed = secrets.randbelow(2**32)
        return self.seed


class Drawing(Body):
    """What images and videos have in common."""

    prompt: Text
    negative_prompt: Text | None = None
    size: str | None = None
    resolution: Literal[tuple(RESOLUTIONS)] | None = None
    num_steps: Annotated[int, Field(ge=1, le=BOUNDS.steps)] = 30
    guidance_scale: float = 4.0
    timestep_shift: float = 3.5

    def request(self, task: Task, visuals: tuple[Visual, ...], default: tuple[int, int], **values: Any) -> Request:
        """The request for one output.

        Args:
            default: width and height where no size is given.
            values: further fields of the request.

        Raises:
            ApiError: a value does not fit the task.
        """
        given = self.size not in (None, "auto")
        if given and task.size_from_source:
            raise ApiError(400, f"task {task} takes its size from the source: leave out size", param="size")
        width, height = _size(self.size) if given else default
        vae_resolution, vit_resolution = RESOLUTIONS[self.resolution] if self.resolution else (None, None)
        with_defaults = {"seed": self.chosen_seed, **values}
        try:
            return Request(
                task=task,
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                width=width,
                height=height,
                num_steps=self.num_steps,
                guidance_scale=self.guidance_scale,
                timestep_shift=self.timestep_shift,
                visuals=visuals,
                vae_resolution=vae_resolution,
                vit_resolution=vit_resolution,
                **with_defaults,
            )
        except LanceError as error:
            raise ApiError(400, str(error)) from None


class ImageBody(Drawing):
    """POST /v1/images/generations, and with images /v1/images/edits."""

    n: Annotated[int, Field(ge=1, le=BOUNDS.images)] = 1
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"

    def requests(self, task: Task, visuals: tuple[Visual, ...] = ()) -> tuple[Request, ...]:
        """One request for each image, whose seeds follow each other; raises ApiError as `request`."""
        seed = self.chosen_seed
        return tuple(self.request(task, visuals, (768, 768), seed=(seed + k) % 2**64) for k in range(self.n))


class EditBody(ImageBody):
    """The fields of /v1/images/edits; `subject` draws anew what the images show."""

    task: Literal[Task.IMAGE_EDIT, Task.SUBJECT] = Task.IMAGE_EDIT


class VideoBody(Drawing):
    """POST /v1/videos and /v1/videos/edits."""

    seconds: Annotated[int, Field(ge=1, le=10)] = 4
    num_frames: Annotated[int, Field(ge=5, le=121)] | None = None
    fps: Annotated[int, Field(ge=1, le=60)] = FRAMES_A_SECOND

    @property
    def frames(self) -> int:
        """Frames to ask for."""
        return self.num_frames or min(FRAMES_A_SECOND * self.seconds + 1, 121)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=200)]
    max_tokens: Annotated[int, Field(ge=1, le=BOUNDS.tokens)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=BOUNDS.tokens)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Literal[1] = 1
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    resolution: Literal[tuple(RESOLUTIONS)] | None = None

    def question(self, task: Task, text: str, instruction: str | None, visuals: tuple[Visual, ...]) -> Question:
        """The question; one without words asks for a description. Raises ApiError for a value that does not fit."""
        if instruction is None and not text:
            instruction = caption_instruction(task)
        try:
            return Question(
                task=task,
                question=text,
                visuals=visuals,
                instruction=instruction,
                vit_resolution=RESOLUTIONS[self.resolution][1] if self.resolution else None,
                max_new_tokens=self.max_completion_tokens or self.max_tokens or 256,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.chosen_seed,
            )
        except LanceError as error:
            raise ApiError(400, str(error)) from None


def parse(kind: type[Parsed], values: Any) -> Parsed:
    """Check what a client sent; raises ApiError naming the first parameter that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden" and name in _NEUTRAL:
            only = json.dumps(_NEUTRAL[name])
            raise ApiError(400, f"{name} can only be {only} here: leave it out", "invalid_value", name) from None
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown parameter '{name[:60]}'", "unknown_parameter", name[:60]) from None
        raise ApiError(400, f"{name}: {first['msg']}".lstrip(": "), "invalid_value", name or None) from None


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match:
        raise ApiError(400, "size must be WIDTHxHEIGHT in pixels, such as 768x768", "invalid_value", "size")
    return int(match[1]), int(match[2])
