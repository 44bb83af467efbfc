"""What `lance-mlx train` is told, by a JSON file and by flags over it."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args

from lance_mlx.config import read_config
from lance_mlx.errors import LanceError
from lance_mlx.media.preprocess import RESOLUTIONS, VIT_DIVISOR
from lance_mlx.requests.request import Task, VisualKind
from lance_mlx.training.lora import LoRASettings
from lance_mlx.training.loss import LossSettings
from lance_mlx.training.step import OptimizerSettings

_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
_LISTS = ("targets", "sample_prompts")


@dataclass(frozen=True)
class TrainSettings:
    """A run of training; whatever would change its result is here.

    Attributes:
        model: folder of the checkpoint, or a repository on the hub.
        data: folder of images and videos, each with its caption in a .txt of the same name, or a .jsonl file.
        adapter_path: folder of what is written: the adapter, what the run goes on from, its log, cached latents.
        variant: "image" or "video"; None for what the data is about.
        iters: steps of the optimizer.
        batch_size: examples of a step. They are run one after another, so that more take longer and no more memory.
        resolution: root of an image's area in pixels; its shape is that of the nearest of upstream's buckets.
        vit_resolution: the same of what the ViT looks at; None for what upstream pairs with `resolution`.
        caption_dropout: how often a drawing is learned without its text, for guidance.
        visual_dropout: how often it is learned without the images or videos that it is given.
        rank, alpha, targets: see `LoRASettings`.
        tower: see there; None for those that the data needs.
        learning_rate, warmup, weight_decay, max_grad_norm: see `OptimizerSettings`.
        timestep_shift: see `LossSettings`.
        numerics: "bfloat16" or "float32".
        quantize: bits or recipe of the base, as generate's; None for none.
        grad_checkpoint: compute each layer once more on the way back, instead of keeping what it made.
        save_every: steps after which the run could go on if it were stopped.
        val_data: as `data`, of which nothing is learned; None for none.
        steps_per_eval: steps between losses of it, at times and noise that stay the same.
        sample_prompts: what is drawn while the run goes on.
        sample_every: steps between such drawings.
        seed: of everything that is drawn.
        as_upstream: as `drawing_sample` and `answering_sample` take it.

    Raises:
        LanceError: a value that cannot be used, naming it.
    """

    model: str
    data: str
    adapter_path: str = "adapters"
    variant: str | None = None
    iters: int = 1000
    batch_size: int = 1
    resolution: int = 512
    vit_resolution: int | None = None
    caption_dropout: float = 0.1
    visual_dropout: float = 0.1
    rank: int = 16
    alpha: float = 16.0
    tower: str | None = None
    targets: tuple[str, ...] = ()
    learning_rate: float = 1e-4
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    timestep_shift: float = 4.0
    numerics: str = "bfloat16"
    quantize: int | str | None = None
    grad_checkpoint: bool = False
    save_every: int = 100
    val_data: str | None = None
    steps_per_eval: int = 200
    sample_prompts: tuple[str, ...] = ()
    sample_every: int = 500
    seed: int = 0
    as_upstream: bool = False

    def __post_init__(self) -> None:
        ones = ("iters", "batch_size", "save_every", "steps_per_eval", "sample_every")
        for name, least in (*dict.fromkeys(ones, 1).items(), ("warmup", 0), ("seed", 0)):
            if not least <= getattr(self, name) < 2**32:
                raise LanceError(f"{name} {getattr(self, name)} must be at least {least}, and below {2**32}")
        if not 16 <= self.resolution <= 1024:
            raise LanceError(f"resolution {self.resolution} must be between 16 and 1024 pixels")
        if self.vit_resolution is not None and not 28 <= self.vit_resolution <= 1024:
            raise LanceError(f"vit_resolution {self.vit_resolution} must be between 28 and 1024 pixels")
        for name in ("caption_dropout", "visual_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise LanceError(f"{name} {getattr(self, name)} must be between 0 and 1")
        for name in ("learning_rate", "timestep_shift", "max_grad_norm"):
            if not 0 < getattr(self, name) < 1e6:
                raise LanceError(f"{name} {getattr(self, name)} must be above 0")
        if not 0 <= self.weight_decay < 1:
            raise LanceError(f"weight_decay {self.weight_decay} must be 0 or more and below 1")
        if self.variant not in (None, *VisualKind):
            raise LanceError(f"variant {self.variant!r} must be image or video")
        self.lora  # noqa: B018 - which checks its own values

    @classmethod
    def read(cls, path: Path | None, flags: Mapping[str, Any]) -> Self:
        """Those of a JSON file, with those of flags that are given in their place.

        Raises:
            LanceError: the file cannot be read, or a key is unknown, of another type, or missing.
        """
        given = read_config(path, _checked, "give the file of a run's settings") if path else {}
        given |= {name: value for name, value in flags.items() if value is not None}
        for name in ("model", "data"):
            if name not in given:
                raise LanceError(f"--{name} is missing: give it, or '{name}' in the file of --config")
        return cls(**given)

    def for_tasks(self, tasks: Collection[Task]) -> Self:
        """With what was left to the data: the video model where a task is for videos, and the adapters of the tower
        that draws, of the one that answers, or of both."""
        answers = [task.answers for task in tasks]
        tower = "both" if len(set(answers)) > 1 else "understanding" if all(answers) else "generation"
        kind = VisualKind.VIDEO if any(task.is_for_video for task in tasks) else VisualKind.IMAGE
        return replace(self, tower=self.tower or tower, variant=self.variant or str(kind))

    @property
    def lora(self) -> LoRASettings:
        """Which layers are given an adapter; of both towers before the data is known."""
        return LoRASettings(self.rank, self.alpha, self.tower or "both", self.targets)

    @property
    def looks_at(self) -> int:
        """Root of the area in pixels of what the ViT looks at."""
        paired = dict(RESOLUTIONS.values()).get(self.resolution, max(VIT_DIVISOR, self.resolution * 7 // 8))
        return self.vit_resolution or paired

    @property
    def loss(self) -> LossSettings:
        """How the loss is put together."""
        return LossSettings(timestep_shift=self.timestep_shift)

    @property
    def optimizer(self) -> OptimizerSettings:
        """How a step is made."""
        return OptimizerSettings(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            max_grad_norm=self.max_grad_norm,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _LISTS}


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    known = {field.name: field.type for field in fields(TrainSettings)}
    for name, value in values.items():
        if name not in known:
            raise LanceError(f"unknown key '{name}': the keys are {', '.join(known)}")
        if name in _LISTS:
            good, wanted = isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of texts"
        else:
            kinds = get_args(known[name]) or (known[name],)
            good = isinstance(value, (*kinds, int) if float in kinds else kinds)
            good = good and isinstance(value, bool) == (bool in kinds)
            wanted = " or ".join(_KINDS[kind] for kind in kinds)
        if not good:
            raise LanceError(f"'{name}' must be {wanted}, not {value!r}")
    return values | {name: tuple(values[name]) for name in _LISTS if name in values}
