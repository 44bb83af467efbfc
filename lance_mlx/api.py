"""The Python interface: `load` a checkpoint, then `generate`, `edit_again`, `answer`."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from lance_mlx.backend.allocator import release
from lance_mlx.backend.numerics import BFLOAT16, Numerics, policy
from lance_mlx.checkpoint.hub import is_repository
from lance_mlx.checkpoint.layouts import check_folder
from lance_mlx.checkpoint.recipe import Recipe, recipe_of
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.checkpoint.weights import Tracker
from lance_mlx.distributed.ranks import join
from lance_mlx.distributed.split import Split, split_velocities
from lance_mlx.errors import LanceError
from lance_mlx.estimate.tiling import AUTO, read_tiling
from lance_mlx.loaded import Loaded
from lance_mlx.media.preprocess import vae_pixels, vit_patches
from lance_mlx.outputs import Answer, Generated
from lance_mlx.pipeline import Pipeline, PreparedQuestion
from lance_mlx.requests.plain import as_enum
from lance_mlx.requests.request import Question, Request, Task, Variant, Visual, VisualKind
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.batch import go_together
from lance_mlx.sampling.flow import Step
from lance_mlx.sampling.noise import check_noise
from lance_mlx.training.adapter_files import read_adapter

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is."""
PREVIOUS_TURN = "previous turn"
"""Path of the visual of a request that goes on from what was generated before it."""


class LanceModel(Loaded):
    """A checkpoint, whose two models are loaded when a task first needs one; one is in memory at a time."""

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
        return self._draw([request], [visuals], None, _of_one(callback), noise, (), progress)[0]

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
        return self._draw(requests, visuals, None, callback, None, (), progress)

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
        return self._draw([request], [visuals], clean, _of_one(callback), noise, earlier, progress)[0]

    def _draw(
        self,
        requests: Sequence[Request],
        visuals: Sequence[Sequence[PreparedVisual]],
        clean: mx.array | None,
        callback: Callable[[list[Step]], bool | None] | None,
        noise: mx.array | None,
        earlier: tuple[Request, ...],
        progress: Progress,
    ) -> list[Generated]:
        if noise is not None:
            check_noise(sized_by_source(requests[0], visuals[0]), noise)
        looks = bool(visuals[0])
        pipeline = self.pipeline(requests[0].variant, looks)
        if looks:
            progress("looking", 0, 1)
        if clean is None:
            prepared = pipeline.prepare_batch(requests, visuals)
        else:
            prepared = [pipeline.prepare_encoded(requests[0], visuals[0], [clean])]
        if looks:
            self._looked([(each.conditions.vit, each.conditions.clean) for each in prepared])
            progress("looking", 1, 1)
        steps = pipeline.denoise_batch(prepared, noise, partial(progress, "reading"))
        first, total, started = requests[0].first_step, requests[0].num_steps, time.perf_counter()
        progress("denoising", first, total)
        for each in steps:
            done = each[0].state.index + 1
            going_on = callback is None or callback(each) is not False
            progress("denoising", done, total)
            if not going_on:
                break
        seconds = (time.perf_counter() - started) / (done - first) / len(prepared)
        # What the layers took makes room for decoding.
        release()
        stopped = done if done < total else None
        made = []
        for own, step in zip(prepared, each, strict=True):
            latents = step.x_next.reshape(*own.request.latent_grid, -1)
            given = self.numerics.name, seconds, earlier, pipeline.vae, self.made_by(own.request), stopped
            made.append(Generated(own.request, latents, *given))
        return made

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
                self._looked([rows.und for rows in earlier.reader.prefix])
                progress("looking", 1, 1)
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
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    split: Split | str = Split.OUTPUTS,
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
        lora: folders of adapters, in mlx-lm's form or peft's, and how strong each is: 1 as it was trained.
        split: where mlx.launch started several processes, what of every drawing they share: "guidance" or "rows". All
            of them must then draw the same, in the same order; "outputs" leaves each to itself.

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
    adapters = [read_adapter(Path(folder)).scaled(strength) for folder, strength in lora]
    split = as_enum(Split, "split", split)
    velocities = None if split is Split.OUTPUTS else split_velocities(split, join())
    options = variant, quiet, low_ram, keep_encoders, tiling, recipe, adapters, velocities
    return LanceModel(name, numerics, vit_source, track, *options)


def _of_one(callback: Callable[[Step], bool | None] | None) -> Callable[[list[Step]], bool | None] | None:
    return None if callback is None else lambda steps: callback(steps[0])


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
