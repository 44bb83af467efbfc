"""lance_mlx with one part of its weights in memory at a time, its passes run layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import lance_mlx.sampling.flow as flow
from lance_mlx.backend.numerics import policy
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.streaming import Streamed, below
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.checkpoint.weights import inspect_lance
from lance_mlx.model.mot import ArmInput, ExpertRows, KeyValues, KVCache, LayerInput, MoTModel
from lance_mlx.model.rope import RotaryTable
from lance_mlx.pipeline import Pipeline
from lance_mlx.requests.request import Question, Variant
from lance_mlx.requests.visuals import PreparedVisual
from lance_mlx.sequence.tokenizer import LanceTokenizer
from parity.lance.boundaries_mlx import MlxBoundaries
from parity.lance.capture_mlx import MlxCapture
from parity.lance.faults import Target
from parity.lance.faults.base import parameter
from parity.lance.packed import run_folder
from parity.lance.replay_mlx import request_from_bundle
from parity.lance.stream.parts import GUIDED, HEAD_TAPS, Except
from parity.tensors.recording import ExactInputs, Observed, Recording, Tap

_LATER = Except(HEAD_TAPS)


@dataclass(frozen=True, eq=False)
class MlxPass:
    """A pass over one segment, between two layers: its rows so far, and what every layer is given beside them."""

    call: str
    rows: ExpertRows
    rotary: RotaryTable
    causal: bool
    qk_float32: bool

    @property
    def arm(self) -> str:
        """The arm whose cache the pass reads."""
        return self.call.partition(".")[0]


Passes = dict[str, MlxPass]
"""The passes by their calls, in the order of a run: an arm's prefix before its last block."""


