"""The options that hold for everything that a run makes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from lance_mlx.checkpoint.recipe import Recipe, recipe_of
from lance_mlx.cli.meaning import OPTIONS
from lance_mlx.cli.options import DEFAULT_FRAMES, DEFAULT_SIDE
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.files import caption_instruction
from lance_mlx.requests.request import Entry, Question, Renorm, Request, Scheduler, Task, Visual


def chosen_recipe(bits: int | None, predicate: str | None) -> Recipe | None:
    """What -q and --quant-predicate say, None without either; raises LanceError where they contradict each other."""
    return None if bits is None and predicate is None else recipe_of(bits, predicate)


@dataclass(frozen=True)
class Settings:
    """The options that hold for everything that a run makes; None is the task's default."""

    height: int | None
    width: int | None
    num_frames: int | None
    resolution: str | None
    vae_resolution: int | None
    vit_resolution: int | None
    num_steps: int
    timestep_shift: float
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guidance_renorm: Renorm
    guidance_renorm_min: float
    text_template: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    entry: Entry
    seed: int
    fps: int
    negative_prompt: str | None
    scheduler: Scheduler
    strength: float
    as_upstream: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], seed: int) -> Self:
        """Those among the parameters of the command, by name, and a seed."""
        names = [field.name for field in fields(cls) if field.name != "seed"]
        return cls(**{name: options[OPTIONS.get(name, name)] for name in names}, seed=seed)

    def request(self, task: Task, prompt: str, visuals: tuple[Visual, ...], vision_type: str | None = None) -> Request:
        """A request for an image or a video; raises LanceError for a value that cannot be used."""
        return Request(task, prompt, visuals=visuals, vision_type=vision_type, **self._values(Request, task))

    def question(
        self, task: Task, question: str, visuals: tuple[Visual, ...], instruction: str | None, answer: str = ""
    ) -> Question:
        """A question; one without words asks for a description."""
        if instruction is None and not question:
            instruction = caption_instruction(task)
        return Question(task, question, visuals, instruction, answer, **self._values(Question, task))

    def _values(self, kind: type[Request] | type[Question], task: Task) -> dict[str, Any]:
        """Of the fields that are here and there, with the task's defaults for None."""
        vae, vit = RESOLUTIONS[self.resolution] if self.resolution else (None, None)
        frames = DEFAULT_FRAMES if task.is_for_video else 1
        defaults = {"height": DEFAULT_SIDE, "width": DEFAULT_SIDE, "num_frames": frames}
        defaults |= {"vae_resolution": vae, "vit_resolution": vit}
        own = {name: defaults.get(name) if value is None else value for name, value in vars(self).items()}
        return {field.name: own[field.name] for field in fields(kind) if field.name in own}
