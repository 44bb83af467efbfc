"""Less memory for more time: what a layer made on the way there is made again on the way back."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ExpertRows, KeyValues, LayerInput, MoTDecoderLayer


class CheckpointedLayer(MoTDecoderLayer):
    """A layer that keeps only what it was given."""

    def __call__(
        self, x: ExpertRows, contexts: Sequence[LayerInput], causal: bool, qk_float32: bool
    ) -> tuple[ExpertRows, list[KeyValues]]:
        """As MoTDecoderLayer's."""
        run = super().__call__

        def again(parameters: dict[str, Any], rows: list[mx.array], pasts: list[list[mx.array]]) -> list[Any]:
            # What is differentiated by has to be handed in.
            self.update(parameters)
            given = [
                LayerInput(context.rotary, KeyValues(*past) if past else None)
                for context, past in zip(contexts, pasts, strict=True)
            ]
            hidden, seen = run(ExpertRows(rows[0], rows[1] if len(rows) > 1 else None), given, causal, qk_float32)
            return [[each for each in hidden if each is not None], [list(each) for each in seen]]

        rows = [each for each in x if each is not None]
        pasts = [[] if context.past is None else list(context.past) for context in contexts]
        hidden, seen = mx.checkpoint(again)(self.trainable_parameters(), rows, pasts)
        return ExpertRows(hidden[0], hidden[1] if len(hidden) > 1 else None), [KeyValues(*each) for each in seen]


def checkpoint_layers(model: Lance) -> None:
    """Let the decoder layers of a model, which are in memory, be such."""
    for layer in model.language_model.model.layers:
        # Nothing but what it does when it is called differs.
        layer.__class__ = CheckpointedLayer