class MlxStream:
    """lance_mlx with a request, opened but unread; every method reads what it needs and lets go of it.

    Attributes:
        target: what a fault may break for a while.
    """

    def __init__(self, checkpoint: Path, variant: str, request: dict[str, Any], numerics: str) -> None:
        files = find_checkpoint(run_folder(checkpoint, variant), Variant(variant))
        architecture = inspect_lance(files, False, ViTSource.LANCE)
        self._model = architecture.build(policy(numerics))
        self._tensors = architecture.parts[0].tensors
        tokenizer = LanceTokenizer(files.folder)
        tokenizer.check(self._model.config)
        self._pipeline = Pipeline(self._model, nn.Module(), tokenizer)
        self._asked = request_from_bundle(request, "kv_cache")
        self.target = Target(self._pipeline)

    def embed(
        self,
        noise: np.ndarray | None,
        grids: tuple[tuple[int, int, int], ...],
        vit: np.ndarray | None,
        force: Mapping[str, Tap] | None = None,
        exact: ExactInputs | None = None,
    ) -> tuple[Observed, Passes]:
        """Lay out and embed the request, with the embeddings loaded; no layer is run.

        Args:
            noise: float32 [latents, 48] that is drawn from, None for questions.
            grids: (t, h, w) in patches of what the ViT saw.
            vit: its tokens, float32 [tokens, hidden], or None.
        """
        passes: Passes = {}

        def note(
            model: MoTModel,
            rows: ExpertRows,
            readings: Sequence[ArmInput],
            causal: bool,
            qk_float32: bool,
            keep: bool = True,
        ) -> tuple[ExpertRows, list[KVCache]]:
            for call, own, reading in zip(capture.calls, rows.split_arms(len(readings)), readings, strict=True):
                passes[call] = MlxPass(call, own, reading.rotary, causal, qk_float32)
            return rows, [reading.cache for reading in readings]

        with (
            patch.object(MoTModel, "__call__", note),
            MlxCapture(self._pipeline, _LATER, force) as capture,
            MlxBoundaries(capture, exact) as boundaries,
        ):
            if isinstance(self._asked, Question):
                self._read(grids, vit)
            else:
                self._start(noise, capture, boundaries)
            recording = capture.recording
            mx.eval([tuple(x for x in each.rows if x is not None) for each in passes.values()])
        return Observed(recording, boundaries.computed, boundaries.failures), passes

    def _start(self, noise: np.ndarray, capture: MlxCapture, boundaries: MlxBoundaries) -> None:
        prepared = self._pipeline.prepare_encoded(self._asked, (), ())
        boundaries.num_steps = prepared.request.num_steps
        drawn = mx.array(noise).astype(self._model.numerics.dtype)
        capture.keep("sampler.noise", drawn)
        # The layers and what follows them are left out, so the velocity means nothing.
        next(self._pipeline.denoise(prepared, drawn))

    def _read(self, grids: tuple[tuple[int, int, int], ...], vit: np.ndarray) -> None:
        visuals = [PreparedVisual(vit_grid=grid) for grid in grids]
        ends = np.cumsum([int(np.prod(visual.vit_cells)) for visual in visuals]).tolist()
        tokens = mx.split(mx.array(vit).astype(self._model.numerics.dtype), ends[:-1])
        with patch.object(self._pipeline, "look", lambda visuals: tuple(tokens)):
            prepared = self._pipeline.prepare_question(self._asked, visuals)
            prepared.reader.read()
            prepared.reader.decode(0, mx.array(prepared.first))

    def run_layer(
        self, index: int, passes: Passes, force: Mapping[str, Tap] | None = None
    ) -> Iterator[tuple[str, Recording]]:
        """Take every pass through a loaded layer, in place; yields its call and its taps."""
        layer, seen = self._model.language_model.model.layers[index], dict[str, KeyValues]()
        for call, each in passes.items():
            with MlxCapture(self._pipeline, force=force) as capture:
                capture.enter(call)
                context = LayerInput(each.rotary, seen.get(each.arm))
                rows, (kv,) = layer(each.rows, [context], each.causal, each.qk_float32)
                recording = capture.recording
                mx.eval([x for x in (*rows, *kv) if x is not None])
            if ".step" not in call:
                seen[each.arm] = kv
            passes[call] = replace(each, rows=rows)
            yield call, recording

    def finish(self, passes: Passes, force: Mapping[str, Tap] | None = None) -> Recording:
        """Norm what the last layer put out, and make the velocity or the logits of it; what that takes is loaded."""
        language_model, taken, velocities = self._model.language_model, Recording(), {}
        with parameter(language_model.model, "layers", []):
            for call, each in passes.items():
                with MlxCapture(self._pipeline, HEAD_TAPS, _without_inputs(force)) as capture:
                    capture.enter(call)
                    readings = [ArmInput(each.rotary, ())]
                    hidden, _ = language_model.model(each.rows, readings, each.causal, each.qk_float32)
                    if ".step" in call:
                        velocities[each.arm] = self._model.llm2vae(hidden.interleave())[1:-1]
                    elif ".decode" in call:
                        language_model.lm_head(hidden.und)
                    taken |= capture.recording
            if len(velocities) == 2:
                guided = flow.guided_velocity(velocities["cond"], velocities["uncond"], self._asked)
                with MlxCapture(self._pipeline) as capture:
                    capture.keep(GUIDED, guided)
                    taken |= capture.recording
        return taken

    @contextmanager
    def loaded(self, *parts: str) -> Iterator[None]:
        """Keep the weights of some parts while the context lasts."""
        dtype = self._model.numerics.dtype
        with ExitStack() as stack:
            for part in parts:
                own = Streamed(self._module(part), below(self._tensors, f"{part}."), dtype)
                stack.enter_context(own.loaded())
            yield

    def _module(self, path: str) -> nn.Module:
        return dict(self._model.named_modules())[path]


def _without_inputs(force: Mapping[str, Tap] | None) -> Mapping[str, Tap] | None:
    """What may be forced after the last layer."""
    return force and {name: force[name] for name in force if name in HEAD_TAPS}
