"""Load a checkpoint once, then turn requests into steps, latents and frames, and questions into tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from lance_mlx.backend.allocator import release
from lance_mlx.backend.numerics import BFLOAT16, Numerics
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.checkpoint.streaming import AnyVAE
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.checkpoint.weights import Tracker, load_lance, load_vae, stream_vae
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import join_projections
from lance_mlx.requests.request import Question, Request, Task, Variant
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.conditions import Conditions
from lance_mlx.sampling.flow import Picture, Step, Tell, Velocities, denoise
from lance_mlx.sampling.noise import draw_eps, draw_noise
from lance_mlx.sampling.preview import fit_preview
from lance_mlx.sampling.text import AnswerDecoder, answer_tokens, make_decoder, token_budget
from lance_mlx.sequence.prompt import answer_start, build_question, build_sequence
from lance_mlx.sequence.segments import Sequence as TokenSequence
from lance_mlx.sequence.tokenizer import LanceTokenizer
from lance_mlx.training.lora import Adapter, add_adapters


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request with everything that it needs to be denoised.

    Attributes:
        request: the request, with the size that its source dictates.
        negative: the sequence with the negative prompt in place of the prompt, None without one.
    """

    request: Request
    sequence: TokenSequence
    conditions: Conditions
    negative: TokenSequence | None = None


@dataclass(frozen=True, eq=False)
class PreparedQuestion:
    """A question whose prompt is ready to be read.

    Attributes:
        visuals: the grids of what the question is about.
        first: the last token of the context, the first one that is decoded.
        budget: most tokens of the answer.
    """

    question: Question
    visuals: tuple[PreparedVisual, ...]
    reader: AnswerDecoder
    first: int
    budget: int

    def shows(self, question: Question) -> bool:
        """Whether the prompt of `question` begins like this one's, up to the question itself."""
        return _shown(self.question) == _shown(question)


def _shown(question: Question) -> tuple:
    return question.task, question.visuals, question.instruction, question.vit_resolution, question.as_upstream


