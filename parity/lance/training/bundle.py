"""Oracles of training: a pack, what upstream computed of it forwards and backwards, and two steps of its optimizer."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from parity.errors import ParityError
from parity.tensors.recording import Recording, read_tensors

FORMAT = "lance-training-oracle/1"
GRADIENT = "grad/"
"""Prefix of what holds the gradient of a tap."""


@dataclass(frozen=True)
class Asked:
    """One sample as a bundle describes it.

    Attributes:
        settings: its entry in the manifest.
        vit_grid: (t, h, w) in patches of each picture that the ViT sees.
        latents: float32 [t, h, w, 48] of its blocks of latents, the target's last.
        patches: float32 [n, 1176] of each picture that the ViT sees.
    """

    settings: dict[str, Any]
    vit_grids: tuple[tuple[int, int, int], ...]
    latents: tuple[np.ndarray, ...]
    patches: tuple[np.ndarray, ...]

    @property
    def task(self) -> str:
        """The launcher task, such as t2i."""
        return self.settings["task"]

    @property
    def dropped(self) -> str | None:
        """What was left out of it on purpose: its "caption", or the "visuals" that it is given."""
        return self.settings.get("dropped")

    @property
    def kept(self) -> tuple[np.ndarray, ...]:
        """The latents that are left."""
        return self.latents[-1:] if self.dropped == "visuals" else self.latents


@dataclass(frozen=True)
class TrainingBundle:
    """One oracle of training; `gradients` are by parameter, `deltas` by "step1/" or "step2/" and parameter."""

    path: Path
    manifest: dict[str, Any]
    inputs: Recording
    outputs: Recording
    gradients: Recording
    deltas: Recording

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def dtype(self) -> str:
        """The numerics policy of the run."""
        return self.manifest["source"]["dtype"]

    @property
    def training(self) -> dict[str, Any]:
        """How it was trained, under upstream's names."""
        return self.manifest["training"]

    @property
    def checkpoint(self) -> Path:
        """The folder of its weights, beside the folder of the bundles."""
        return self.path.parents[1] / self.manifest["checkpoint"]

    @property
    def samples(self) -> list[Asked]:
        """What was packed, in order."""
        visuals, found = iter(self._visuals()), []
        blocks = iter(self._numbered("vae.latent{}"))
        for settings in self.manifest["samples"]:
            seen = [next(visuals)] if "media" in settings else []
            latents = [next(blocks) for _ in range(len(seen) * ("target" in settings) + ("target" in settings))]
            found.append(Asked(settings, tuple(g for g, _ in seen), tuple(latents), tuple(p for _, p in seen)))
        return found

    @property
    def times(self) -> list[float]:
        """The normal number of each sample; 0 for one that has no latents."""
        times, start = [], 0
        for asked in self.samples:
            stop = start + sum(latent[..., 0].size for latent in asked.kept)
            own = self.inputs["timesteps_raw"].array[start:stop] if asked.latents else np.zeros(1)
            start = stop
            times.append(float(own.max()))
        return times

    @property
    def as_upstream(self) -> bool:
        """Whether it was trained under upstream's shipped settings where those differ from inference."""
        return self.training.get("as_upstream", True)

    def unrounded(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Parameters as the checkpoint has them, float32, those that were learned by default: what the optimizer
        started from."""
        with safe_open(self.checkpoint / self.manifest["variant"] / "model.safetensors", "np") as file:
            return {name: file.get_tensor(name) for name in names or self.gradients}

    def _visuals(self) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
        grids = self.inputs["vit_video_grid_thw"].array if "vit_video_grid_thw" in self.inputs else ()
        yield from zip([tuple(map(int, grid)) for grid in grids], self._numbered("vit_patches{}"), strict=True)

    def _numbered(self, name: str) -> list[np.ndarray]:
        found = []
        while name.format(len(found)) in self.inputs:
            found.append(self.inputs[name.format(len(found))].array)
        return found


def read_training_bundle(path: Path) -> TrainingBundle:
    """Read one bundle folder; raises ParityError in one line that names what is wrong."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParityError(f"{path / 'manifest.json'} cannot be read ({error})") from None
    if manifest.get("format") != FORMAT:
        raise ParityError(f"{path}: format {manifest.get('format')!r} is not {FORMAT}")
    files = ("inputs", "outputs", "gradients", "deltas")
    return TrainingBundle(path, manifest, *(read_tensors(path / f"{name}.safetensors") for name in files))
