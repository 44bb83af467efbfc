"""What is asked for: task, text, visuals, size, steps and guidance."""

from dataclasses import dataclass, fields
from enum import Enum

from reference.checks import is_finite, is_integer
from reference.errors import ReferenceError

TEXT_TASKS = ("t2i", "t2v")
# The subject-driven path has no launcher task; its name is that of upstream's data code.
# Subject-driven generation; the plain name makes a video, as upstream reads it.
SUBJECT_TASKS = ("idip", "image_idip", "video_idip")
EDIT_TASKS = ("image_edit", "video_edit", *SUBJECT_TASKS)
UNDERSTANDING_TASKS = ("x2t_image", "x2t_video")
TASKS = (*TEXT_TASKS, "i2v", *EDIT_TASKS, *UNDERSTANDING_TASKS)
# The noise is given here, so its seed changes nothing.
ELSEWHERE = frozenset(("seed",))
SPEC_KEYS = ("interleave_array", "element_dtype_array", "istarget_in_interleave")
MAX_SIDE = 1024
MAX_FRAMES = 121
PIXELS_PER_CELL = 16
# The first latent frame of an i2v is the image's; fewer frames than these leave nothing to make.
MIN_I2V_FRAMES = 5


class Renorm(Enum):
    """How the guided velocity is scaled back to the conditional one's norm."""

    GLOBAL = "global"
    CHANNEL = "channel"
    NONE = "none"


class Medium(Enum):
    """What an element of a request is."""

    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True)
class Element:
    """One element of a request: a text, or the path of an image or video.

    The target text of an understanding request is (instruction, question, answer); an answer is never generated from,
    it only lengthens the layout.
    """

    medium: Medium
    content: str | tuple[str, str, str]
    target: bool = False


