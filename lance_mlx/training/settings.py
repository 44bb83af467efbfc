"""What `lance-mlx train` is told, by a JSON file and by flags over it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from lance_mlx.config import read_config
from lance_mlx.errors import LanceError
from lance_mlx.training.lora import LoRASettings
from lance_mlx.training.loss import LossSettings
from lance_mlx.training.step import OptimizerSettings

_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class TrainSettings:
    """A run of training; whatever would change its result is here.

    Attributes:
        model: folder of the checkpoint, or a repository on the hub.
        data: folder of images, each with its caption in a .txt of the same name.
        adapter_path: folder of what is written: the adapter, what the run goes on from, its log, cached latents.
        variant: "image" or "video".
        iters: steps of the optimizer.
        batch_size: images of a step. They are run one after another, so that more take longer and no more memory.
        resolution: root of an image's area in pixels; its shape is that of the nearest of upstream's buckets.
        caption_dropout: how often an image is learned without its caption, for guidance.
        rank, alpha, tower, targets: see `LoRASettings`.
        learning_rate, warmup, weight_decay, max_grad_norm: see `OptimizerSettings`.
        timestep_shift: see `LossSettings`.
        numerics: "bfloat16" or "float32".
        quantize: bits or recipe of the base, as generate's; None for none.
        grad_checkpoint: compute each layer once more on the way back, instead of keeping what it made.
        save_every: steps after which the run could go on if it were stopped.
        seed: of everything that is drawn.
        as_upstream: the instruction for videos, under which upstream's shipped settings train images too.

    Raises:
        LanceError: a value that cannot be used, naming it.
    """

    model: str
    data: str
    adapter_path: str = "adapters"
    variant: str = "image"
    iters: int = 1000
    batch_size: int = 1
    resolution: int = 512
    caption_dropout: float = 0.1
    rank: int = 16
    alpha: float = 16.0
    tower: str = "generation"
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
    seed: int = 0
    as_upstream: bool = False

    def __post_init__(self) -> None:
        for name, least in (("iters", 1), ("batch_size", 1), ("save_every", 1), ("warmup", 0), ("seed", 0)):
            if not least <= getattr(self, name) < 2**32:
                raise LanceError(f"{name} {getattr(self, name)} must be at least {least}, and below {2**32}")
        if not 16 <= self.resolution <= 1024:
            raise LanceError(f"resolution {self.resolution} must be between 16 and 1024 pixels")
        if not 0 <= self.caption_dropout <= 1:
            raise LanceError(f"caption_dropout {self.caption_dropout} must be between 0 and 1")
        for name in ("learning_rate", "timestep_shift", "max_grad_norm"):
            if not 0 < getattr(self, name) < 1e6:
                raise LanceError(f"{name} {getattr(self, name)} must be above 0")
        if not 0 <= self.weight_decay < 1:
            raise LanceError(f"weight_decay {self.weight_decay} must be 0 or more and below 1")
        if self.variant not in ("image", "video"):
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

    @property
    def lora(self) -> LoRASettings:
        """Which layers are given an adapter."""
        return LoRASettings(self.rank, self.alpha, self.tower, self.targets)

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
        return asdict(self) | {"targets": list(self.targets)}


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    known = {field.name: field.type for field in fields(TrainSettings)}
    for name, value in values.items():
        if name not in known:
            raise LanceError(f"unknown key '{name}': the keys are {', '.join(known)}")
        kind = known[name]
        if name == "targets":
            good, wanted = isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of texts"
        elif name == "quantize":
            good, wanted = value is None or isinstance(value, int | str) and value is not True, "bits or a recipe"
        else:
            allowed = int | float if kind is float else kind
            good, wanted = isinstance(value, allowed) and isinstance(value, bool) == (kind is bool), _KINDS[kind]
        if not good:
            raise LanceError(f"'{name}' must be {wanted}, not {value!r}")
    return values | ({"targets": tuple(values["targets"])} if "targets" in values else {})
