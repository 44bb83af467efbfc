"""A run of training: steps on examples, and all that is needed to go on after one."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from lance_mlx.checkpoint.safetensors import TensorInfo, read_header, read_notes, write_safetensors
from lance_mlx.errors import LanceError
from lance_mlx.files import whole, write_text
from lance_mlx.model.lance import Lance
from lance_mlx.sequence.segments import Role
from lance_mlx.sequence.tokenizer import LanceTokenizer
from lance_mlx.training.adapter_files import write_adapter
from lance_mlx.training.encoded import Encoded
from lance_mlx.training.lora import Adapter, adaptable, add_adapters, new_pairs, pairs_of
from lance_mlx.training.loss import Totals, losses_of, terms
from lance_mlx.training.pack import CAPTION, VISUALS, Draw, Sample, draw
from lance_mlx.training.settings import TrainSettings
from lance_mlx.training.step import Optimizer, gradients

STATE, LOG, CACHE = "state.safetensors", "log.jsonl", "cache"
_ORDER, _STEP, _ADAPTERS, _VALIDATION = range(4)
"""What something is drawn for, so that no two are drawn alike."""
_MAY_CHANGE = {"iters", "save_every", "grad_checkpoint", "adapter_path", "val_data", "steps_per_eval", "sample_every"}
"""Settings that a run may go on with changed: they change none of its steps."""


class Told(NamedTuple):
    """What is logged of a step; `latents` and `labels` are how many of either were learned."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    latents: int
    labels: int
    seconds: float


class Validated(NamedTuple):
    """What is logged of the validation data after a step: the loss, and its two terms before they are weighted."""

    step: int
    val_loss: float
    val_mse: float
    val_ce: float
    seconds: float


Logged = TypeVar("Logged", Told, Validated)


