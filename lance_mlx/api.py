"""The Python interface: `load` a checkpoint, then `generate`, `edit_again`, `answer`."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lance_mlx.backend.allocator import release
from lance_mlx.backend.numerics import BFLOAT16, Numerics, policy, runs_on_cpu
from lance_mlx.checkpoint.hub import fetch, is_repository
from lance_mlx.checkpoint.layouts import check_folder, find_checkpoint
from lance_mlx.checkpoint.recipe import Recipe, recipe_of
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.checkpoint.weights import Tracker
from lance_mlx.errors import LanceError
from lance_mlx.estimate.estimate import coders_of, sizes_of
from lance_mlx.estimate.machine import budget
from lance_mlx.estimate.tiling import AUTO, NONE, fixed_tiles, read_tiling, tile_chooser
from lance_mlx.media.preprocess import vae_pixels, vit_patches
from lance_mlx.outputs import Answer, Generated
from lance_mlx.pipeline import Pipeline, Prepared, PreparedQuestion
from lance_mlx.pipeline import load as load_pipeline
from lance_mlx.requests.plain import as_enum
from lance_mlx.requests.request import Question, Request, Task, Variant, Visual, VisualKind
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.batch import go_together
from lance_mlx.sampling.flow import Step
from lance_mlx.sampling.noise import check_noise

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is."""
PREVIOUS_TURN = "previous turn"
"""Path of the visual of a request that goes on from what was generated before it."""


