"""What a sequence holds besides tokens, and the cached passes over the segments that hold it."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from lance_mlx.errors import LanceError
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ArmInput, ExpertRows, KVCache
from lance_mlx.model.rope import RotaryTable, rotary_table
from lance_mlx.sequence.segments import AttentionMode, Segment, Sequence


@dataclass(frozen=True, eq=False)
class Conditions:
    """The contents of the visual blocks of a sequence, in order.

    Attributes:
        vit: output of the ViT for each ViT block, [n, hidden].
        clean: given latents, [n, 48] in the policy's dtype: those of each clean block, and those of the clean frames of
            the denoised block.
    """

    vit: tuple[mx.array, ...] = ()
    clean: tuple[mx.array, ...] = ()


def embed_prefix(model: Lance, segments: Items[Segment], conditions: Conditions) -> list[ExpertRows]:
    """Input embeddings of the segments before the last one, parted by expert; clean latents are embedded at t = 0.

    Raises:
        LanceError: the contents do not fit the blocks.
    """
    vit, clean = list(conditions.vit), list(conditions.clean)
    embedded = []
    for segment in segments:
        tokens = model.language_model.model.embed_tokens
        if segment.grid is None:
            embedded.append(ExpertRows(tokens(mx.array(segment.ids)), None))
            continue
        contents = clean if segment.is_latent else vit
        content = contents.pop(0) if contents else None
        if content is None or len(content) != len(segment) - 2:
            raise LanceError(
                f"a {segment.role.name.lower()} block of {len(segment) - 2} tokens has no contents that fit"
            )
        brackets = tokens(mx.array(segment.ids[[0, -1]]))
        if segment.is_latent:
            at_zero = np.zeros(len(content), np.float32)
            latents = model.embed_latents(content, at_zero, model.latent_pos_embed(segment.grid))
            embedded.append(ExpertRows(brackets, latents))
        else:
            embedded.append(ExpertRows(mx.concatenate([brackets[:1], content, brackets[1:]]), None))
    return embedded


class GuidanceArm:
    """One reading of a sequence: its segments, their position ids and embeddings, and the cache of those read so far.

    A segment sees the earlier ones, and none before the denoised block sees it: so each is computed once.
    """

    def __init__(
        self,
        name: str,
        model: Lance,
        sequence: Sequence,
        positions: np.ndarray,
        prefix: list[ExpertRows],
        qk_float32: bool,
    ) -> None:
        """
        Args:
            name: "cond" or "uncond".
            positions: RoPE ids of the whole sequence, int32 [3, n].
            prefix: embeddings of the first segments, as many as are to be cached.
            qk_float32: norm and rotate queries and keys in float32 in passes that hold latents.
        """
        self.name = name
        self.sequence = sequence
        self.prefix = prefix
        self.qk_float32 = qk_float32
        self._model = model
        self._positions = positions
        self._cache: KVCache = ()

    def prefill(self, index: int) -> None:
        """Append segment number `index` to the cache; segments go in in order."""
        rows = self.prefix[index]
        causal = self.sequence.segments[index].mode is AttentionMode.CAUSAL
        start = self.sequence.starts[index]
        stop = start + len(rows.und) + (0 if rows.gen is None else len(rows.gen))
        self.extend(rows, self.rotary(start, stop), causal)
        mx.eval(self._cache)

    def extend(self, rows: ExpertRows, rotary: RotaryTable, causal: bool) -> ExpertRows:
        """Pass rows through the model and keep them in the cache; returns the final hidden states."""
        qk_float32 = self.qk_float32 and rows.gen is not None
        hidden, (self._cache,) = self._model.language_model.model(rows, [self.reading(rotary)], causal, qk_float32)
        return hidden

    def reading(self, rotary: RotaryTable) -> ArmInput:
        """What a pass over tokens turned so needs to know of this arm."""
        return ArmInput(rotary, self._cache)

    def rotary(self, start: int, stop: int) -> RotaryTable:
        """Rotations of the tokens from `start` to `stop` of the sequence."""
        return rotary_table(self._positions[:, start:stop], self._model.config, self._model.numerics)
