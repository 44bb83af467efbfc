"""The processes of one run, which mlx.launch starts: each is a rank."""

import atexit
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np

from lance_mlx.distributed.watch import RankLost, Watch
from lance_mlx.errors import LanceError

Item = TypeVar("Item")
_SECONDS_TO_MEET = 120
_watch: Watch | None = None


class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        size: how many there are; 1 without mlx.launch, and then nothing here has an effect.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def gather(self, x: mx.array) -> mx.array:
        """The arrays of all ranks, of one shape [n, ...] and dtype, after each other: [size * n, ...].

        It is computed at once, so that all ranks gather the same things in the same order.

        Raises:
            RankLost: another rank is gone.
        """
        if self.size == 1:
            return x
        try:
            whole = mx.distributed.all_gather(x)
            mx.eval(whole)
        except RuntimeError:
            if _watch is not None and _watch.wait_lost():
                raise RankLost from None
            raise
        return whole

    def from_first(self, numbers: Sequence[int]) -> list[int]:
        """Rank 0's of so many whole numbers below 2**64."""
        if self.size == 1:
            return list(numbers)
        return self.gather(mx.array(np.array(numbers, np.uint64)))[: len(numbers)].tolist()

    def wanting_everywhere(self, wanting: Sequence[bool]) -> list[bool]:
        """Which of some things are still to be made by what every rank sees, in a folder of its own or of all."""
        if self.size == 1:
            return list(wanting)
        seen = self.gather(mx.array(np.array(wanting, np.uint8))).reshape(self.size, -1)
        return [bool(least) for least in seen.min(axis=0).tolist()]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of some items that are this rank's: neighbours, which often have much in common."""
        bounds = share_bounds(len(items), self.size)
        return items[bounds[self.rank] : bounds[self.rank + 1]]


def share_bounds(count: int, size: int) -> list[int]:
    """Where the shares of `size` ranks begin among `count` things, and the end of the last one: they differ by one at
    most."""
    return [rank * count // size for rank in range(size + 1)]


@cache
def join() -> Ranks:
    """Meet the other ranks, once in a process; alone where mlx.launch did not start it.

    Raises:
        LanceError: what mlx.launch says of the ranks cannot be used, or MLX cannot connect them.
        RankLost: one of them does not come.
    """
    global _watch
    if "MLX_RANK" not in os.environ:
        return Ranks()
    rank, size, address = _launched()
    if size == 1:
        return Ranks()
    if not 0 <= rank < size:
        raise LanceError(f"MLX_RANK {rank} is none of {size} ranks: start with mlx.launch")
    _watch = Watch(rank, size)
    _watch.meet(address)
    atexit.register(_part, True)
    # Where a rank ends just now, MLX would wait for it for ever, and let no thread of Python's see it.
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS_TO_MEET)
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise LanceError(f"MLX cannot connect the ranks ({error}): try another --starting-port of mlx.launch") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Ranks(group.rank(), group.size())


def _launched() -> tuple[int, int, tuple[str, int]]:
    """This process's rank, how many there are, and where rank 0 listens: at the address that mlx.launch gave it, one
    port above all that MLX uses."""
    try:
        rank = int(os.environ["MLX_RANK"])
        if "MLX_JACCL_COORDINATOR" in os.environ:
            hosts = json.loads(Path(os.environ["MLX_IBV_DEVICES"]).read_text(encoding="utf-8"))
            addresses = [os.environ["MLX_JACCL_COORDINATOR"]]
        else:
            # One process alone is given an empty file.
            hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8") or '[["127.0.0.1:0"]]')
            addresses = [address for host in hosts for address in host]
        ports = [int(address.rpartition(":")[2]) for address in addresses]
        return rank, len(hosts), (addresses[0].rpartition(":")[0].strip("[]"), 1 + max(ports))
    except (KeyError, OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise LanceError(
            f"MLX_RANK is set, but nothing else that can be used says where the ranks are ({type(error).__name__}: "
            f"{error}): start with mlx.launch --backend ring, or jaccl"
        ) from None


def lost() -> str | None:
    """Which rank is gone, in words."""
    return None if _watch is None else _watch.lost


def _part(well: bool) -> None:
    if _watch is not None:
        # This rank ends already, for a reason of its own.
        with suppress(KeyboardInterrupt):
            _watch.done() if well else _watch.close()


@contextmanager
def told_how_it_ends() -> Iterator[None]:
    """Let the other ranks know whether this one ends as it should."""
    try:
        yield
    except SystemExit as status:
        _part(not status.code)
        raise
    except BaseException:
        _part(False)
        raise
