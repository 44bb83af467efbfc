"""The options that hold for everything that a run makes."""

from dataclasses import dataclass
from typing import Annotated

import typer

from lance_mlx.checkpoint.recipe import RECIPES, Recipe, recipe_of
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.files import caption_instruction
from lance_mlx.requests.request import Entry, Question, Renorm, Request, Scheduler, Task, Visual

GuidanceInterval = Annotated[
    tuple[float, float],
    typer.Option(
        help="Guidance acts while LOW < t <= HIGH. [default: 0.4 1.0]", metavar="LOW HIGH", show_default=False
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--quantize",
        "-q",
        help="Quantize the weights of both towers' attention and MLP to 3, 4, 5, 6 or 8 bits while they are read.",
        metavar="BITS",
        show_default=False,
    ),
]
Predicate = Annotated[
    str | None,
    typer.Option(
        "--quant-predicate",
        help=f"Recipe of what is quantized, and how: {', '.join(RECIPES)}, or a JSON file.",
        metavar="NAME|FILE",
        show_default=False,
    ),
]
DEFAULT_SIDE = 768
DEFAULT_FRAMES = 50


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
    as_upstream: bool

    def request(self, task: Task, prompt: str, visuals: tuple[Visual, ...], vision_type: str | None = None) -> Request:
        """A request for an image or a video; raises LanceError for a value that cannot be used."""
        num_frames = self.num_frames
        if num_frames is None:
            num_frames = DEFAULT_FRAMES if task.is_for_video else 1
        vae_resolution, vit_resolution = self._resolutions()
        return Request(
            task=task,
            prompt=prompt,
            height=DEFAULT_SIDE if self.height is None else self.height,
            width=DEFAULT_SIDE if self.width is None else self.width,
            num_frames=num_frames,
            num_steps=self.num_steps,
            timestep_shift=self.timestep_shift,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            guidance_renorm=self.guidance_renorm,
            guidance_renorm_min=self.guidance_renorm_min,
            text_template=self.text_template,
            entry=self.entry,
            seed=self.seed,
            fps=self.fps,
            visuals=visuals,
            vae_resolution=vae_resolution,
            vit_resolution=vit_resolution,
            vision_type=vision_type,
            negative_prompt=self.negative_prompt,
            scheduler=self.scheduler,
            as_upstream=self.as_upstream,
        )

    def question(
        self, task: Task, question: str, visuals: tuple[Visual, ...], instruction: str | None, answer: str = ""
    ) -> Question:
        """A question; one without words asks for a description."""
        if instruction is None and not question:
            instruction = caption_instruction(task)
        return Question(
            task=task,
            question=question,
            visuals=visuals,
            instruction=instruction,
            answer=answer,
            vit_resolution=self._resolutions()[1],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            entry=self.entry,
            as_upstream=self.as_upstream,
        )

    def _resolutions(self) -> tuple[int | None, int | None]:
        """Of the VAE and of the ViT, None for the task's own."""
        named = RESOLUTIONS[self.resolution] if self.resolution else (None, None)
        given = (self.vae_resolution, self.vit_resolution)
        return tuple(named[i] if given[i] is None else given[i] for i in range(2))
