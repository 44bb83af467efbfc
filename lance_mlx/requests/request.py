"""What a user asks for, validated once."""

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lance_mlx.config import MAX_LATENT_SIDE, MAX_NUM_FRAMES, SPATIAL_STRIDE, TEMPORAL_STRIDE
from lance_mlx.errors import LanceError
from lance_mlx.files import opened
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.limits import check_number, check_text
from lance_mlx.requests.plain import Plain, set_enums


class Task(StrEnum):
    """What Lance does: the tasks of upstream's launcher, and the subject-driven path of its code, `idip` there and
    here as well."""

    T2I = "t2i"
    T2V = "t2v"
    I2V = "i2v"
    IMAGE_EDIT = "image_edit"
    VIDEO_EDIT = "video_edit"
    SUBJECT = "subject"
    X2T_IMAGE = "x2t_image"
    X2T_VIDEO = "x2t_video"

    @classmethod
    def _missing_(cls, value: object) -> "Task | None":
        return cls.SUBJECT if value == "idip" else None

    @property
    def answers(self) -> bool:
        """Whether the output is text."""
        return self in (Task.X2T_IMAGE, Task.X2T_VIDEO)

    @property
    def takes(self) -> "VisualKind | None":
        """The kind of picture that the task is given, or None."""
        if self in (Task.VIDEO_EDIT, Task.X2T_VIDEO):
            return VisualKind.VIDEO
        return None if self in (Task.T2I, Task.T2V) else VisualKind.IMAGE

    @property
    def is_for_video(self) -> bool:
        """Whether the task is about moving pictures, given or made."""
        return self in (Task.T2V, Task.I2V, Task.VIDEO_EDIT, Task.X2T_VIDEO)

    @property
    def size_from_source(self) -> bool:
        """Whether the output takes its height and width from the picture that it starts from."""
        return self in (Task.I2V, Task.IMAGE_EDIT, Task.VIDEO_EDIT)


class VisualKind(StrEnum):
    """Still or moving."""

    IMAGE = "image"
    VIDEO = "video"


class Variant(StrEnum):
    """Folders of the official checkpoint: which of the two models was trained for a task."""

    IMAGE = "Lance_3B"
    VIDEO = "Lance_3B_Video"

    @classmethod
    def _missing_(cls, value: object) -> "Variant | None":
        return cls.of(VisualKind(value)) if value in list(VisualKind) else None

    @classmethod
    def of(cls, kind: VisualKind) -> "Variant":
        """The variant for images or for videos."""
        return cls.VIDEO if kind is VisualKind.VIDEO else cls.IMAGE

    @property
    def kind(self) -> VisualKind:
        """What the variant is for."""
        return VisualKind.VIDEO if self is Variant.VIDEO else VisualKind.IMAGE


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


class Scheduler(StrEnum):
    """How the sampler steps: upstream's Euler, or a solver of second order, by which a result departs from upstream."""

    EULER = "euler"
    HEUN = "heun"
    DPMPP_2M = "dpm++2m"
    UNIPC = "unipc"


@dataclass(frozen=True)
class Visual:
    """An image or video file that a request refers to."""

    path: str
    kind: VisualKind

    def __post_init__(self) -> None:
        set_enums(self)

    def digest(self) -> str | None:
        """SHA-256 of the file, by which another one of the same name is told from it; None where it cannot be read."""
        try:
            with opened(Path(self.path)) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):
            return None