@dataclass(frozen=True)
class Request:
    """One generation or question; height and width in pixels, num_frames in frames.

    `elements` are in the order given; a task of TEXT_TASKS has one text. Edits take the size of their last visual and
    not height, width and num_frames; an i2v takes its height and width from the image. `resolution` names upstream's
    pair of sizes for visuals, `vae_resolution` and `vit_resolution` override it.
    The defaults are the launcher's (bytedance/Lance inference_lance.sh, config/config_factory.py).
    """

    task: str
    elements: tuple[Element, ...]
    height: int = 768
    width: int = 768
    num_frames: int = 50
    text_template: bool = True
    resolution: str | None = None
    vae_resolution: int | None = None
    vit_resolution: int | None = None
    num_steps: int = 30
    timestep_shift: float = 3.5
    cfg_text_scale: float = 4.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Renorm = Renorm.GLOBAL
    cfg_renorm_min: float = 0.0
    max_new_tokens: int = 256

    @classmethod
    def from_dict(cls, values: dict) -> "Request":
        """Check a manifest's request; an unknown key or an impossible value is a ReferenceError."""
        known = {field.name for field in fields(cls)} - {"elements"}
        for key in ("task", "spec"):
            if key not in values:
                raise ReferenceError(f"request: '{key}' is missing")
        if values["task"] not in TASKS:
            raise ReferenceError(f"request: task {values['task']!r} is not one of {', '.join(TASKS)}")
        unknown = sorted(values.keys() - known - ELSEWHERE - {"spec"})
        if unknown:
            raise ReferenceError(f"request: unknown key '{', '.join(unknown)}'")
        elements = read_spec(values["task"], values["spec"])
        values = {key: value for key, value in values.items() if key in known}
        if "cfg_renorm_type" in values:
            values["cfg_renorm_type"] = renorm_named(values["cfg_renorm_type"])
        if isinstance(values.get("cfg_interval"), list):
            values["cfg_interval"] = tuple(values["cfg_interval"])
        return cls(elements=elements, **values)

    def __post_init__(self) -> None:
        def check(condition: bool, complaint: str) -> None:
            if not condition:
                raise ReferenceError(f"request: {complaint}")

        texts = [element for element in self.elements if element.medium is Medium.TEXT]
        check(isinstance(self.text_template, bool), "text_template must be true or false")
        check(len(texts) == 1, f"{self.task} needs one text, there are {len(texts)}")
        if self.understanding:
            check(texts[0].target, f"the text of {self.task} must be its target")
            check(self.elements[-1] is texts[0], f"the visuals of {self.task} come before its text")
        if self.task not in TEXT_TASKS:
            check(bool(self.visuals), f"{self.task} needs an image or a video")
            # Upstream lays out no target block there.
            check(self.text_template or self.understanding, f"text_template false is not defined for {self.task}")
        for name in ("height", "width"):
            side = getattr(self, name)
            good = is_integer(side) and 0 < side <= MAX_SIDE and side % PIXELS_PER_CELL == 0
            check(good, f"{name} {side!r} is not a multiple of {PIXELS_PER_CELL} up to {MAX_SIDE}")
        least = MIN_I2V_FRAMES if self.task == "i2v" else 1
        good = not self.makes_video or is_integer(self.num_frames) and least <= self.num_frames <= MAX_FRAMES
        check(good, f"num_frames {self.num_frames!r} is not a number from {least} to {MAX_FRAMES}")
        for name in ("num_steps", "max_new_tokens"):
            good = is_integer(getattr(self, name)) and getattr(self, name) >= 1
            check(good, f"{name} {getattr(self, name)!r} is not a positive integer")
        for name in ("vae_resolution", "vit_resolution"):
            good = getattr(self, name) is None or is_integer(getattr(self, name)) and getattr(self, name) >= 1
            check(good, f"{name} {getattr(self, name)!r} is not a positive integer")
        for name in ("timestep_shift", "cfg_text_scale", "cfg_renorm_min"):
            check(is_finite(getattr(self, name)), f"{name} {getattr(self, name)!r} is not a finite number")
        check(self.timestep_shift > 0, f"timestep_shift {self.timestep_shift} is not positive")
        ends = self.cfg_interval
        good = isinstance(ends, tuple) and len(ends) == 2 and all(map(is_finite, ends))
        check(good, f"cfg_interval {ends!r} is not two numbers, lo and hi")

    @property
    def understanding(self) -> bool:
        """Whether the answer is text."""
        return self.task in UNDERSTANDING_TASKS

    @property
    def makes_video(self) -> bool:
        """Whether the result has a number of frames of its own (validation_dataset.py:__getitem__)."""
        return self.task in ("t2v", "i2v", "video_edit", "idip", "video_idip")

    @property
    def visuals(self) -> list[Element]:
        """The given images and videos, in order; targets are not given."""
        return [element for element in self.elements if element.medium is not Medium.TEXT and not element.target]

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional arm at all."""
        return self.cfg_text_scale > 1.0


def read_spec(task: str, spec: object) -> tuple[Element, ...]:
    """Elements of a manifest's spec: a prompt for the tasks of TEXT_TASKS, else three lists of equal length."""
    if task in TEXT_TASKS:
        if not isinstance(spec, str):
            raise ReferenceError("request: spec must be the prompt, a string")
        return (Element(Medium.TEXT, spec),)
    lists = [spec.get(key) for key in SPEC_KEYS] if isinstance(spec, dict) else []
    if not lists or set(spec) != set(SPEC_KEYS) or not all(isinstance(values, list) for values in lists):
        raise ReferenceError(f"request: the spec of {task} must hold the lists {', '.join(SPEC_KEYS)}")
    if len({len(values) for values in lists}) != 1:
        raise ReferenceError(f"request: the lists {', '.join(SPEC_KEYS)} differ in length")
    return tuple(read_element(task, *values) for values in zip(*lists, strict=True))


def read_element(task: str, content: object, medium: object, target: object) -> Element:
    """One element of a spec; raises ReferenceError."""
    if medium not in [member.value for member in Medium]:
        raise ReferenceError(f"request: element type {medium!r} is not text, image or video")
    if target not in (0, 1):
        raise ReferenceError(f"request: istarget {target!r} is not 0 or 1")
    if task in UNDERSTANDING_TASKS and medium == "text":
        if not (isinstance(content, list) and len(content) == 3 and all(isinstance(part, str) for part in content)):
            raise ReferenceError(f"request: the text of {task} must be [instruction, question, answer]")
        content = tuple(content)
    elif not isinstance(content, str):
        raise ReferenceError(f"request: {content!r} is not a text or path")
    return Element(Medium(medium), content, bool(target))


def renorm_named(name: object) -> Renorm:
    """Renorm of a name; "", "none", "null" and None mean none (lance.py:validation_gen_KVcache)."""
    plain = "none" if name is None else name
    plain = plain.lower() if isinstance(plain, str) else plain
    if plain in ("", "null"):
        plain = "none"
    try:
        return Renorm(plain)
    except ValueError:
        raise ReferenceError(f"request: cfg_renorm_type {name!r} is not global, channel or none") from None
