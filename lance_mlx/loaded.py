"""Which of a checkpoint's two models is in memory, and how much of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from lance_mlx.backend.allocator import release
from lance_mlx.backend.numerics import Numerics, runs_on_cpu
from lance_mlx.checkpoint.hub import fetch, is_repository
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.checkpoint.weights import Tracker
from lance_mlx.estimate.estimate import coders_of, sizes_of
from lance_mlx.estimate.machine import budget
from lance_mlx.estimate.tiling import AUTO, NONE, fixed_tiles, tile_chooser
from lance_mlx.pipeline import Pipeline
from lance_mlx.pipeline import load as load_pipeline
from lance_mlx.requests.request import Question, Request, Variant
from lance_mlx.sampling.flow import Velocities
from lance_mlx.training.lora import Adapter


class Loaded:
    """A checkpoint, one model of which is in memory from when it is first asked for; see `lance_mlx.load`."""

    def __init__(
        self,
        model: str,
        numerics: Numerics,
        vit_source: ViTSource,
        track: Tracker,
        variant: Variant | None,
        quiet: bool,
        low_ram: bool,
        keep_encoders: bool,
        vae_tiling: str | int,
        recipe: Recipe | None,
        adapters: Sequence[Adapter],
        split: Velocities | None,
    ) -> None:
        self.model = model
        self.numerics = numerics
        self._vit_source = vit_source
        self._variant = variant
        self._quiet = quiet
        self._track = track
        self._low_ram = low_ram
        self._keep_encoders = keep_encoders
        self._vae_tiling = vae_tiling
        self.recipe = recipe
        self.adapters = adapters
        self._split = split
        self._pipeline: Pipeline | None = None
        self._loaded: tuple[Variant, bool] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, {self.numerics.name})"

    @property
    def name(self) -> str:
        """What the model is called: its repository, or its folder without the way there."""
        return self.model if is_repository(self.model) else Path(self.model).resolve().name

    def variant_for(self, request: Request | Question) -> Variant:
        """The model that is used for a request."""
        return self._variant or request.variant

    def made_by(self, request: Request | Question) -> dict[str, Any]:
        """What a result depends on besides its request, as plain JSON values; None for what was not asked for."""
        default = self._vit_source is ViTSource.LANCE
        return {
            "model": self.name,
            "variant": str(self.variant_for(request)),
            "numerics": self.numerics.name,
            "vit_source": None if default else str(self._vit_source),
            "quantize": self.recipe and self.recipe.name,
            "lora": [[adapter.name, adapter.strength] for adapter in self.adapters] or None,
        }

    def pipeline(self, variant: Variant, looks: bool) -> Pipeline:
        """The loaded model for a variant; with `looks` the ViT and the VAE's encoder are loaded too.

        Raises:
            LanceError: a file of the checkpoint is missing or wrong.
        """
        variant = self._variant or variant
        if self._pipeline is not None and self._loaded in ((variant, looks), (variant, True)):
            return self._pipeline
        # The other model goes first, so that two are never in memory.
        self.release()
        path = fetch(self.model, variant, self._quiet) if is_repository(self.model) else Path(self.model)
        source, track, low_ram = self._vit_source, self._track, self._low_ram
        given = self.recipe, self.adapters
        self._pipeline = load_pipeline(path, variant, self.numerics, looks, source, track, low_ram, *given)
        self._loaded, self._pipeline.split = (variant, looks), self._split
        if self._vae_tiling == AUTO:
            sizes = sizes_of(find_checkpoint(path, variant), looks=False, recipe=self.recipe)
            coders = coders_of(sizes, self.numerics, low_ram, runs_on_cpu())
            self._pipeline.vae.tile_for = tile_chooser(*coders, budget())
        elif self._vae_tiling != NONE:
            self._pipeline.vae.tile_for = fixed_tiles(self._vae_tiling)
        return self._pipeline

    def release(self) -> None:
        """Let the model that is in memory go; the next task loads it again."""
        self._pipeline = self._loaded = None
        release()

    def _looked(self, *seen: Any) -> None:
        """Compute what the encoders made, and free them where they are not to be kept."""
        mx.eval(*seen)
        variant, looks = self._loaded
        if looks and not self._keep_encoders and not self._low_ram:
            self._pipeline.drop_encoders()
            self._loaded = variant, False
        release()
