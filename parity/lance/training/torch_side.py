"""A bundle of training through the reference."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from parity.lance.training.bundle import GRADIENT, Asked, TrainingBundle
from parity.lance.training.run import TrainingRun
from reference.layout import Role, VisualSize
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.request import Element, Medium, Request
from reference.training import (
    Computed,
    Optimizer,
    OptimizerSettings,
    Recipe,
    Sample,
    forward,
    gradients_of,
    pack_mask,
    train_parameters,
    training_layout,
)
from reference.vae import PIXELS_PER_CELL

_STEPS = 2
DROPPED = {"caption": (Role.TEXT,), "visuals": (Role.VIT, Role.SOURCE, Role.SUBJECT)}


class TorchTraining:
    """The reference, loaded for a bundle of training.

    numerics: an equally right variant of the bundle's own policy, which is the default. vocabulary: ids that may be
    answered.
    """

    def __init__(self, bundle: TrainingBundle, numerics: Numerics | None = None) -> None:
        self.bundle = bundle
        self.pipeline = Pipeline.load(bundle.checkpoint, bundle.manifest["variant"], numerics or Numerics(bundle.dtype))
        self.model, self.vocabulary = self.pipeline.model, len(self.pipeline.tokenizer)
        self.samples = [self._sample(asked) for asked in bundle.samples]
        training = bundle.training
        weights = (training[key] for key in ("timestep_shift", "ce_weight", "mse_weight", "ce_loss_reweighting"))
        self.recipe = Recipe(*weights)
        noise = bundle.inputs.get("noise")
        self.noise = None if noise is None else torch.from_numpy(noise.array)
        train_parameters(self.model, not training["freeze_llm_embed_tokens"], not training["freeze_und_params"],
                         training["visual_gen"])  # fmt: skip

    def _sample(self, asked: Asked) -> Sample:
        request, sizes = request_of(asked), [size_of(asked)] if asked.patches or asked.task == "i2v" else []
        target = pixels_of(asked.latents[-1]) if asked.latents else None
        dropped, seconds = DROPPED.get(asked.dropped, ()), self.model.config.tokens_per_second
        layout = training_layout(
            request, self.pipeline.tokenizer, sizes, target, seconds, dropped, self.bundle.as_upstream
        )
        vit = None
        if layout.vit_splits:
            patches = torch.from_numpy(np.concatenate(asked.patches))
            vit = self.pipeline.vit_model(patches, asked.vit_grids).clone()
        return Sample(layout, vit, [torch.from_numpy(latent) for latent in asked.kept])

    def forward(self) -> Computed:
        """The pack's forward."""
        return forward(self.model, self.samples, self.bundle.times, self.noise, self.vocabulary, self.recipe)

    def run(self, steps: int = _STEPS) -> TrainingRun:
        """Forward, backward and steps of the optimizer, after which the weights are as before."""
        taps, hooks = _hooked(self.model)
        found = self.forward()
        for hook in hooks:
            hook.remove()
        taps |= {"hidden_in": [found.hidden_in], "last_hidden_state": [found.last_hidden_state]}
        seen = [sample.vit for sample in self.samples if sample.vit is not None]
        if seen:
            taps["vit_model"] = seen
        gradients = gradients_of(self.model, found.loss)
        outputs = {name: torch.cat(parts) for name, parts in taps.items()}
        for name, parts in taps.items():
            if all(part.requires_grad for part in parts):
                by_part = torch.autograd.grad(found.loss, parts, retain_graph=True, allow_unused=True)
                whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parts, by_part, strict=True)]
                outputs[GRADIENT + name] = torch.cat(whole)
        outputs |= {"mse": found.mse, "ce": found.ce}
        outputs |= {"loss": found.loss, "loss.mse": found.loss_mse, "loss.ce": found.loss_ce}
        deltas = self._steps(gradients, steps, outputs) if steps else {}
        rows = np.ones(len(found.hidden_in), bool)
        return TrainingRun(self._exact(found), _arrays(outputs), _arrays(gradients), rows, deltas)

    def _steps(self, gradients: Mapping[str, Tensor], steps: int, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        training = self.bundle.training
        settings = OptimizerSettings(
            training["lr"], (training["beta1"], training["beta2"]), training["eps"], training["weight_decay"],
            training["warmup_steps"], training["max_grad_norm"],
        )  # fmt: skip
        unrounded = {name: torch.from_numpy(array) for name, array in self.bundle.unrounded().items()}
        kept = {name: each.detach().clone() for name, each in self.model.named_parameters()}
        optimizer, deltas = Optimizer(self.model, settings, unrounded), {}
        before = {name: master.detach().clone() for name, master in optimizer.masters.items()}
        for step in range(1, steps + 1):
            norm = optimizer.step(gradients)
            if step == 1:
                outputs["total_norm"] = norm
            for name, master in optimizer.masters.items():
                deltas[f"step{step}/{name}"] = (master.detach() - before[name]).float().numpy()
            if step < steps:
                found = self.forward()
                outputs[f"loss_step{step + 1}"] = found.loss
                gradients = gradients_of(self.model, found.loss)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(kept[name])
        return deltas

    def _exact(self, found: Computed) -> dict[str, np.ndarray]:
        layouts = [sample.layout for sample in self.samples]
        arrays = {
            "text_ids": np.concatenate([layout.text_ids for layout in layouts]),
            "modality": np.concatenate([layout.roles for layout in layouts]),
            "position_ids": np.concatenate([layout.position_ids for layout in layouts], 1),
            "mask": pack_mask(layouts).numpy(),
        }
        starts = np.cumsum([0, *(len(layout.text_ids) for layout in layouts)])
        labels = [(s, x) for s, x in zip(starts, layouts, strict=False) if x.answer is not None]
        if labels:
            arrays["ce_loss_indexes"] = np.concatenate(
                [np.arange(x.answer - 1, len(x.text_ids) - 1) + s for s, x in labels]
            )
            arrays["label_ids"] = np.concatenate([x.text_ids[x.answer :] for _, x in labels])
        drawn = [(s, x) for s, x in zip(starts, layouts, strict=False) if x.answer is None]
        if drawn:
            arrays["mse_loss_indexes"] = np.concatenate([x.made_rows + s for s, x in drawn])
            arrays["packed_vae_token_indexes"] = np.concatenate([x.latent_rows + s for s, x in drawn])
            arrays["packed_latent_position_ids"] = np.concatenate([x.latent_position_ids for _, x in drawn])
            arrays |= _arrays({"timesteps": found.timesteps, "x_t": found.x_t})
        return arrays


def request_of(asked: Asked) -> Request:
    """The request that a sample is the answer to."""
    settings = asked.settings
    visual = Element(Medium.IMAGE, settings.get("media") or settings.get("target", ""))
    if asked.task == "x2t_image":
        text = Element(Medium.TEXT, (settings["instruction"], settings["question"], settings["answer"]), True)
        return Request(asked.task, (visual, text))
    text = Element(Medium.TEXT, settings["text"])
    elements = (text, visual) if asked.patches or asked.task == "i2v" else (text,)
    if asked.task == "i2v":
        return Request(asked.task, elements, num_frames=pixels_of(asked.latents[-1])[0])
    return Request(asked.task, elements)


def size_of(asked: Asked) -> VisualSize:
    """The size of the picture that a sample is given."""
    vae = pixels_of(asked.latents[0]) if asked.latents else None
    return VisualSize(vae, asked.vit_grids[0] if asked.vit_grids else None)


def pixels_of(latent: np.ndarray) -> tuple[int, int, int]:
    """Frames, height and width in pixels that a latent stands for."""
    frames, rows, columns = latent.shape[:3]
    return 4 * (frames - 1) + 1, rows * PIXELS_PER_CELL, columns * PIXELS_PER_CELL


def disturbed_weights(side: TorchTraining, seed: int) -> None:
    """Move every weight of a side by up to half a unit in its last place before it is rounded once more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in side.model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            unit = torch.finfo(parameter.dtype).eps / 2
            parameter.copy_(parameter.double() * (1 + signs * unit))


def _hooked(model: torch.nn.Module) -> tuple[dict[str, list[Tensor]], list]:
    """What modules give while the hooks are there, call by call."""
    names = [f"language_model.model.layers.{i}" for i in range(len(model.language_model.model.layers))]
    names += ["vae2llm", "time_embedder", "llm2vae", "language_model.lm_head"]
    taps: dict[str, list[Tensor]] = {}
    hooks = []
    for name in names:
        tap = name.replace("language_model.lm_head", "lm_head")

        def keep(module: torch.nn.Module, given: tuple, output: Tensor, tap: str = tap) -> None:
            taps.setdefault(tap, []).append(output)

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    return taps, hooks


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: each.detach().float().cpu().numpy() for name, each in tensors.items()}


def variants_of(dtype: str) -> dict[str, Numerics]:
    """Equally right ways to compute forwards and backwards, by name."""
    base = Numerics(dtype)
    found = {
        "explicit softmax": replace(base, attention="math"),
        "attention in float64": replace(base, attention="float64"),
        "products in float64": replace(base, linear="float64"),
        "padded batches": replace(base, linear="padded"),
    }
    return found if dtype == "float32" else found | {"native products": replace(base, linear="native")}
