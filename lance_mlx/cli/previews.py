"""What a run of training draws while it goes on."""

from pathlib import Path

from lance_mlx.backend.allocator import release
from lance_mlx.config import SPATIAL_STRIDE
from lance_mlx.errors import LanceError
from lance_mlx.outputs import Generated
from lance_mlx.pipeline import Pipeline
from lance_mlx.requests.request import Request, Task, Variant, VisualKind
from lance_mlx.training.settings import TrainSettings

SAMPLES = "samples"
_FRAMES = 25


class Previews:
    """Draws a run's prompts into the folder `samples` beside its adapter, a file a prompt and step.

    A file that is there stays: a run that goes on would draw the same again.

    Args:
        resume: whether the run goes on, and finds what it drew before.

    Raises:
        LanceError: a prompt cannot be drawn, or another run's drawings are there.
    """

    def __init__(self, settings: TrainSettings, resume: bool) -> None:
        variant = Variant(settings.variant)
        self._folder = Path(settings.adapter_path) / SAMPLES
        adapter = [str(settings.adapter_path), 1.0]
        self._made_by = {"model": Path(settings.model).name, "variant": str(variant), "lora": [adapter]}
        side = settings.resolution // SPATIAL_STRIDE * SPATIAL_STRIDE
        task, frames = (Task.T2V, _FRAMES) if variant.kind is VisualKind.VIDEO else (Task.T2I, 1)
        self._requests = [Request(task, prompt, side, side, frames, seed=settings.seed)
                          for prompt in settings.sample_prompts]  # fmt: skip
        if self._requests and not resume and self._folder.exists():
            raise LanceError(f"{self._folder} holds drawings already: move them, or choose another --adapter-path")

    def draw(self, pipeline: Pipeline, step: int) -> None:
        """Draw all prompts with a model; raises LanceError where a file cannot be written."""
        for number, request in enumerate(self._requests, start=1):
            path = self._folder / f"{step:06d}-{number}{'.mp4' if request.makes_video else '.png'}"
            if path.exists():
                continue
            for done in pipeline.denoise(pipeline.prepare(request)):
                latents = done.x_next
            latents = latents.reshape(*request.latent_grid, -1)
            numerics = pipeline.model.numerics.name
            Generated(request, latents, numerics, 0.0, (), pipeline.vae, self._made_by | {"numerics": numerics}).save(
                path
            )
        release()
