"""A bundle of training through lance_mlx."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from lance_mlx.backend.numerics import policy
from lance_mlx.model.mot import ExpertRows, MoTModel
from lance_mlx.pipeline import load
from lance_mlx.requests.request import Question, Request, Task, Variant, Visual
from lance_mlx.requests.visuals import PreparedVisual
from lance_mlx.sequence.segments import AttentionMode
from lance_mlx.training.loss import LossSettings, Totals, losses_of, passes, terms
from lance_mlx.training.pack import CAPTION, VISUALS, Draw, Sample, answering_sample, drawing_sample, flow_state
from lance_mlx.training.parts import Trained, train_parts
from lance_mlx.training.step import Optimizer, OptimizerSettings, gradients
from parity.lance.training.bundle import GRADIENT, Asked, TrainingBundle
from parity.lance.training.run import TrainingRun
from parity.ports.attach import Attached

_STEPS = 2
_LAYERS = "language_model.model.layers."
_HEAD = "language_model.lm_head"
DROPPED = {"caption": CAPTION, "visuals": VISUALS}


class MlxTraining:
    """lance_mlx, loaded for a bundle of training."""

    def __init__(self, bundle: TrainingBundle) -> None:
        self.bundle, training = bundle, bundle.training
        looks = any(asked.patches for asked in bundle.samples)
        self.pipeline = load(bundle.checkpoint, Variant(bundle.manifest["variant"]), policy(bundle.dtype), looks)
        self.model, self.vocabulary = self.pipeline.model, len(self.pipeline.tokenizer)
        self.samples = [self._sample(asked) for asked in bundle.samples]
        keys = ("timestep_shift", "ce_weight", "mse_weight", "ce_loss_reweighting")
        self.settings = LossSettings(*(training[key] for key in keys))
        self.draws, start = [], 0
        for sample, time in zip(self.samples, bundle.times, strict=True):
            own = slice(start, start + len(sample.clean))
            start = own.stop
            self.draws.append(Draw(time, mx.array(bundle.inputs["noise"].array[own])) if sample.latents else None)
        embeddings, understanding = not training["freeze_llm_embed_tokens"], not training["freeze_und_params"]
        train_parts(self.model, Trained(embeddings, understanding, drawing=training["visual_gen"]))

    def _sample(self, asked: Asked) -> Sample:
        settings, tokenizer, seconds = asked.settings, self.pipeline.tokenizer, self.model.config.tokens_per_second
        visuals, vit = [], []
        for index, (patches, grid) in enumerate(zip(asked.patches, asked.vit_grids, strict=True)):
            # Of the pixels only the size is looked at.
            size = asked.latents[index].shape[:3] if asked.latents else (1, 1, 1)
            pixels = np.broadcast_to(np.float32(0), (4 * size[0] - 3, 16 * size[1], 16 * size[2], 3))
            visuals.append(PreparedVisual(patches, grid, pixels))
            vit.append(self.model.vit_model(mx.array(patches), [grid]))
        task = Task(asked.task)
        files = (Visual(settings.get("media") or settings.get("target", ""), task.takes),) if task.takes else ()
        if task.answers:
            question = Question(task, settings["question"], files, settings["instruction"], settings["answer"])
            return answering_sample(question, tokenizer, seconds, visuals, vit, self.bundle.as_upstream)
        frames, rows, columns = asked.latents[-1].shape[:3]
        size = {"height": 16 * rows, "width": 16 * columns, "num_frames": 4 * frames - 3}
        request = Request(task, settings["text"], visuals=files, **size)
        latents = [mx.array(latent) for latent in asked.latents]
        dropped = DROPPED.get(asked.dropped, ())
        return drawing_sample(request, tokenizer, seconds, latents, visuals, vit, dropped, self.bundle.as_upstream)

    def run(self, steps: int = _STEPS) -> TrainingRun:
        """Forward, backward and steps of the optimizer, after which the weights are as before."""
        losses, found = self.gradients()
        outputs = dict(zip(("loss", "loss.mse", "loss.ce"), losses, strict=True))
        outputs |= self._taps()
        deltas = self._steps(found, steps, outputs) if steps else {}
        return TrainingRun(self._exact(), _arrays(outputs), _arrays(found), self.run_rows(), deltas)

    def gradients(self) -> tuple[Any, dict[str, mx.array]]:
        """The pack's losses and gradients."""
        return gradients(self.model, self.samples, self.draws, self.settings, self.vocabulary)

    def _taps(self) -> dict[str, mx.array]:
        """Taps, and the gradient by each: by zeros that are added to it."""
        parts: dict[str, list[mx.array]] = {}
        errors: dict[str, list[mx.array]] = {"mse": [], "ce": []}
        self._whole({}, parts, errors)
        taps = {name: mx.concatenate(own) for name, own in (parts | errors).items() if own}
        taps = {name: tap for name, tap in taps.items() if tap.size}
        zeros = {name: mx.zeros_like(tap) for name, tap in taps.items() if name not in errors}
        by_tap = mx.grad(lambda probes: self._whole(probes, {}, {"mse": [], "ce": []}))(zeros)
        if any(sample.vit for sample in self.samples):
            taps["vit_model"] = mx.concatenate([seen for sample in self.samples for seen in sample.vit])
        return taps | {GRADIENT + name: gradient for name, gradient in by_tap.items()}

    def _whole(
        self, probes: Mapping[str, mx.array], taps: dict[str, list[mx.array]], errors: dict[str, list[mx.array]]
    ) -> mx.array:
        """The pack's loss, with something added to what is tapped."""
        offsets: dict[str, int] = {}

        def tapped(name: str, rows: mx.array) -> mx.array:
            start = offsets.get(name, 0)
            offsets[name] = start + len(rows)
            if name in probes:
                rows = rows + probes[name][start : start + len(rows)]
            taps.setdefault(name, []).append(rows)
            return rows

        def by_expert(name: str, rows: ExpertRows) -> ExpertRows:
            return rows.by_expert(tapped(name, rows.interleave()))

        def gave(path: str, output: Any) -> Any:
            if path.startswith(_LAYERS):
                return by_expert(path, output[0]), output[1]
            return tapped("lm_head" if path == _HEAD else path, output)

        def transformer(original: Callable, module: MoTModel, rows: ExpertRows, *args: Any, **values: Any) -> Any:
            hidden, caches = original(module, by_expert("hidden_in", rows), *args, **values)
            return by_expert("last_hidden_state", hidden), caches

        model, loss = self.model, mx.array(0.0)
        modules = [(f"{_LAYERS}{i}", layer) for i, layer in enumerate(model.language_model.model.layers)]
        modules += [("vae2llm", model.vae2llm), ("llm2vae", model.llm2vae), (_HEAD, model.language_model.lm_head)]
        totals = Totals.of(self.samples, self.settings)
        with Attached() as attached:
            attached.modules(modules, gave)
            attached.wrap(MoTModel, "__call__", transformer)
            for sample, drawn in zip(self.samples, self.draws, strict=True):
                found = terms(model, sample, drawn, self.settings.timestep_shift, self.vocabulary)
                loss = loss + losses_of(found, sample, totals, self.settings).loss
                if found.mse.size:
                    errors["mse"].append(found.mse)
                errors["ce"].append(found.ce)
        return loss

    def _steps(self, found: dict[str, mx.array], steps: int, outputs: dict[str, mx.array]) -> dict[str, np.ndarray]:
        training = self.bundle.training
        optimizer = Optimizer(
            OptimizerSettings(
                training["lr"], (training["beta1"], training["beta2"]), training["eps"], training["weight_decay"],
                training["warmup_steps"], training["max_grad_norm"],
            ),
            {name: mx.array(array) for name, array in self.bundle.unrounded(found).items()},
        )  # fmt: skip
        before, deltas = dict(optimizer.masters), {}
        kept = tree_flatten(self.model.trainable_parameters())
        for step in range(1, steps + 1):
            norm = optimizer.step(self.model, found)
            if step == 1:
                outputs["total_norm"] = norm
            for name, master in optimizer.masters.items():
                deltas[f"step{step}/{name}"] = np.array(master - before[name])
            if step < steps:
                losses, found = self.gradients()
                outputs[f"loss_step{step + 1}"] = losses.loss
        self.model.load_weights(kept, strict=False)
        return deltas

    def run_rows(self) -> np.ndarray:
        """Which rows of the pack are run at all."""
        return np.concatenate([np.arange(len(s.sequence.ids)) < self._stop(s) for s in self.samples])

    def _stop(self, sample: Sample) -> int:
        state = self._state(sample)
        return [own.stop for own in passes(self.model, sample, state)][-1]

    def _state(self, sample: Sample) -> Any:
        drawn = self.draws[self.samples.index(sample)]
        return flow_state(sample, drawn, self.settings.timestep_shift, self.model.numerics.dtype) if drawn else None

    def _exact(self) -> dict[str, np.ndarray]:
        sequences = [sample.sequence for sample in self.samples]
        starts = np.cumsum([0, *(len(sequence.ids) for sequence in sequences)])
        arrays: dict[str, list[np.ndarray]] = {}

        def add(name: str, array: np.ndarray) -> None:
            arrays.setdefault(name, []).append(array)

        for sample, start in zip(self.samples, starts, strict=False):
            add("text_ids", sample.sequence.ids)
            add("modality", sample.sequence.roles)
            add("position_ids", sample.positions)
            if sample.answer is not None:
                add("ce_loss_indexes", np.arange(sample.answer - 1, len(sample.sequence.ids) - 1) + start)
                add("label_ids", sample.labels)
            if sample.latents:
                latent = sample.sequence.inner_indexes(AttentionMode.NOISE, AttentionMode.FULL_NOISE)
                state = self._state(sample)
                add("packed_vae_token_indexes", latent + start)
                add("mse_loss_indexes", latent[~sample.clean] + start)
                add("timesteps", np.array(state.timesteps.astype(mx.float32)))
                add("x_t", np.array(state.x_t.astype(mx.float32)))
        return {name: np.concatenate(own, axis=-1 if name == "position_ids" else 0) for name, own in arrays.items()}


def _arrays(arrays: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}
