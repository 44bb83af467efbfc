"""The VAE in tiles of a frame, for sizes that do not fit into memory: in space only, since time is a stream already.

The attention in the middle sees every cell of a frame, so that coders which are cut as a whole are wrong everywhere.
Here the middle stays whole, and what is around it is cut, which is where the memory goes: that is convolutions, whose
error falls with the distance to the cut. Neighbours share `OVERLAP` cells, and fade into each other in the middle of
these; what is nearer to a cut is left out.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from lance_mlx.model.vae_decoder import Decoder
from lance_mlx.model.vae_encoder import Encoder
from lance_mlx.model.vae_layers import StreamState

OVERLAP = 16
"""Cells that neighbours share."""
RAMP = 4
"""Cells over which one fades into the other, linearly."""
SMALLEST = 24
"""Cells of the smallest tile, a third of which still are its own."""


class Span(NamedTuple):
    """Rows or columns of a tile, in cells, and the middles of its overlaps at both ends, infinite where it has none."""

    start: int
    stop: int
    fades_in: float
    fades_out: float

    def weights(self, scale: int) -> np.ndarray:
        """How much each of its rows or columns counts, `scale` of them a cell: float32, with its neighbours' 1."""
        places = (np.arange(self.start * scale, self.stop * scale) + 0.5) / scale
        risen, fallen = (np.clip((places - middle) / RAMP + 0.5, 0, 1) for middle in (self.fades_in, self.fades_out))
        return (risen - fallen).astype(np.float32)


def spans(size: int, tile: int) -> list[Span]:
    """The tiles along a side of `size` cells: as few as can be of at most `tile` cells, all of one length."""
    count = max(1, -(-(size - OVERLAP) // (tile - OVERLAP)))
    length = -(-(size + (count - 1) * OVERLAP) // count)
    starts = [index * (size - length) // max(1, count - 1) for index in range(count)]
    middles = [(before + length + start) / 2 for before, start in zip(starts[:-1], starts[1:], strict=True)]
    fades = [-np.inf, *middles, np.inf]
    return [Span(start, start + length, *fades[index : index + 2]) for index, start in enumerate(starts)]


class Tiles:
    """The tiles, none longer than `tile` cells along either side, of frames of rows and columns of cells.

    One goes through all chunks of frames before the next one begins, so that a stream's memory of one tile exists at a
    time, and what is made of the whole beside it.
    """

    def __init__(self, rows: int, columns: int, tile: int) -> None:
        self._size = rows, columns
        self._tiles = [(row, column) for row in spans(rows, tile) for column in spans(columns, tile)]

    def decode(self, decoder: Decoder, chunks: Iterable[mx.array]) -> Iterator[mx.array]:
        """What the decoder would make of the chunks of a stream, one by one, but for what is near to cuts."""
        state, mixed = StreamState(), []
        for chunk in chunks:
            mixed.append(decoder.mix(chunk, state))
            mx.eval(mixed, list(state.past.values()))
        yield from self._blended(decoder.widen, lambda: mixed)

    def encode(self, encoder: Encoder, chunks: Callable[[], Iterable[mx.array]]) -> Iterator[mx.array]:
        """What the encoder would make of a stream's chunks, for which each tile asks, but for what is near to cuts."""
        state = StreamState()
        for chunk in self._blended(encoder.narrow, chunks):
            yield encoder.mix(chunk, state)
            mx.eval(list(state.past.values()))

    def _blended(
        self, run: Callable[[mx.array, StreamState], mx.array], chunks: Callable[[], Iterable[mx.array]]
    ) -> list[mx.array]:
        """What `run` makes of chunks [t, h, w, c] in tiles, blended in float32, in their dtype."""
        blended: list[mx.array] = []
        for row, column in self._tiles:
            state = StreamState()
            for index, x in enumerate(chunks()):
                scale = x.shape[1] // self._size[0]
                y = run(x[:, row.start * scale : row.stop * scale, column.start * scale : column.stop * scale], state)
                state.first_chunk = False
                scale = y.shape[1] // (row.stop - row.start)
                if index == len(blended):
                    blended.append(mx.zeros((len(y), *(side * scale for side in self._size), y.shape[-1])))
                weights = mx.array(np.outer(row.weights(scale), column.weights(scale))[..., None])
                place = np.s_[:, row.start * scale : row.stop * scale, column.start * scale : column.stop * scale]
                blended[index][place] += weights * y
                mx.eval(blended[index], list(state.past.values()))
        return [whole.astype(y.dtype) for whole in blended]
