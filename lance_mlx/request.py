"""What a user asks for, validated once."""

import math
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from lance_mlx.config import MAX_LATENT_SIDE, MAX_NUM_FRAMES, SPATIAL_STRIDE, TEMPORAL_STRIDE
from lance_mlx.errors import LanceError

_VISUAL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Task(StrEnum):
    """Tasks of upstream's launcher that this version runs."""

    T2I = "t2i"
    T2V = "t2v"

    @property
    def makes_video(self) -> bool:
        """Whether the output has a frame axis that the user chooses."""
        return self is Task.T2V

    @property
    def variant(self) -> str:
        """Folder of the official checkpoint for this task."""
        return "Lance_3B_Video" if self.makes_video else "Lance_3B"


class Entry(StrEnum):
    """Which of upstream's two sampling functions is followed.

    They differ by more than rounding where text is dropped before a kept split: `kv_cache` feeds the unconditional
    prefix the conditional position ids, `full_sequence` recomputes them.
    """

    KV_CACHE = "kv_cache"
    FULL_SEQUENCE = "full_sequence"


class Renorm(StrEnum):
    """How the guided velocity is scaled back to the length of the conditional one."""

    GLOBAL = "global"
    CHANNEL = "channel"
    NONE = "none"


@dataclass(frozen=True)
class Request:
    """One text to image or text to video request, with upstream's launcher defaults.

    Attributes:
        height, width: pixels, multiples of 16.
        num_frames: frames asked for; images have one. The decoder returns `4 * latent_frames - 3` of them.
        num_steps: denoising steps.
        timestep_shift: the larger, the longer the sampler stays near noise.
        guidance_scale: 1 or less runs the conditional arm alone.
        guidance_interval: guidance acts while lo < t <= hi, t in [0, 1] with 1 = noise.
        guidance_renorm_min: least factor that the renorm applies.
        text_template: wrap the prompt in the template that the model was trained with.
        seed: seeds MLX's generator; it never matches PyTorch's.
        fps: frames per second written into the video.

    Raises:
        LanceError: a value that upstream could not run, naming it.
    """

    task: Task
    prompt: str
    height: int = 768
    width: int = 768
    num_frames: int = 1
    num_steps: int = 30
    timestep_shift: float = 3.5
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.4, 1.0)
    guidance_renorm: Renorm = Renorm.GLOBAL
    guidance_renorm_min: float = 0.0
    text_template: bool = True
    entry: Entry = Entry.KV_CACHE
    seed: int = 42
    fps: int = 12

    def __post_init__(self) -> None:
        for token in _VISUAL_TOKENS:
            if token in self.prompt:
                raise LanceError(f"the prompt contains the control token {token}, which stands for pixels: remove it")
        for name, side in (("height", self.height), ("width", self.width)):
            largest = MAX_LATENT_SIDE * SPATIAL_STRIDE
            if not SPATIAL_STRIDE <= side <= largest or side % SPATIAL_STRIDE:
                nearest = min(max(round(side / SPATIAL_STRIDE), 1), MAX_LATENT_SIDE) * SPATIAL_STRIDE
                raise LanceError(f"{name} {side} must be a multiple of {SPATIAL_STRIDE} up to {largest}: try {nearest}")
        if not 1 <= self.num_frames <= MAX_NUM_FRAMES:
            raise LanceError(f"num_frames {self.num_frames} must be between 1 and {MAX_NUM_FRAMES}")
        if not self.task.makes_video and self.num_frames != 1:
            raise LanceError(f"task {self.task} makes one frame, not {self.num_frames}: use t2v for a video")
        if self.num_steps < 1:
            raise LanceError(f"num_steps {self.num_steps} must be at least 1")
        if self.fps < 1:
            raise LanceError(f"fps {self.fps} must be at least 1")
        for name in ("timestep_shift", "guidance_scale", "guidance_renorm_min"):
            if not math.isfinite(getattr(self, name)):
                raise LanceError(f"{name} must be a finite number")
        if self.timestep_shift <= 0:
            raise LanceError(f"timestep_shift {self.timestep_shift} must be greater than 0")
        if not 0 <= self.guidance_renorm_min <= 1:
            raise LanceError(f"guidance_renorm_min {self.guidance_renorm_min} must be between 0 and 1")
        low, high = self.guidance_interval
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LanceError("guidance_interval must be two finite numbers")
        if not 0 <= self.seed < 2**64:
            raise LanceError(f"seed {self.seed} must be between 0 and 2**64 - 1")

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the target."""
        frames = (self.num_frames - 1) // TEMPORAL_STRIDE + 1
        return frames, self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Request":
        """Build from the field names; raises LanceError for an unknown task, an unknown key or a bad value."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise LanceError(f"unknown request key '{unknown[0]}'")
        values = dict(values)
        for name, kind in (("task", Task), ("guidance_renorm", Renorm), ("entry", Entry)):
            if name in values:
                values[name] = _member(kind, name, values[name])
        if "guidance_interval" in values:
            values["guidance_interval"] = tuple(values["guidance_interval"])
        return cls(**values)


def _member(kind: type[StrEnum], name: str, value: Any) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise LanceError(f"{name} '{value}' is not supported: choose one of {', '.join(kind)}") from None
