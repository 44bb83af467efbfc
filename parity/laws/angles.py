"""Frequencies and positions read from the angles of a rotation."""

from dataclasses import dataclass

import numpy as np

# Angles are read of so many rows, against so many frequencies or positions.
ROWS, GRID = 256, 4096


@dataclass(frozen=True)
class Read:
    """A table of rotations, complex [n, f], and how much each weighs [n, f]."""

    table: np.ndarray
    weight: np.ndarray


def read_speeds(read: Read, positions: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The frequency [f] of every pair, by which its angles rise from 0 with its positions [n, f]; own where as good."""
    step = -(-len(positions) // ROWS)
    table, weight, positions = read.table[::step], read.weight[::step], positions[::step]
    weighted = weight * table
    found = np.empty(len(own))
    for i, frequency in enumerate(own):
        if len(positions) and np.ptp(positions[:, i]) == 0 and positions[0, i]:
            # One angle is that of many frequencies: the nearest is meant.
            angle = np.angle(weighted[:, i].sum() * np.exp(-1j * frequency * positions[0, i]))
            found[i] = frequency + angle / positions[0, i]
            continue
        far = float(np.abs(positions[:, i]).max(initial=0.0))
        grid = np.linspace(-np.pi, np.pi, int(min(GRID, 6 * far + 16)))
        grid = np.concatenate([frequency * np.array([1.0, 0.5, 0.25, 0.0, -1.0, 2.0]), grid])
        scores = (np.exp(-1j * grid[:, None] * positions[:, i]) @ weighted[:, i]).real
        speed = float(grid[0] if scores[0] > scores.max() - 1e-9 * weight[:, i].sum() else grid[np.argmax(scores)])
        spread = float((weight[:, i] * np.square(positions[:, i])).sum())
        for _ in range(4 if spread else 0):
            error = np.angle(table[:, i] * np.exp(-1j * speed * positions[:, i]))
            speed += float((weight[:, i] * positions[:, i] * error).sum()) / spread
        found[i] = speed
    return found


def read_positions(read: Read, ids: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """The position [n], in halves, that the angles of every row tell; a row's own where that is as good."""
    most = float(max(ids.max(initial=0), len(ids)))
    grid = np.arange(-16.0, min(2 * most + 16, GRID), 0.5)
    table = np.exp(-1j * grid[:, None] * frequencies)
    weighted = read.weight * read.table
    found = np.empty(len(ids))
    for start in range(0, len(ids), ROWS):
        rows = slice(start, start + ROWS)
        scores = (weighted[rows] @ table.T).real
        own = (weighted[rows] * np.exp(-1j * ids[rows, None] * frequencies)).sum(1).real
        total = np.maximum((read.weight[rows] * np.abs(read.table[rows])).sum(1), 1e-30)
        best = scores.argmax(1)
        better = scores[np.arange(len(best)), best] > own + 1e-6 * total
        found[rows] = np.where(better, grid[best], ids[rows])
    return found
