"""The reference with one part of its weights in memory at a time, its passes run layer by layer, and its variants."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lance_mlx.backend.allocator import release
from parity.lance.capture_torch import TorchCapture
from parity.lance.packed import note_packed, packed_beside
from parity.lance.replay_torch import TorchReplay, look
from parity.lance.stream.parts import EMBEDDINGS, HEAD_TAPS, LAYER, head_parts
from parity.lance.stream.passes import Passes, finish_passes, note_passes, sampled
from parity.lance.variants import UNROUNDED, Variant, exact_variant, run_variant, variants_of
from parity.oracle.floors import OWN, Floors, LevelTable
from parity.tensors.recording import Recording, Replay, Tap
from reference.config import LanguageConfig
from reference.layout import Role
from reference.model import Lance, Pipeline, outline
from reference.mot import DecoderLayer, KVCache
from reference.numerics import Numerics
from reference.request import Request
from reference.weights import check_transformer, load_part, variant_folder


@dataclass(frozen=True, eq=False)
class Computed:
    """What the reference makes of a part.

    Attributes:
        taps: what is expected, in order of execution: the given values, and the reference's where there are none.
        own: the reference's, whether or not there are given ones.
    """

    taps: Recording
    own: Recording


class ReferenceStream:
    """The reference with a request, of whose weights every method reads what it needs and lets go of it.

    Args:
        given: taps that are known to be right, such as upstream's; they take the place of what is computed.

    Attributes:
        run: the request as the reference has it; its transformer holds the weights of the part at hand alone.
        variants: the equally right ways to compute that floors come from, the most exact one first, one of each family
            and of those that are drawn two.
    """

    def __init__(
        self,
        checkpoint: Path,
        variant: str,
        request: dict[str, Any],
        numerics: str,
        replay: Replay,
        given: Mapping[str, Tap],
    ) -> None:
        self._numerics, self._given = Numerics(numerics), given
        folder = variant_folder(checkpoint, variant)
        self._weights = folder / "model.safetensors"
        tokenizer, model = outline(folder, self._numerics)
        check_transformer(model, self._weights)
        pipeline = Pipeline(checkpoint, variant, tokenizer, model, nn.Module(), self._numerics, torch.device("cpu"))
        self.run = TorchReplay(pipeline, Request.from_dict(request), "kv_cache", replay)
        kinds = {(variant.family, variant.draw): variant for variant in variants_of(numerics)}
        self._packed = packed_beside(checkpoint, variant)
        packed = [UNROUNDED] if self._packed and numerics == "bfloat16" else []
        self.variants = [exact_variant(numerics), *kinds.values(), *packed]
        self._levels, self._segments, self._twins_of = LevelTable(), LevelTable(), dict[str, str]()
        self._runs = [_without_layers(self.run, each.numerics) for each in self.variants]
        for run in self._runs:
            note_packed(self._packed, run.pipeline.model)
        self._passes: Passes = {}

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return self._model.config.num_hidden_layers

    @property
    def _model(self) -> Lance:
        return self.run.pipeline.model

    @torch.inference_mode()
    def vit(self) -> np.ndarray | None:
        """The vision tower's tokens, float32 [tokens, hidden]; None where the request shows it nothing."""
        if not self.run.layout.vit_splits:
            return None
        if "vit_model0" in self._given:
            return self._given["vit_model0"].array
        with TorchCapture(self.run.pipeline, ()) as capture:
            tokens = look(self.run, capture)
        # The pipeline keeps a tower that it has loaded.
        vars(self.run.pipeline).pop("vit_model")
        return tokens.float().numpy()

    @torch.inference_mode()
    def embed(self, vit: np.ndarray | None) -> Computed:
        """Lay out and embed the request, and note the passes that it makes; no layer is run."""
        with self._loaded(*EMBEDDINGS):
            own, self._passes = note_passes(self.run, vit, self._given)
            expected = self._expected(own)

            def vary(run: TorchReplay, variant: Variant, force: Recording) -> Recording:
                return note_passes(run, vit, force)[0]

            self._measure(own, EMBEDDINGS, vary, expected)
            return Computed(expected, own)

    @torch.inference_mode()
    def run_layer(self, index: int) -> dict[str, Computed]:
        """Take every pass through a layer; returns what it makes of each call.

        Variants run on the conditional arm; the other has the same tokens at the same places.
        """
        layer, before = self._model.language_model.model.layers[index], dict(self._passes)
        own: dict[str, Recording] = {}
        caches, seen = dict[str, KVCache](), dict[str, KVCache]()
        with self._loaded(LAYER.format(index)):
            for call, each in before.items():
                seen[call] = KVCache()
                seen[call].layers = dict(caches.get(each.arm, seen[call]).layers)
                with self.run.capture(force=self._given) as capture:
                    capture.enter(call)
                    rows = layer(each.rows, each.shared(self._model, seen[call]))
                own[call], self._passes[call] = capture.recording, replace(each, rows=rows)
                if each.keep:
                    caches[each.arm] = seen[call]
                # What was freed is of other sizes than what is asked for next, and would stay beside it.
                release()
            expected = {call: self._expected(taps) for call, taps in own.items()}
            self._measure_layer(index, before, own, expected, seen)
        self._twins_of |= dict(self._twins(expected))
        return {call: Computed(taps, own[call]) for call, taps in expected.items()}

    def floors(self, names: Iterable[str], segment: bool = False) -> Floors:
        """How far the variants were from the most exact one in what has been run; see parity.oracle.floors.

        With `segment` from the given taps before each, in the same layer, instead of from all taps.
        """
        wanted = {name: self._twins_of.get(name, name) for name in names}
        table = self._segments if segment else self._levels
        found = table.floors(wanted.values(), (OWN, *(variant.name for variant in self.variants)))

        def of(table: Mapping[str, float]) -> dict[str, float]:
            return {name: table[twin] for name, twin in wanted.items() if twin in table}

        return replace(found, levels=of(found.levels), flips=of(found.flips), spreads=of(found.spreads))

    def _measure_layer(
        self,
        index: int,
        passes: Passes,
        own: Mapping[str, Recording],
        expected: Mapping[str, Recording],
        seen: Mapping[str, KVCache],
    ) -> None:
        layer = self._model.language_model.model.layers[index]
        measured = {call: each for call, each in passes.items() if each.arm == "cond"}
        right = {name: tap for call, each in measured.items() for name, tap in sampled(expected[call], each).items()}
        mine = {name: tap for call, each in measured.items() for name, tap in sampled(own[call], each).items()}

        def vary(run: TorchReplay, variant: Variant, force: Recording) -> Recording:
            model, dtype, found = run.pipeline.model, variant.numerics.torch_dtype, Recording()
            # Its name is the one that it has in the whole model.
            own_layer = _variant_layer(layer, self._model.config, index, variant)
            note_packed(self._packed, own_layer, LAYER.format(index))
            model.language_model.model.layers = nn.ModuleDict({str(index): own_layer})
            try:
                for call, each in measured.items():
                    taken, cache = each.taken(dtype), each.others(seen[call], index, dtype)
                    with run.capture(force=force) as capture:
                        capture.enter(call)
                        model.language_model.model.layers[str(index)](taken.rows, taken.shared(model, cache))
                    found |= capture.recording
            finally:
                model.language_model.model.layers = nn.ModuleList()
            return found

        self._measure(mine, (), vary, right)

    @torch.inference_mode()
    def finish(self) -> Computed:
        """Norm what the last layer put out, and make the velocity or the logits of it."""
        parts, given = head_parts(self.run.layout.answer is None), _of_head(self._given)
        with self._loaded(*parts):
            own = finish_passes(self.run, self._passes, given)
            expected = self._expected(own)

            def vary(run: TorchReplay, variant: Variant, force: Recording) -> Recording:
                return finish_passes(run, self._passes, force)

            self._measure(own, parts, vary, expected)
            return Computed(expected, own)

    def _measure(
        self,
        own: Recording,
        parts: Sequence[str],
        vary: Callable[[TorchReplay, Variant, Recording], Recording],
        expected: Recording,
    ) -> None:
        """Take how far the reference and its variants are from the most exact of them.

        They run from what is expected at every tap, and where some of that is given, from that alone: the reference is
        held against what is given over the same way.
        """
        given = {name: tap for name, tap in expected.items() if name in self._given}
        tables = [(self._levels, expected)] + [(self._segments, given)] * bool(self._given)
        centers = [Recording() for _ in tables]
        for number, (variant, run) in enumerate(zip(self.variants, self._runs, strict=True)):
            for kind, (table, force) in enumerate(tables):
                with _copied(self._model, run.pipeline.model, parts):
                    found = run_variant(variant, partial(vary, run, variant, force))
                if number:
                    table.add(number, centers[kind], found, variant)
                else:
                    centers[kind] = found
                    table.add(number, found, own)
            release()

    def _twins(self, computed: Mapping[str, Recording]) -> Iterator[tuple[str, str]]:
        """Taps of the unconditional arm, and those of the conditional one that are about the same tokens."""
        prefix = [] if self.run.layout.answer is not None else self.run.layout.prefix
        kept = [index for index, split in enumerate(prefix) if split.role is not Role.TEXT]
        for call, taps in computed.items():
            arm, _, part = call.partition(".")
            if arm == "uncond":
                part = f"prefix{kept[int(part.removeprefix('prefix'))]}" if part.startswith("prefix") else part
                yield from ((name, f"cond.{part}/{name.partition('/')[2]}") for name in taps)

    def _expected(self, own: Recording) -> Recording:
        return {name: self._given.get(name, tap) for name, tap in own.items()}

    @contextmanager
    def _loaded(self, *parts: str) -> Iterator[None]:
        with ExitStack() as stack:
            for part in parts:
                load_part(self._model, part, self._weights, self._numerics, torch.device("cpu"))
                stack.callback(self._model.get_submodule(part).to, "meta")
            yield


