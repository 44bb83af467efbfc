"""What is asked for: task, prompt, size, steps and guidance."""

import math
from dataclasses import dataclass, fields
from enum import Enum

from reference.errors import ReferenceError

TASKS = ("t2i", "t2v")
# The size bucket of visual inputs, the noise's seed (here the noise is given), the length of an answer.
ELSEWHERE = frozenset(("resolution", "vae_resolution", "vit_resolution", "seed", "max_new_tokens"))
MAX_SIDE = 1024
MAX_FRAMES = 121
PIXELS_PER_CELL = 16
FRAMES_PER_LATENT = 4


class Renorm(Enum):
    """How the guided velocity is scaled back to the conditional one's norm."""

    GLOBAL = "global"
    CHANNEL = "channel"
    NONE = "none"


@dataclass(frozen=True)
class Request:
    """One t2i or t2v generation; height and width in pixels, num_frames in frames (a t2i always has one).

    The defaults are the launcher's (bytedance/Lance inference_lance.sh, config/config_factory.py).
    """

    task: str
    spec: str
    height: int = 768
    width: int = 768
    num_frames: int = 50
    text_template: bool = True
    num_steps: int = 30
    timestep_shift: float = 3.5
    cfg_text_scale: float = 4.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Renorm = Renorm.GLOBAL
    cfg_renorm_min: float = 0.0

    @classmethod
    def from_dict(cls, values: dict) -> "Request":
        """Check a manifest's request; an unknown key or an impossible value is a ReferenceError.

        The keys of ELSEWHERE are accepted and change nothing for these tasks.
        """
        known = {field.name for field in fields(cls)}
        for key in ("task", "spec"):
            if key not in values:
                raise ReferenceError(f"request: '{key}' is missing")
        if values["task"] not in TASKS:
            raise ReferenceError(f"request: task '{values['task']}' is not supported yet; {' and '.join(TASKS)} are")
        unknown = sorted(values.keys() - known - ELSEWHERE)
        if unknown:
            raise ReferenceError(f"request: unknown key '{', '.join(unknown)}'")
        values = {key: value for key, value in values.items() if key in known}
        if "cfg_renorm_type" in values:
            values["cfg_renorm_type"] = renorm_named(values["cfg_renorm_type"])
        if isinstance(values.get("cfg_interval"), list):
            values["cfg_interval"] = tuple(values["cfg_interval"])
        return cls(**values)

    def __post_init__(self) -> None:
        def check(condition: bool, complaint: str) -> None:
            if not condition:
                raise ReferenceError(f"request: {complaint}")

        check(isinstance(self.spec, str), "spec must be the prompt, a string")
        check(isinstance(self.text_template, bool), "text_template must be true or false")
        for name in ("height", "width"):
            side = getattr(self, name)
            good = is_integer(side) and 0 < side <= MAX_SIDE and side % PIXELS_PER_CELL == 0
            check(good, f"{name} {side!r} is not a multiple of {PIXELS_PER_CELL} up to {MAX_SIDE}")
        good = self.task == "t2i" or is_integer(self.num_frames) and 1 <= self.num_frames <= MAX_FRAMES
        check(good, f"num_frames {self.num_frames!r} is not a number from 1 to {MAX_FRAMES}")
        good = is_integer(self.num_steps) and self.num_steps >= 1
        check(good, f"num_steps {self.num_steps!r} is not a positive integer")
        for name in ("timestep_shift", "cfg_text_scale", "cfg_renorm_min"):
            check(is_finite(getattr(self, name)), f"{name} {getattr(self, name)!r} is not a finite number")
        check(self.timestep_shift > 0, f"timestep_shift {self.timestep_shift} is not positive")
        ends = self.cfg_interval
        good = isinstance(ends, tuple) and len(ends) == 2 and all(map(is_finite, ends))
        check(good, f"cfg_interval {ends!r} is not two numbers, lo and hi")

    @property
    def frames(self) -> int:
        """Frames of the output."""
        return 1 if self.task == "t2i" else self.num_frames

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        frames = (self.frames - 1) // FRAMES_PER_LATENT + 1
        return frames, self.height // PIXELS_PER_CELL, self.width // PIXELS_PER_CELL

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional arm at all."""
        return self.cfg_text_scale > 1.0


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


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
