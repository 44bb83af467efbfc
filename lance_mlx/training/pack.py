"""Samples to be learned from: their sequence, what fills its blocks, and what is drawn for them at a step.

A pack is several samples whose losses are averaged together. Upstream lays them behind each other in one sequence in
which a sample sees itself alone (bytedance/Lance data/dataset_base_train.py:pack_sequence); here each is run by itself,
which is the same.
"""

from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from lance_mlx.config import LATENT_CHANNELS
from lance_mlx.errors import LanceError
from lance_mlx.requests.prompt_data import PROMPT_DATA
from lance_mlx.requests.request import Question, Request, Task
from lance_mlx.requests.visuals import PreparedVisual
from lance_mlx.sequence.positions import position_ids, rope_index
from lance_mlx.sequence.prompt import answer_start, build_question, build_sequence
from lance_mlx.sequence.segments import LATENT_MODES, Role, Sequence
from lance_mlx.sequence.tokenizer import LanceTokenizer

CAPTION = frozenset((Role.TEXT,))
"""What is dropped of a sample so that the model learns to draw without its text."""
VISUALS = frozenset((Role.VIT, Role.SOURCE, Role.REFERENCE))
"""The same for the pictures that it is given: what the ViT sees and the clean latents go together."""
_ANSWER = "assistant\n"
_VIDEO, _IMAGE = "video", "image"


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a pack.

    Attributes:
        sequence: its segments.
        positions: RoPE ids, int32 [3, n].
        vit: output of the ViT for each ViT block, [tokens, hidden].
        latents: float32 [t, h, w, 48] of each block of latents in order: the clean ones, then the target.
        answer: index of the first token that is learned as an answer; None where none is.

    Raises:
        LanceError: latents that do not fit their blocks, or an answer without a token before it.
    """

    sequence: Sequence
    positions: np.ndarray
    vit: tuple[mx.array, ...] = ()
    latents: tuple[mx.array, ...] = ()
    answer: int | None = None

    def __post_init__(self) -> None:
        blocks = [segment.grid for segment in self.sequence.segments if segment.is_latent]
        if blocks != [latent.shape[:3] for latent in self.latents]:
            raise LanceError(f"latents of {[latent.shape for latent in self.latents]} do not fill blocks of {blocks}")
        if self.answer is not None and not 0 < self.answer < len(self.sequence.ids):
            raise LanceError(f"an answer cannot begin at token {self.answer} of {len(self.sequence.ids)}")

    @property
    def clean(self) -> np.ndarray:
        """Which of its latents are given and not learned, bool [latents]."""
        parts = []
        for segment in self.sequence.segments:
            if segment.is_latent:
                parts.append(np.arange(len(segment) - 2) < segment.clean_tokens)
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    @property
    def labels(self) -> np.ndarray:
        """The tokens that are learned as an answer, int32 [m]; the token before each predicts it."""
        return self.sequence.ids[len(self.sequence.ids) if self.answer is None else self.answer :]

    @property
    def noised(self) -> int:
        """How many latents are learned."""
        return int((~self.clean).sum())


class Draw(NamedTuple):
    """What is drawn for a sample at a step.

    Attributes:
        time: a standard normal number, which the sigmoid makes t; all frames of a target share it.
        noise: [latents, 48], also for clean latents, which have no use for it.
    """

    time: float
    noise: mx.array


class FlowState(NamedTuple):
    """The latents of a sample on their way to noise, in the policy's dtype.

    Attributes:
        timesteps: t of each, [latents]; 0 for clean ones.
        x_t: [latents, 48].
        velocity: what is to be predicted, from data to noise, [latents, 48].
    """

    timesteps: mx.array
    x_t: mx.array
    velocity: mx.array


def draw(sample: Sample, key: mx.array, dtype: mx.Dtype) -> Draw:
    """A sample's draw of a key of MLX's generator; the noise is drawn in the policy's dtype, as upstream does."""
    time, noise = mx.random.split(key)
    shape = (len(sample.clean), LATENT_CHANNELS)
    return Draw(mx.random.normal(key=time).item(), mx.random.normal(shape, dtype, key=noise))


def flow_state(sample: Sample, drawn: Draw, shift: float, dtype: mx.Dtype) -> FlowState:
    """Noise a sample's latents (bytedance/Lance modeling/lance/lance.py:forward).

    t = sigmoid(time), moved towards noise by `shift`; x_t = (1 - t) x + t noise, every operation rounded to `dtype`,
    the time and the latents before it.
    """
    raw = mx.array(np.where(sample.clean, -np.inf, drawn.time).astype(np.float32)).astype(dtype)
    # In float64 on the host, which comes closest to PyTorch's float32.
    sigmoid = 1 / (1 + np.exp(-np.array(raw.astype(mx.float32), np.float64)))
    t = mx.array(sigmoid.astype(np.float32)).astype(dtype)
    t = shift * t / (1 + (shift - 1) * t)
    clean = mx.concatenate([latent.reshape(-1, LATENT_CHANNELS) for latent in sample.latents]).astype(dtype)
    noise = drawn.noise.astype(dtype)
    return FlowState(t, (1 - t)[:, None] * clean + t[:, None] * noise, noise - clean)


def drawing_sample(
    request: Request,
    tokenizer: LanceTokenizer,
    tokens_per_second: int,
    latents: Items[mx.array],
    visuals: Items[PreparedVisual] = (),
    vit: Items[mx.array] = (),
    dropped: Collection[Role] = (),
    as_upstream: bool = False,
) -> Sample:
    """A picture or video to be drawn.

    Args:
        request: what it is drawn for, with the target's own size.
        latents: float32 [t, h, w, 48] of each visual that is kept clean, then of the target.
        visuals, vit: the visuals of the request, and what the ViT made of each.
        dropped: roles that are left out, CAPTION and VISUALS.
        as_upstream: have images under the instruction for videos, as upstream's shipped settings train them.
    """
    instruction = None
    if as_upstream and request.task is Task.T2I:
        instruction = PROMPT_DATA["instructions"][Task.T2V].replace(_VIDEO, _IMAGE)
    whole = build_sequence(request, tokenizer, visuals, instruction)
    sequence = Sequence(tuple(segment for segment in whole.segments if segment.role not in dropped))
    blocks = [segment for segment in whole.segments if segment.mode in LATENT_MODES]
    kept = [latent for segment, latent in zip(blocks, latents, strict=True) if segment.role not in dropped]
    seen = () if Role.VIT in dropped else tuple(vit)
    return Sample(sequence, position_ids(sequence, tokens_per_second), seen, tuple(kept))


def answering_sample(
    question: Question,
    tokenizer: LanceTokenizer,
    tokens_per_second: int,
    visuals: Items[PreparedVisual],
    vit: Items[mx.array],
    as_upstream: bool = False,
) -> Sample:
    """A question whose answer is to be learned.

    Args:
        as_upstream: anchor what the ViT sees in time, as upstream does in training and not when it answers, and learn
            from the first line of the sequence that ends in "assistant", which may be one of the question.
    """
    sequence = build_question(question, tokenizer, visuals)
    if not as_upstream:
        return Sample(sequence, rope_index(sequence, tokens_per_second), tuple(vit),
                      answer=answer_start(question, tokenizer, sequence))  # fmt: skip
    line, ids = tokenizer.encode(_ANSWER), sequence.ids.tolist()
    start = next(index for index in range(len(ids)) if ids[index : index + len(line)] == line)
    return Sample(sequence, position_ids(sequence, tokens_per_second), tuple(vit), answer=start + len(line))