@dataclass(frozen=True, repr=False)
class Request(Plain):
    """One request for an image or a video, with upstream's launcher defaults.

    Attributes:
        visuals: the picture to animate (i2v), to edit, or the subjects to draw, in order.
        height, width: pixels, multiples of 16. Editing and i2v take them from the source.
        num_frames: frames asked for; images have one. The decoder returns `4 * latent_frames - 3` of them.
        vae_resolution, vit_resolution: visuals are resized to about this many pixels squared for the VAE and the ViT;
            by default to upstream's `image_768res`, and in tasks for videos to its `video_480p`.
        vision_type: what the instruction calls the input; None for what it is. Upstream takes the kind of the last
            element of its request, which is "text" where the text comes last.
        num_steps: denoising steps.
        timestep_shift: the larger, the longer the sampler stays near noise.
        guidance_scale: 1 or less runs the conditional arm alone.
        guidance_interval: guidance acts while lo < t <= hi, t in [0, 1] with 1 = noise.
        guidance_renorm_min: least factor that the renorm applies.
        text_template: wrap the prompt in the template that the model was trained with.
        seed: seeds MLX's generator; it never matches PyTorch's.
        fps: frames per second written into the video.
        negative_prompt: what guidance steers away from in place of upstream's sequence without the user's text, a
            departure from it; its positions are its own.
        strength: share of the steps that an edit does, above 0 to 1, from the source's latents under the noise of that
            time; 1 is from noise alone, as upstream.
        as_upstream: take the stored pixels of the visuals, see `lance_mlx.media.read.read_visual`.

    Enums may be given as strings.

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
    visuals: tuple[Visual, ...] = ()
    vae_resolution: int | None = None
    vit_resolution: int | None = None
    vision_type: str | None = None
    negative_prompt: str | None = None
    scheduler: Scheduler = Scheduler.EULER
    strength: float = 1.0
    as_upstream: bool = False

    def __post_init__(self) -> None:
        set_enums(self)
        _set_resolutions(self)
        if self.task.answers:
            raise LanceError(f"task {self.task} answers a question: it draws nothing")
        check_text("prompt", self.prompt)
        check_text("negative prompt", self.negative_prompt or "")
        _check_visuals(self.task, self.visuals)
        if self.task is Task.I2V and len(self.visuals) != 1:
            raise LanceError(f"task {self.task} takes one {self.task.takes}, not {len(self.visuals)}")
        if not self.text_template and self.task.takes:
            raise LanceError(f"task {self.task} always uses the template: upstream has no sequence for it without")
        # A source may be wider than the position table: its buckets are upstream's, and so is what then happens.
        largest = 4096 if self.task.size_from_source else MAX_LATENT_SIDE * SPATIAL_STRIDE
        for name, side in (("height", self.height), ("width", self.width)):
            if not SPATIAL_STRIDE <= side <= largest or side % SPATIAL_STRIDE:
                nearest = min(max(round(side / SPATIAL_STRIDE) * SPATIAL_STRIDE, SPATIAL_STRIDE), largest)
                raise LanceError(f"{name} {side} must be a multiple of {SPATIAL_STRIDE} up to {largest}: try {nearest}")
        if not 1 <= self.num_frames <= MAX_NUM_FRAMES:
            raise LanceError(f"num_frames {self.num_frames} must be between 1 and {MAX_NUM_FRAMES}")
        if self.task is Task.I2V and self.latent_grid[0] < 2:
            raise LanceError(f"num_frames {self.num_frames} leaves nothing to animate: ask for at least 5")
        if self.task in (Task.T2I, Task.IMAGE_EDIT) and self.num_frames != 1:
            raise LanceError(f"task {self.task} makes one frame, not {self.num_frames}: use another task for a video")
        for name in ("num_steps", "fps", "vae_resolution", "vit_resolution", "seed"):
            check_number(name, getattr(self, name))
        for name in ("timestep_shift", "guidance_scale", "guidance_renorm_min"):
            if not math.isfinite(value := getattr(self, name)):
                raise LanceError(f"{name} {value} must be a finite number")
        if self.timestep_shift <= 0:
            raise LanceError(f"timestep_shift {self.timestep_shift} must be greater than 0")
        if not 0 < self.strength <= 1:
            raise LanceError(f"strength {self.strength} must be above 0 and at most 1")
        if self.strength < 1 and self.task not in (Task.IMAGE_EDIT, Task.VIDEO_EDIT):
            raise LanceError(f"strength {self.strength} starts from what is edited: task {self.task} edits nothing")
        if not 0 <= self.guidance_renorm_min <= 1:
            raise LanceError(f"guidance_renorm_min {self.guidance_renorm_min} must be between 0 and 1")
        low, high = self.guidance_interval
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LanceError(f"guidance_interval {low} {high} must be two finite numbers")
        if not (low < high and low < 1 and high > 0):
            raise LanceError(f"guidance_interval {low} {high} holds no t between 0 and 1: give LOW, then HIGH")
        if self.negative_prompt is not None and self.guidance_scale <= 1:
            raise LanceError("a negative_prompt acts through guidance: guidance_scale must be above 1")

    @property
    def makes_video(self) -> bool:
        """Whether the output has more than one frame, or comes from a task for videos."""
        return self.task.is_for_video or self.num_frames > 1

    @property
    def variant(self) -> Variant:
        """The model that was trained for this."""
        return Variant.VIDEO if self.makes_video else Variant.IMAGE

    @property
    def first_step(self) -> int:
        """The number of the step that is done first, above 0 where an edit starts from its source's latents."""
        return self.num_steps - max(round(self.num_steps * self.strength), 1)

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the target."""
        frames = (self.num_frames - 1) // TEMPORAL_STRIDE + 1
        return frames, self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE


@dataclass(frozen=True, repr=False)
class Question(Plain):
    """One question about images or a video, with upstream's launcher defaults.

    Attributes:
        question: the user's text; empty to be told what is there.
        visuals: what the question is about, in order.
        instruction: the system's part of the prompt.
        answer: an expected answer, which upstream's sequence holds and generation never sees.
        max_new_tokens: most tokens of an answer. The full-sequence entry goes on to a multiple of 128, as upstream
            does.
        temperature: 0 takes the most probable token; upstream's sampling has 1.
        top_p: sample among the most probable tokens that add up to this.
        as_upstream: take the stored pixels of the visuals, see `lance_mlx.media.read.read_visual`.

    Raises:
        LanceError: a value that upstream could not run, naming it.
    """

    task: Task
    question: str
    visuals: tuple[Visual, ...] = ()
    instruction: str | None = None
    answer: str = ""
    vit_resolution: int | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    entry: Entry = Entry.KV_CACHE
    as_upstream: bool = False

    def __post_init__(self) -> None:
        set_enums(self)
        _set_resolutions(self)
        if not self.task.answers:
            raise LanceError(f"task {self.task} draws: it answers no question")
        check_text("question", self.question)
        check_text("instruction", self.instruction or "")
        check_text("answer", self.answer)
        _check_visuals(self.task, self.visuals)
        for name in ("max_new_tokens", "vit_resolution", "seed"):
            check_number(name, getattr(self, name))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise LanceError(f"temperature {self.temperature} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise LanceError(f"top_p {self.top_p} must be above 0 and at most 1")

    @property
    def variant(self) -> Variant:
        """The model that was trained for this."""
        return Variant.VIDEO if self.task.is_for_video else Variant.IMAGE


_OF_OTHER_KIND = {
    Task.X2T_IMAGE: Task.X2T_VIDEO,
    Task.X2T_VIDEO: Task.X2T_IMAGE,
    Task.IMAGE_EDIT: Task.VIDEO_EDIT,
    Task.VIDEO_EDIT: Task.IMAGE_EDIT,
}


def _check_visuals(task: Task, visuals: tuple[Visual, ...]) -> None:
    if task.takes is None and visuals:
        raise LanceError(f"task {task} takes no image or video")
    if task.takes and not visuals:
        article = "an" if task.takes is VisualKind.IMAGE else "a"
        raise LanceError(f"task {task} needs {article} {task.takes}: name its file")
    for visual in visuals:
        if visual.kind is not task.takes:
            wanted = "an image or images, not a video" if visual.kind is VisualKind.VIDEO else "a video, not an image"
            other = f"; {_OF_OTHER_KIND[task]} takes it" if task in _OF_OTHER_KIND else ""
            raise LanceError(f"task {task} takes {wanted}: {visual.path}{other}")


def _set_resolutions(request: "Request | Question") -> None:
    name = "video_480p" if request.task.is_for_video else "image_768res"
    for field, default in zip(("vae_resolution", "vit_resolution"), RESOLUTIONS[name], strict=True):
        if getattr(request, field, 0) is None:
            object.__setattr__(request, field, default)
