"""The Python interface: `load` a checkpoint, then `generate`, `edit_again`, `answer`."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lance_mlx.backend.allocator import release
from lance_mlx.backend.numerics import BFLOAT16, Numerics
from lance_mlx.checkpoint.hub import fetch, is_repository
from lance_mlx.checkpoint.layouts import check_folder
from lance_mlx.checkpoint.streaming import AnyVAE
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.checkpoint.weights import Tracker
from lance_mlx.media.preprocess import vae_pixels, vit_patches
from lance_mlx.media.write import VideoWriter, check_output, save_image, to_uint8
from lance_mlx.model.vae import num_decoded_frames
from lance_mlx.pipeline import Pipeline, PreparedQuestion
from lance_mlx.pipeline import load as load_pipeline
from lance_mlx.requests.request import Question, Request, Task, Variant, Visual, VisualKind
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.flow import Step
from lance_mlx.sampling.noise import check_noise

PREVIOUS_TURN = "previous turn"
"""Path of the visual of a request that goes on from what was generated before it."""


@dataclass(frozen=True, eq=False)
class Generated:
    """An image or a video: its latents, which become pixels when they are asked for.

    Attributes:
        request: the request, with the size that its source dictates.
        latents: [t, h, w, 48] in the policy's dtype, normalised.
        numerics: name of the policy.
        seconds_a_step: mean time of a denoising step.
        earlier: the requests of the turns before this one, the first one first.
        vae: what decodes the latents.
    """

    request: Request
    latents: mx.array
    numerics: str
    seconds_a_step: float
    earlier: tuple[Request, ...]
    vae: AnyVAE

    @property
    def num_frames(self) -> int:
        """Frames that the latents decode to: 4k + 1, which may be fewer than were asked for."""
        return num_decoded_frames(len(self.latents))

    @cached_property
    def frames(self) -> np.ndarray:
        """All frames, uint8 [T, H, W, 3], decoded once; raises LanceError for pixels that are not finite."""
        return np.stack(list(self.decode()))

    def decode(self) -> Iterator[np.ndarray]:
        """Yield the frames one by one, uint8 [H, W, 3], holding few at a time; raises LanceError as `frames` does."""
        if "frames" in vars(self):
            yield from self.frames
            return
        for chunk in self.vae.decode(self.latents):
            yield from to_uint8(np.array(chunk))

    @property
    def metadata(self) -> dict[str, Any]:
        """What made this, as plain JSON values; `save` writes it into the file."""
        values = {
            "generator": f"lance-mlx {version('lance-mlx')}",
            "request": self.request.to_dict(),
            "numerics": self.numerics,
        }
        return values | ({"earlier": [request.to_dict() for request in self.earlier]} if self.earlier else {})

    def save(
        self,
        path: str | os.PathLike[str],
        notes: Mapping[str, Any] | None = None,
        track: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]] = iter,
    ) -> None:
        """Write a .png of one frame, or an .mp4 of several; the file appears when it is whole.

        Args:
            notes: plain JSON values to write beside the metadata.
            track: wraps the frames while they are written, as tqdm does, to show progress.

        Raises:
            LanceError: the suffix does not fit, or the file cannot be written.
        """
        path = check_output(path, self.num_frames)
        metadata = self.metadata | dict(notes or {})
        if self.num_frames == 1:
            (frame,) = track(self.decode())
            save_image(path, frame, metadata)
            return
        with VideoWriter(path, self.request.fps, metadata) as video:
            for frame in track(self.decode()):
                video.write(frame)


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        text: without control tokens.
        tokens: what the model answered, `<|im_end|>` included where it ended the answer itself.
        raw_text: the tokens' text with control tokens written out, as upstream's prompt.json has it.
        seconds_a_token: mean time of a token, reading the question included.
    """

    question: Question
    text: str
    tokens: tuple[int, ...]
    raw_text: str
    seconds_a_token: float


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
    ) -> None:
        self.model = model
        self.numerics = numerics
        self._vit_source = vit_source
        self._variant = variant
        self._quiet = quiet
        self._track = track
        self._low_ram = low_ram
        self._keep_encoders = keep_encoders
        self._pipeline: Pipeline | None = None
        self._loaded: tuple[Variant, bool] | None = None

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
        self._pipeline = load_pipeline(path, variant, self.numerics, looks, source, track, low_ram)
        self._loaded = variant, looks
        return self._pipeline

    def release(self) -> None:
        """Let the model that is in memory go; the next task loads it again."""
        self._pipeline = self._loaded = None
        release()

    def generate(
        self,
        request: Request,
        callback: Callable[[Step], None] | None = None,
        noise: mx.array | None = None,
        visuals: Sequence[PreparedVisual] | None = None,
    ) -> Generated:
        """Make an image or a video.

        Args:
            callback: called after every denoising step.
            noise: [n, 48] to start from; drawn from the request's seed when None.
            visuals: those of the request, already read by `prepare_visuals`; they are read when None.

        Raises:
            LanceError: a visual, the noise or the checkpoint cannot be used; the first two are looked at before the
                model is read.
        """
        if visuals is None:
            visuals = prepare_visuals(request)
        return self._generate(request, visuals, None, callback, noise, ())

    def edit_again(
        self,
        generated: Generated,
        prompt: str,
        reencode: bool = False,
        callback: Callable[[Step], None] | None = None,
        noise: mx.array | None = None,
    ) -> Generated:
        """Edit what was generated, with the settings of its request.

        Its latents are the source's, so that nothing is lost between turns; the ViT looks at its pixels.

        Args:
            reencode: resize and encode its pixels instead, as if they had been read from a file.
            callback, noise: as for `generate`.

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
        return self._generate(request, visuals, clean, callback, noise, (*generated.earlier, generated.request))

    def _generate(
        self,
        request: Request,
        visuals: Sequence[PreparedVisual],
        clean: mx.array | None,
        callback: Callable[[Step], None] | None,
        noise: mx.array | None,
        earlier: tuple[Request, ...],
    ) -> Generated:
        if noise is not None:
            check_noise(sized_by_source(request, visuals), noise)
        pipeline = self.pipeline(request.variant, looks=bool(visuals))
        if clean is None:
            prepared = pipeline.prepare(request, visuals)
        else:
            prepared = pipeline.prepare_encoded(request, visuals, [clean])
        self._release_encoders(pipeline, prepared.conditions.vit, prepared.conditions.clean)
        started = time.perf_counter()
        for step in pipeline.denoise(prepared, noise):
            if callback is not None:
                callback(step)
        request = prepared.request
        seconds = (time.perf_counter() - started) / request.num_steps
        latents = step.x_next.reshape(*request.latent_grid, -1)
        return Generated(request, latents, self.numerics.name, seconds, earlier, pipeline.vae)

    def _release_encoders(self, pipeline: Pipeline, *seen: Any) -> None:
        """Free the encoders where they are not to be kept, once what they made is computed."""
        variant, looks = self._loaded
        if looks and not self._keep_encoders and not self._low_ram:
            mx.eval(*seen)
            pipeline.drop_encoders()
            self._loaded = variant, False

    def answer(self, question: Question, callback: Callable[[str], None] | None = None) -> Answer:
        """Answer a question about images or a video.

        Args:
            callback: called with each piece of text as it comes, always whole characters.

        Raises:
            LanceError: a visual or the checkpoint cannot be used; visuals are looked at before the model is read.
        """
        return next(self.answer_all([question], callback))

    def answer_all(
        self, questions: Iterable[Question], callback: Callable[[str], None] | None = None
    ) -> Iterator[Answer]:
        """Yield the answers to questions, in order; each is what `answer` gives.

        Questions that follow each other and are about the same visuals, at the same resolution and under the same
        instruction, share one reading of them.

        Args:
            callback: as for `answer`, with the text of the answer that is in progress.

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
            earlier = pipeline.prepare_question(question, visuals, earlier)
            self._release_encoders(pipeline, [rows.und for rows in earlier.reader.prefix])
            yield _answer(pipeline, earlier, callback or (lambda piece: None), started)