@dataclass(frozen=True, eq=False)
class Training:
    """A model whose adapters are learned; one run at a time writes into its folder.

    Attributes:
        validation: what is looked at and not learned; None for none.
        preview: called with the number of a step after which something is to be drawn; None where nothing is.

    Nothing is drawn from a state that goes on: what a step draws depends on the seed and its number alone, so that a
    run which was stopped ends in the same bits.
    """

    settings: TrainSettings
    model: Lance
    tokenizer: LanceTokenizer
    data: Encoded
    validation: Encoded | None = None
    preview: Callable[[int], None] | None = None

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.settings.adapter_path)

    def run(self, resume: bool) -> Iterator[Told | Validated]:
        """Yield each step, and each look at the validation data, when it is made and logged; the adapter is written at
        the end and as often as is asked for.

        Args:
            resume: go on from what the folder holds, which must be of the same settings.

        Raises:
            LanceError: the folder holds another run, or cannot be written.
        """
        pairs = new_pairs(self.model, self.settings.lora, mx.random.key(self._number(_ADAPTERS)))
        add_adapters(self.model, [Adapter("new", pairs)])
        learn_adapters(self.model)
        optimizer = Optimizer(self.settings.optimizer, dict(tree_flatten(self.model.trainable_parameters())))
        if resume:
            self._restore(optimizer)
        elif (self.folder / STATE).exists():
            raise LanceError(
                f"{self.folder} holds a run already: go on with --resume, or choose another --adapter-path"
            )
        self._begin_log(optimizer.steps)
        if not optimizer.steps and self.validation:
            yield self._log(self._validate(0))
        while optimizer.steps < self.settings.iters:
            told = [self._log(self._step(optimizer))]
            if self.validation and self._due(told[0].step, self.settings.steps_per_eval):
                told.append(self._log(self._validate(told[0].step)))
            if self.preview and self._due(told[0].step, self.settings.sample_every):
                self.preview(told[0].step)
            # Last, so that what was not looked at or drawn before a kill is so when its step is made again.
            if self._due(told[0].step, self.settings.save_every):
                self._save(optimizer)
            yield from told

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.settings.iters

    def pack(self, step: int) -> list[tuple[Sample, Draw | None]]:
        """What a step, numbered from 0, learns from: samples, and what is drawn for each."""
        count, size = len(self.data.examples), self.settings.batch_size
        keys = mx.random.split(mx.random.key(self._number(_STEP, step)), size)
        return [self._sample(self._place(step * size + index, count), key) for index, key in enumerate(keys)]

    def _place(self, index: int, count: int) -> int:
        """Number of the example that comes at a place of the run: all come once, in an order of their own, before any
        comes again."""
        order = np.random.default_rng([self.settings.seed, _ORDER, index // count]).permutation(count)
        return int(order[index % count])

    def _sample(self, number: int, key: mx.array) -> tuple[Sample, Draw | None]:
        chance, latent, rest = mx.random.split(key, 3)
        rates = self.settings.caption_dropout, self.settings.visual_dropout
        chances = mx.random.uniform(shape=(2,), key=chance).tolist()
        parts = zip((CAPTION, VISUALS), chances, rates, strict=True)
        dropped = frozenset().union(*(roles for roles, drawn, rate in parts if drawn < rate))
        return self._drawn(self.data, number, latent, rest, dropped)

    def _drawn(
        self, data: Encoded, number: int, latent: mx.array, rest: mx.array, dropped: frozenset[Role] = frozenset()
    ) -> tuple[Sample, Draw | None]:
        """An example with the keys that its latents, and its time and noise, are drawn by."""
        seconds, dtype = self.model.config.tokens_per_second, self.model.numerics.dtype
        sample = data.sample(number, latent, self.tokenizer, seconds, dtype, dropped, self.settings.as_upstream)
        return sample, draw(sample, rest, dtype) if sample.latents else None

    def _step(self, optimizer: Optimizer) -> Told:
        began, number = time.perf_counter(), optimizer.steps
        samples, draws = zip(*self.pack(number), strict=True)
        losses, found = gradients(self.model, samples, draws, self.settings.loss, len(self.tokenizer))
        if not mx.isfinite(losses.loss).item():
            raise LanceError(f"the loss of step {number + 1} is not finite: lower the learning rate and --resume")
        rate = self.settings.optimizer.rate(mx.array(number)).item()
        norm = optimizer.step(self.model, found)
        latents, labels = sum(sample.noised for sample in samples), sum(len(sample.labels) for sample in samples)
        return Told(number + 1, losses.loss.item(), norm.item(), rate, latents, labels, time.perf_counter() - began)

    def _validate(self, step: int) -> Validated:
        """The losses of the validation data, all of it and nothing dropped, with the same draws at every step."""
        began, settings, sums, latents, labels = time.perf_counter(), self.settings.loss, [0.0, 0.0], 0, 0
        for number in range(len(self.validation.examples)):
            latent, rest = mx.random.split(mx.random.key(self._number(_VALIDATION, number)))
            sample, drawn = self._drawn(self.validation, number, latent, rest)
            found = terms(self.model, sample, drawn, settings.timestep_shift, len(self.tokenizer))
            own = losses_of(found, sample, Totals(1, 1.0), settings)
            sums = [sums[0] + own.mse.item(), sums[1] + own.ce.item()]
            latents, labels = latents + sample.noised, labels + len(sample.labels)
        mse, ce = sums[0] / max(latents, 1), sums[1] / max(labels, 1)
        loss = settings.mse_weight * mse + settings.ce_weight * ce
        return Validated(step, loss, mse, ce, time.perf_counter() - began)

    def _number(self, *what: int) -> int:
        """The seed of a key for something."""
        return int(np.random.SeedSequence([self.settings.seed, *what]).generate_state(1, np.uint64)[0])

    def _save(self, optimizer: Optimizer) -> None:
        """What the run goes on from, and the adapter."""
        kept = {name: np.array(array) for name, array in optimizer.state().items() if name != "step"}
        notes = {"step": str(optimizer.steps), "settings": json.dumps(self.settings.to_dict())}
        notes["data"] = self.data.digest
        try:
            with whole(self.folder / STATE) as beside, beside.open("wb") as file:
                infos = {name: TensorInfo("float32", array.shape) for name, array in kept.items()}
                write_safetensors(file, infos, lambda name: [kept[name]], notes)
        except OSError as error:
            raise LanceError(f"{self.folder} cannot be written ({error.strerror})") from None
        settings = self.settings.to_dict()
        write_adapter(self.folder, pairs_of(self.model), notes=settings | {"step": optimizer.steps})

    def _restore(self, optimizer: Optimizer) -> None:
        path = self.folder / STATE
        if not path.is_file():
            raise LanceError(f"{self.folder} holds no run to go on with: leave --resume out")
        tensors, notes = read_header(path), read_notes(path)
        try:
            before, data, steps = json.loads(notes["settings"]), notes["data"], int(notes["step"])
        except (KeyError, ValueError, TypeError):
            raise LanceError(f"{path} is not what a run wrote: choose another --adapter-path") from None
        changed = _changed(before, self.settings.to_dict())
        if changed:
            raise LanceError(f"{self.folder} was run with another {changed[0]}: give that, or another --adapter-path")
        if data != self.data.digest:
            raise LanceError(f"{self.settings.data} holds other examples than {self.folder} was run with")
        wanted = {name: array.shape for name, array in optimizer.state().items() if name != "step"}
        if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
            raise LanceError(f"{path} is of another model: give the one that it was run with")
        kept = {name: tensor.read(mx.float32) for name, tensor in tensors.items()}
        optimizer.restore(self.model, kept | {"step": mx.array(steps, mx.int32)})

    def _begin_log(self, steps: int) -> None:
        """Keep the lines of steps that are not made again."""
        path = self.folder / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if steps and path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= steps]
        try:
            write_text(path, "".join(f"{line}\n" for line in kept))
        except OSError as error:
            raise LanceError(f"{path} cannot be written ({error.strerror})") from None

    def _log(self, told: Logged) -> Logged:
        path = self.folder / LOG
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told._asdict()) + "\n")
        except OSError as error:
            raise LanceError(f"{path} cannot be written ({error.strerror})") from None
        return told


def _step_of(line: str) -> float:
    """The step that a line of the log is of; none for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")


def learn_adapters(model: nn.Module) -> None:
    """Freeze all of a model but its adapters."""
    model.freeze()
    for layer in adaptable(model).values():
        if "lora_a" in layer:
            layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*before, *now} - _MAY_CHANGE if before.get(name) != now.get(name))