def _without_layers(run: TorchReplay, numerics: Numerics) -> TorchReplay:
    """The same request on a reference of other numerics, without layers or weights."""
    with torch.device("meta"):
        model = Lance(replace(run.pipeline.model.config, num_hidden_layers=0), numerics)
    return replace(run, pipeline=replace(run.pipeline, model=model, numerics=numerics))


def _variant_layer(right: DecoderLayer, config: LanguageConfig, index: int, variant: Variant) -> DecoderLayer:
    """A layer with the same weights that rounds as a variant does."""
    with torch.device("meta"):
        layer = DecoderLayer(config, index, variant.numerics)
    _share(right, layer, variant.numerics.torch_dtype)
    return layer


@contextmanager
def _copied(right: nn.Module, other: Lance, parts: Sequence[str]) -> Iterator[None]:
    """Give parts of a model the weights of another's while the context lasts, in its own dtype."""
    for part in parts:
        _share(right.get_submodule(part), other.get_submodule(part), other.language_model.numerics.torch_dtype)
    yield
    for part in parts:
        other.get_submodule(part).to("meta")


def _share(right: nn.Module, other: nn.Module, dtype: torch.dtype) -> None:
    other.load_state_dict({name: value.to(dtype) for name, value in right.state_dict().items()}, assign=True)
    other.requires_grad_(False)


def _of_head(given: Mapping[str, Tap]) -> Recording:
    return {name: given[name] for name in given if name in HEAD_TAPS}