class Pipeline:
    """A loaded Lance: tokenizer, transformer and VAE under one numeric policy.

    Attributes:
        split: computes the velocities of a step with other processes; None without.
    """

    def __init__(
        self,
        model: Lance,
        vae: AnyVAE,
        tokenizer: LanceTokenizer,
        rgb_factors: Callable[[], np.ndarray | None] = lambda: None,
    ) -> None:
        """
        Args:
            rgb_factors: gives what was stored with the VAE for `preview_weights`.
        """
        self.model = model
        self.vae = vae
        self.tokenizer = tokenizer
        self._rgb_factors = rgb_factors
        self.split: Velocities | None = None

    @cached_property
    def preview_weights(self) -> np.ndarray:
        """What `preview` makes pictures of unfinished latents with: stored with the VAE, or fitted to it now."""
        stored = self._rgb_factors()
        return fit_preview(self.vae) if stored is None else stored

    def prepare(self, request: Request, visuals: Sequence[PreparedVisual] | None = None) -> Prepared:
        """Encode what the request refers to; its latents are sampled from the request's seed.

        Args:
            visuals: those of the request, already read and resized; they are read when None.

        Raises:
            LanceError: a visual cannot be used.
        """
        if visuals is None:
            visuals = prepare_visuals(request)
        clean = []
        for index, visual in enumerate(visuals):
            # Only the first frame of an animation is given, and later frames do not change its latents.
            statistics = self.vae.encode(visual.pixels[:1] if request.task is Task.I2V else visual.pixels)
            clean.append(statistics.sample(draw_eps(request, index, statistics.mean.shape)))
        return self.prepare_encoded(request, visuals, clean)

    def prepare_batch(self, requests: Sequence[Request], visuals: Sequence[Sequence[PreparedVisual]]) -> list[Prepared]:
        """The same for requests with their visuals; those that differ in their seed alone share a sequence, which is
        then read once.

        Raises:
            LanceError: as `prepare`.
        """
        made: dict[Request, Prepared] = {}
        prepared = []
        for request, own in zip(requests, visuals, strict=True):
            key = request if own else replace(request, seed=0)
            if key not in made:
                made[key] = self.prepare(request, own)
            prepared.append(made[key] if own else replace(made[key], request=request))
        return prepared

    def prepare_encoded(
        self, request: Request, visuals: Sequence[PreparedVisual], clean: Sequence[mx.array]
    ) -> Prepared:
        """Prepare from visuals already resized and their latents, float32 [t, h, w, 48] each; i2v uses the first
        frame."""
        request = sized_by_source(request, visuals)
        if request.task is Task.I2V:
            clean, looked_at = [clean[0][:1]], []
        else:
            looked_at = visuals
        flat = tuple(latents.reshape(-1, latents.shape[-1]).astype(self.model.numerics.dtype) for latents in clean)
        conditions, negative = Conditions(self.look(looked_at), flat), None
        if request.negative_prompt is not None:
            negative = build_sequence(replace(request, prompt=request.negative_prompt), self.tokenizer, visuals)
        return Prepared(request, build_sequence(request, self.tokenizer, visuals), conditions, negative)

    def look(self, visuals: Sequence[PreparedVisual]) -> tuple[mx.array, ...]:
        """Output of the ViT for each visual, [tokens, hidden]."""
        if not visuals:
            return ()
        patches = mx.array(np.concatenate([visual.vit_patches for visual in visuals]))
        tokens = self.model.vit_model(patches, [visual.vit_grid for visual in visuals])
        ends = np.cumsum([int(np.prod(visual.vit_cells)) for visual in visuals]).tolist()
        return tuple(mx.split(tokens, ends[:-1]))

    def join_projections(self) -> None:
        """Make answers faster, once and for all, by fewer products a token; not for layers that are read as they run.

        Drawing gains nothing: its passes have many rows.
        """
        join_projections(self.model.language_model.model)

    def drop_encoders(self) -> None:
        """Free the ViT and the VAE's encoder, which are in memory; what is prepared and evaluated needs neither."""
        del self.model.vit_model, self.vae.encoder, self.vae.conv1
        release()

    def denoise(
        self, prepared: Prepared, noise: mx.array | None = None, tell: Tell = lambda done, total: None
    ) -> Iterator[Step]:
        """Read the prompt, then yield the sampler's steps; the last one's `x_next` holds the latents.

        Args:
            noise: [n, 48] to start from; drawn from the request's seed when None.
            tell: called with the pieces of the prompt that are read, and their number.

        Raises:
            LanceError: the noise does not fit the request.
        """
        return (step for (step,) in self.denoise_batch([prepared], noise, tell))

    def denoise_batch(
        self, prepared: Sequence[Prepared], noise: mx.array | None = None, tell: Tell = lambda done, total: None
    ) -> Iterator[list[Step]]:
        """The same for requests that go together, side by side; yields the steps of all of them.

        Args:
            noise: to start from, of one request alone.
        """
        pictures = []
        for each in prepared:
            own = draw_noise(each.request, self.model.numerics) if noise is None else noise
            pictures.append(Picture(each.request, each.sequence, own, each.conditions, each.negative))
        return denoise(self.model, pictures, tell, self.split)

    def decode(self, request: Request, latents: mx.array) -> Iterator[mx.array]:
        """Yield pixels, float32 [1 or 4, height, width, 3] in [-1, 1], one latent frame of [n, 48] latents at a time.

        `request` has the size of the latents, as a prepared one does.
        """
        return self.vae.decode(latents.reshape(*request.latent_grid, -1))

    def prepare_question(
        self,
        question: Question,
        visuals: Sequence[PreparedVisual] | None = None,
        earlier: PreparedQuestion | None = None,
    ) -> PreparedQuestion:
        """Look at what the question is about and lay out its prompt.

        Args:
            visuals: those of the question, already read and resized; they are read when None.
            earlier: another question; where it shows the same, that is neither read nor looked at again.

        Raises:
            LanceError: a visual cannot be used.
        """
        if earlier is not None and not earlier.shows(question):
            earlier = None
        if earlier is not None:
            visuals = earlier.visuals
        elif visuals is None:
            visuals = prepare_visuals(question)
        sequence = build_question(question, self.tokenizer, visuals)
        context = answer_start(question, self.tokenizer, sequence)
        budget = token_budget(question, context)
        if earlier is None:
            reader = make_decoder(self.model, sequence, context, budget, Conditions(self.look(visuals)))
        else:
            reader = make_decoder(self.model, sequence, context, budget, Conditions(), earlier.reader)
        grids = tuple(PreparedVisual(vit_grid=visual.vit_grid) for visual in visuals)
        return PreparedQuestion(question, grids, reader, int(sequence.ids[context - 1]), budget)

    def answer(self, prepared: PreparedQuestion) -> Iterator[int]:
        """Yield the tokens of the answer as they come, `<|im_end|>` included where it ends one."""
        return answer_tokens(
            prepared.reader,
            prepared.question,
            prepared.first,
            prepared.budget,
            vocabulary=len(self.tokenizer),
            stop=self.tokenizer.token_id("<|im_end|>"),
        )


def load(
    path: str | Path,
    variant: Variant,
    numerics: Numerics = BFLOAT16,
    looks: bool = False,
    vit_source: ViTSource = ViTSource.LANCE,
    track: Tracker = iter,
    low_ram: bool = False,
    recipe: Recipe | None = None,
    adapters: Sequence[Adapter] = (),
) -> Pipeline:
    """Load one variant of a checkpoint, in any layout that `find_checkpoint` knows.

    Args:
        path: its folder.
        numerics: the launcher's bfloat16, or float32.
        looks: load the ViT and the VAE's encoder too, for tasks that are given pictures.
        vit_source: whose ViT weights win where two files hold them.
        track: wraps the list of tensors while they are read, as tqdm does, to show progress.
        low_ram: read the decoder layers, the ViT and the VAE from their files each time they run.
        recipe: quantize weights by this as they are read.
        adapters: what layers use besides their weights.

    Raises:
        LanceError: a file, key or tensor is missing or wrong.
    """
    checkpoint = find_checkpoint(Path(path), variant)
    checkpoint.check(numerics)
    tokenizer = LanceTokenizer(checkpoint.folder)
    if low_ram:
        # First, because it only looks at names and shapes.
        vae = stream_vae(checkpoint.vae(), numerics, looks)
    model = load_lance(checkpoint, numerics, looks, vit_source, track, low_ram, recipe)
    tokenizer.check(model.config)
    add_adapters(model, adapters)
    if not low_ram:
        vae = load_vae(checkpoint.vae(), numerics, looks)
    return Pipeline(model, vae, tokenizer, checkpoint.rgb_factors)