class LanceModel:
    """A checkpoint, whose two models are loaded when a task first needs one; one is in memory at a time."""

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
        self._pipeline: Pipeline | None = None
        self._loaded: tuple[Variant, bool] | None = None

    def __repr__(self) -> str:
        return f"LanceModel({self.model!r}, {self.numerics.name})"

    @property
    def name(self) -> str:
        """What the model is called: its repository, or its folder without the way there."""
        return self.model if is_repository(self.model) else Path(self.model).resolve().name

    def variant_for(self, request: Request | Question) -> Variant:
        """The model that is used for a request."""
        return self._variant or request.variant

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
        self._pipeline = load_pipeline(path, variant, self.numerics, looks, source, track, low_ram, self.recipe)
        self._loaded = variant, looks
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

    def generate(
        self,
        request: Request,
        callback: Callable[[Step], bool | None] | None = None,
        noise: mx.array | None = None,
        visuals: Sequence[PreparedVisual] | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> Generated:
        """Make an image or a video.

        Args:
            callback: called after every denoising step; False ends the generation there, with latents that still hold
                noise.
            noise: [n, 48] to start from; drawn from the request's seed when None.
            visuals: those of the request, already read by `prepare_visuals`; they are read when None.
            progress: called with "looking", "reading" or "denoising", how much of that is done, and how much there is.

        Raises:
            LanceError: a visual, the noise or the checkpoint cannot be used; the first two are looked at before the
                model is read.
        """
        if visuals is None:
            visuals = prepare_visuals(request)
        return self._generate(request, visuals, None, callback, noise, (), progress)

    def generate_batch(
        self,
        requests: Sequence[Request],
        callback: Callable[[list[Step]], bool | None] | None = None,
        visuals: Sequence[Sequence[PreparedVisual]] | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> list[Generated]:
        """Make several images or videos side by side, which takes less time where they are small.

        Each is what `generate` makes of its request, but for the order of sums.

        Args:
            requests: they may differ in prompts, seeds and visuals alone; no task i2v.
            callback: called after every denoising step with those of all; False ends the generation there.
            visuals: those of each request; they are read when None.
            progress: as for `generate`.

        Raises:
            LanceError: as `generate`, and for requests that differ in more.
        """
        if visuals is None:
            visuals = [prepare_visuals(request) for request in requests]
        sized = [sized_by_source(*given) for given in zip(requests, visuals, strict=True)]
        if not all(go_together(sized[0], other) for other in sized[1:]):
            raise LanceError("a batch is of one size and one set of options, and not of task i2v: draw one by one")
        pipeline = self.pipeline(requests[0].variant, looks=bool(visuals[0]))
        if visuals[0]:
            progress("looking", 0, 1)
        prepared = pipeline.prepare_batch(requests, visuals)
        if visuals[0]:
            self._looked(pipeline, progress, [(each.conditions.vit, each.conditions.clean) for each in prepared])
        steps = pipeline.denoise_batch(prepared, partial(progress, "reading"))
        return self._sample(pipeline, prepared, steps, callback, (), progress)

    def edit_again(
        self,
        generated: Generated,
        prompt: str,
        reencode: bool = False,
        callback: Callable[[Step], bool | None] | None = None,
        noise: mx.array | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> Generated:
        """Edit what was generated, with the settings of its request.

        Its latents are the source's, so that nothing is lost between turns; the ViT looks at its pixels.

        Args:
            reencode: resize and encode its pixels instead, as if they had been read from a file.
            callback, noise, progress: as for `generate`.

        Raises:
            LanceError: the prompt or the noise cannot be used.
        """
        request = next_turn(generated.request, prompt)
        patches, grid = vit_patches(generated.frames, request.vit_resolution)
        if reencode:
            pixels, clean = vae_pixels(generated.frames, request.vae_resolution), None
        else:
            pixels, clean = generated.frames.astype(np.float32) / 127.5 - 1, generated.latents
        visuals = [PreparedVisual(patches, grid, pixels)]
        earlier = (*generated.earlier, generated.request)
        return self._generate(request, visuals, clean, callback, noise, earlier, progress)

    def _generate(
        self,
        request: Request,
        visuals: Sequence[PreparedVisual],
        clean: mx.array | None,
        callback: Callable[[Step], bool | None] | None,
        noise: mx.array | None,
        earlier: tuple[Request, ...],
        progress: Progress,
    ) -> Generated:
        if noise is not None:
            check_noise(sized_by_source(request, visuals), noise)
        pipeline = self.pipeline(request.variant, looks=bool(visuals))
        if visuals:
            progress("looking", 0, 1)
        if clean is None:
            prepared = pipeline.prepare(request, visuals)
        else:
            prepared = pipeline.prepare_encoded(request, visuals, [clean])
        if visuals:
            self._looked(pipeline, progress, prepared.conditions.vit, prepared.conditions.clean)
        steps = ([step] for step in pipeline.denoise(prepared, noise, partial(progress, "reading")))
        told = None if callback is None else lambda steps: callback(steps[0])
        return self._sample(pipeline, [prepared], steps, told, earlier, progress)[0]

    def _sample(
        self,
        pipeline: Pipeline,
        prepared: Sequence[Prepared],
        steps: Iterable[list[Step]],
        callback: Callable[[list[Step]], bool | None] | None,
        earlier: tuple[Request, ...],
        progress: Progress,
    ) -> list[Generated]:
        total, started = prepared[0].request.num_steps, time.perf_counter()
        progress("denoising", 0, total)
        for each in steps:
            done = each[0].state.index + 1
            going_on = callback is None or callback(each) is not False
            progress("denoising", done, total)
            if not going_on:
                break
        seconds = (time.perf_counter() - started) / done / len(prepared)
        # What the layers took makes room for decoding.
        release()
        stopped = done if done < total else None
        made = []
        for own, step in zip(prepared, each, strict=True):
            latents = step.x_next.reshape(*own.request.latent_grid, -1)
            weights = self.name, self.variant_for(own.request)
            recipe = self.recipe and self.recipe.name
            given = self.numerics.name, seconds, earlier, pipeline.vae, weights, stopped, recipe
            made.append(Generated(own.request, latents, *given))
        return made

    def _looked(self, pipeline: Pipeline, progress: Progress, *seen: Any) -> None:
        """Compute what the encoders made, and free them where they are not to be kept."""
        mx.eval(*seen)
        progress("looking", 1, 1)
        variant, looks = self._loaded
        if looks and not self._keep_encoders and not self._low_ram:
            pipeline.drop_encoders()
            self._loaded = variant, False
        release()

    def answer(
        self,
        question: Question,
        callback: Callable[[str], bool | None] | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> Answer:
        """Answer a question about images or a video.

        Args:
            callback: called with each piece of text as it comes, always whole characters; False ends the answer there.
            progress: as for `generate`.

        Raises:
            LanceError: a visual or the checkpoint cannot be used; visuals are looked at before the model is read.
        """
        return next(self.answer_all([question], callback, progress))

    def answer_all(
        self,
        questions: Iterable[Question],
        callback: Callable[[str], bool | None] | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> Iterator[Answer]:
        """Yield the answers to questions, in order; each is what `answer` gives.

        Questions that follow each other and are about the same visuals, at the same resolution and under the same
        instruction, share one reading of them.

        Args:
            callback: as for `answer`, with the text of the answer that is in progress.
            progress: as for `generate`.

        Raises:
            LanceError: as `answer`.
        """
        earlier: PreparedQuestion | None = None
        for question in questions:
            visuals = None
            if earlier is None or not earlier.shows(question):
                earlier, visuals = None, prepare_visuals(question)
            pipeline = self.pipeline(question.variant, looks=True)
            started = time.perf_counter()
            if not self._low_ram:
                pipeline.join_projections()
            if visuals:
                progress("looking", 0, 1)
            earlier = pipeline.prepare_question(question, visuals, earlier)
            if visuals:
                self._looked(pipeline, progress, [rows.und for rows in earlier.reader.prefix])
            earlier.reader.read(partial(progress, "reading"))
            yield _answer(pipeline, earlier, callback or (lambda piece: None), time.perf_counter() - started)


def load(
    model: str | os.PathLike[str],
    numerics: Numerics | str = BFLOAT16,
    vit_source: ViTSource | str = ViTSource.LANCE,
    track: Tracker = iter,
    variant: Variant | str | None = None,
    quiet: bool = False,
    low_ram: bool = False,
    keep_encoders: bool = True,
    vae_tiling: str | int = AUTO,
    quantize: int | str | Recipe | None = None,
) -> LanceModel:
    """Open a checkpoint; its models are fetched and read when a task first needs one.

    Args:
        model: the folder that holds Lance_3B, Lance_3B_Video, the ViT and the VAE, or one of the first two; a converted
            checkpoint or one of mlx-community; or a repository on the hub with any of these, as OWNER/NAME.
        numerics: the launcher's bfloat16, or float32; or the name of one.
        vit_source: whose ViT weights win where two files hold them.
        track: wraps the list of tensors while they are read, as tqdm does, to show progress.
        variant: use this model ("image" or "video" will do) for every task; by default each task has the one that was
            trained for it.
        quiet: show no progress of fetching.
        low_ram: hold one decoder layer in memory at a time, and the ViT and the VAE only while they are used; every
            pass reads the layers from their files, so that it takes longer. What is drawn is the same bit for bit,
            logits of answers but for the order of sums.
        keep_encoders: keep the ViT and the VAE's encoder for the next request. Without, they make room before
            denoising or answering begins, and a later request that looks at something reads the model again.
        vae_tiling: code frames in tiles of so many pixels a side, which differ from the whole by less than 0.001 of
            pixels in [-1, 1] on random weights; "auto" does so where the whole does not fit into memory by estimate,
            "none" never.
        quantize: pack the weights while they are read: 3, 4, 5, 6 or 8 bits of both towers' attention and MLP, a recipe
            ("8bit", "small"), or the JSON file of one. Not with `low_ram`, which reads a checkpoint that is quantized.

    Raises:
        LanceError: there is no such folder, an option is unknown, or two contradict each other.
    """
    name = os.fspath(model)
    numerics = policy(numerics) if isinstance(numerics, str) else numerics
    vit_source = as_enum(ViTSource, "vit_source", vit_source)
    variant = None if variant is None else as_enum(Variant, "variant", variant)
    if not is_repository(name):
        check_folder(Path(name))
    tiling = read_tiling(vae_tiling)
    recipe = quantize
    if quantize is not None and not isinstance(quantize, Recipe):
        recipe = recipe_of(bits=quantize) if isinstance(quantize, int) else recipe_of(predicate=quantize)
    if recipe is not None and low_ram:
        raise LanceError("low_ram would quantize every layer anew in every pass: convert the checkpoint with -q first")
    return LanceModel(name, numerics, vit_source, track, variant, quiet, low_ram, keep_encoders, tiling, recipe)


def next_turn(request: Request, prompt: str) -> Request:
    """The request that edits what `request` makes; raises LanceError for a prompt that cannot be used."""
    task, kind = Task.IMAGE_EDIT, VisualKind.IMAGE
    if request.makes_video:
        task, kind = Task.VIDEO_EDIT, VisualKind.VIDEO
    visuals = (Visual(PREVIOUS_TURN, kind),)
    return replace(request, task=task, prompt=prompt, visuals=visuals, vision_type=None, text_template=True)


def _answer(
    pipeline: Pipeline, prepared: PreparedQuestion, callback: Callable[[str], bool | None], seconds_reading: float
) -> Answer:
    started = time.perf_counter()
    tokens, told = [], ""
    completed = pipeline.tokenizer.stream()
    for token in pipeline.answer(prepared):
        tokens.append(token)
        piece = completed(token)
        if piece:
            told += piece
            if callback(piece) is False:
                break
    text = pipeline.tokenizer.decode(tokens)
    # An answer that is cut off inside a character ends in a replacement character.
    if text.startswith(told) and text != told:
        callback(text[len(told) :])
    seconds = (time.perf_counter() - started) / len(tokens)
    raw_text = pipeline.tokenizer.decode(tokens, control_tokens=True)
    return Answer(prepared.question, text, tuple(tokens), raw_text, seconds_reading, seconds)
