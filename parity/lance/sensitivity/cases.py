"""What sensitivity is measured on: requests and bundles, run whole on a loaded lance_mlx."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lance_mlx.pipeline import Pipeline
from lance_mlx.requests.request import Question, Request, Task
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals
from parity.bundle.reading import read_bundle
from parity.errors import ParityError, one_line
from parity.lance.given import replay_of
from parity.lance.replay_mlx import request_from_bundle, visuals_of
from parity.tensors.recording import Replay


@dataclass(frozen=True, eq=False)
class Case:
    """One request.

    Attributes:
        replay: what a bundle gives it; None for a request of its own, which draws from its seed.
    """

    name: str
    request: Request | Question
    replay: Replay | None = None

    def visuals(self) -> Sequence[PreparedVisual]:
        """Those that the request refers to."""
        return prepare_visuals(self.request) if self.replay is None else visuals_of(self.replay, self.request)


@dataclass(frozen=True, eq=False)
class Ran:
    """What a run computed.

    Attributes:
        velocities: of every step, float32 [latents, 48]; empty for an answer.
        latents: the final ones, float32.
        tokens: of an answer.
        log_probabilities: of an answer's tokens, float64 [tokens, vocabulary].
    """

    velocities: tuple[np.ndarray, ...] = ()
    latents: np.ndarray | None = None
    tokens: tuple[int, ...] = ()
    log_probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Effect:
    """What a change of weights did to a run.

    Attributes:
        cost: what adds up over independent changes: the squared relative error of the final latents, or the mean KL
            divergence of an answer's tokens in nats.
        steps: relative error of the velocity of every step, or KL divergence of every token.
    """

    cost: float
    steps: tuple[float, ...]


def run(case: Case, pipeline: Pipeline, tokens: Sequence[int] | None = None) -> Ran:
    """Run a request whole; an answer goes on with the given tokens in the place of its own."""
    visuals = case.visuals()
    if isinstance(case.request, Question):
        return _answer(case.request, visuals, pipeline, tokens)
    if case.replay is None:
        prepared, noise = pipeline.prepare(case.request, visuals), None
    else:
        replay, clean = case.replay, []
        for pixels, eps in list(zip(replay.vae_pixels, replay.eps, strict=False))[: len(visuals)]:
            statistics = pipeline.vae.encode(pixels.transpose(1, 2, 3, 0))
            clean.append(statistics.sample(mx.array(eps[0].transpose(1, 2, 3, 0))))
        prepared = pipeline.prepare_encoded(case.request, visuals, clean)
        given = sum(map(len, prepared.conditions.clean)) if case.request.task is not Task.I2V else 0
        noise = mx.array(np.asarray(replay.noise, np.float32)).astype(pipeline.model.numerics.dtype)[given:]
    velocities, latents = [], None
    for step in pipeline.denoise(prepared, noise):
        velocities.append(_float32(step.velocity))
        latents = _float32(step.x_next)
    return Ran(tuple(velocities), latents)


def _answer(
    question: Question, visuals: Sequence[PreparedVisual], pipeline: Pipeline, tokens: Sequence[int] | None
) -> Ran:
    prepared = pipeline.prepare_question(question, visuals)
    prepared.reader.read()
    size, stop = len(pipeline.tokenizer), pipeline.tokenizer.token_id("<|im_end|>")
    found, rows, token = [], [], prepared.first
    for index in range(min(prepared.budget, question.max_new_tokens) if tokens is None else len(tokens)):
        logits = np.array(prepared.reader.decode(index, mx.array(token))[:size].astype(mx.float32), np.float64)
        logits -= logits.max()
        rows.append(logits - np.log(np.exp(logits).sum()))
        token = int(logits.argmax()) if tokens is None else tokens[index]
        found.append(token)
        if tokens is None and token == stop:
            break
    return Ran(tokens=tuple(found), log_probabilities=np.array(rows))


def effect(expected: Ran, got: Ran) -> Effect:
    """What a run of the same request with other weights differs in; of an answer, with the same tokens."""
    if expected.latents is not None:
        steps = tuple(relative(*pair) for pair in zip(expected.velocities, got.velocities, strict=True))
        return Effect(relative(expected.latents, got.latents) ** 2, steps)
    p, q = expected.log_probabilities, got.log_probabilities
    divergences = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
    return Effect(float(divergences.mean()), tuple(divergences.tolist()))


def relative(expected: np.ndarray, got: np.ndarray) -> float:
    """Relative L2 error."""
    return float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0))


def _float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


@dataclass(frozen=True)
class Inputs:
    """Cases that one model runs.

    Attributes:
        model: the folder of its checkpoint.
        variant: the folder's name in the official layout.
        dtype: the policy's name.
    """

    cases: tuple[Case, ...]
    model: Path
    variant: str
    dtype: str


def read_inputs(paths: Sequence[Path], model: Path | None, numerics: str | None) -> Inputs:
    """Read bundles, and JSON files of requests: each a list of objects with the keys of lance_mlx.Request or Question.

    Raises ParityError for what cannot be read, and for inputs that no one model and policy runs.
    """
    cases, models, dtypes = [], [], []
    for path in paths:
        if path.is_dir():
            bundle = read_bundle(path)
            with one_line(f"mlx cannot run bundle {bundle.name}"):
                asked = request_from_bundle(bundle.request, bundle.entry)
            cases.append(Case(bundle.name, asked, replay_of(bundle)))
            models.append(bundle.checkpoint)
            dtypes.append(bundle.dtype)
        else:
            cases += _requests(path)
    names = [case.name for case in cases]
    if not cases:
        raise ParityError("there is nothing to run: name bundles, or JSON files with a list of requests")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ParityError(f"{repeated} is given twice")
    models = {path.resolve() for path in ([model] if model else models)}
    dtypes = {numerics} if numerics else set(dtypes) or {"bfloat16"}
    variants = {case.request.variant.value for case in cases}
    for what, held, remedy in (
        ("checkpoints", models, "name one with --model"),
        ("numerics", dtypes, "name one with --numerics"),
        ("variants of the model", variants, "measure images and videos one after the other"),
    ):
        if len(held) != 1:
            listed = ", ".join(sorted(map(str, held))) or "none"
            raise ParityError(f"the inputs need one of the {what}, and have {listed}: {remedy}")
    return Inputs(tuple(cases), models.pop(), variants.pop(), dtypes.pop())


def _requests(path: Path) -> list[Case]:
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParityError(f"{path} is neither a bundle nor a JSON file of requests ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ParityError(f"{path} must hold a list of requests, each an object with a task")
    cases = []
    for number, entry in enumerate(entries):
        with one_line(f"request {number} of {path}"):
            task = str(entry.get("task", ""))
            kind = Question if task in list(Task) and Task(task).answers else Request
            cases.append(Case(f"{path.stem} {number}", kind.from_dict(entry)))
    return cases