def load(
    model: str | os.PathLike[str],
    numerics: Numerics = BFLOAT16,
    vit_source: ViTSource = ViTSource.LANCE,
    track: Tracker = iter,
    variant: Variant | None = None,
    quiet: bool = False,
    low_ram: bool = False,
    keep_encoders: bool = True,
) -> LanceModel:
    """Open a checkpoint; its models are fetched and read when a task first needs one.

    Args:
        model: the folder that holds Lance_3B, Lance_3B_Video, the ViT and the VAE, or one of the first two; a converted
            checkpoint or one of mlx-community; or a repository on the hub with any of these, as OWNER/NAME.
        numerics: the launcher's bfloat16, or float32.
        vit_source: whose ViT weights win where two files hold them.
        track: wraps the list of tensors while they are read, as tqdm does, to show progress.
        variant: use this model for every task; by default each task has the one that was trained for it.
        quiet: show no progress of fetching.
        low_ram: hold one decoder layer in memory at a time, and the ViT and the VAE only while they are used; every
            pass reads the layers from their files, so that it takes longer. What is drawn is the same bit for bit,
            logits of answers but for the order of sums.
        keep_encoders: keep the ViT and the VAE's encoder for the next request. Without, they make room before
            denoising or answering begins, and a later request that looks at something reads the model again.

    Raises:
        LanceError: there is no such folder.
    """
    name = os.fspath(model)
    if not is_repository(name):
        check_folder(Path(name))
    return LanceModel(name, numerics, vit_source, track, variant, quiet, low_ram, keep_encoders)


def next_turn(request: Request, prompt: str) -> Request:
    """The request that edits what `request` makes; raises LanceError for a prompt that cannot be used."""
    task, kind = Task.IMAGE_EDIT, VisualKind.IMAGE
    if request.makes_video:
        task, kind = Task.VIDEO_EDIT, VisualKind.VIDEO
    visuals = (Visual(PREVIOUS_TURN, kind),)
    return replace(request, task=task, prompt=prompt, visuals=visuals, vision_type=None, text_template=True)


def _answer(pipeline: Pipeline, prepared: PreparedQuestion, callback: Callable[[str], None], started: float) -> Answer:
    tokens, told = [], ""
    completed = pipeline.tokenizer.stream()
    for token in pipeline.answer(prepared):
        tokens.append(token)
        piece = completed(token)
        if piece:
            told += piece
            callback(piece)
    text = pipeline.tokenizer.decode(tokens)
    # An answer that is cut off inside a character ends in a replacement character.
    if text.startswith(told) and text != told:
        callback(text[len(told) :])
    seconds = (time.perf_counter() - started) / len(tokens)
    raw_text = pipeline.tokenizer.decode(tokens, control_tokens=True)
    return Answer(prepared.question, text, tuple(tokens), raw_text, seconds)
