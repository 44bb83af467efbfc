"""Which pictures are sampled side by side, and how many."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import TypeVar

from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.requests.request import Request, Task
from lance_mlx.sampling.flow import most_in_one_pass

Item = TypeVar("Item")
MOST_PICTURES = 64
"""Of a batch that is asked for."""
_MOST_BY_DEFAULT = 8
"""More gain little, and an interrupted run loses those that it is at."""
_OWN = ("prompt", "negative_prompt", "seed", "visuals", "vision_type", "fps")
"""Fields of a request in which the pictures of a batch may differ."""


def go_together(first: Request, second: Request) -> bool:
    """Whether two requests, with the sizes that their sources dictate, may be pictures of one batch: they differ in
    what is drawn alone, and no latents are given."""
    return first.task is not Task.I2V and all(
        getattr(first, field.name) == getattr(second, field.name) for field in fields(Request) if field.name not in _OWN
    )


def default_size(request: Request) -> int:
    """How many pictures of that size are sampled together by default: as many as go in one pass, which then needs no
    more memory than that of one larger picture; 1 where that gains nothing, or cannot be."""
    if not go_together(request, request):
        return 1
    frames, rows, columns = request.latent_grid
    return max(1, min(_MOST_BY_DEFAULT, most_in_one_pass(runs_on_cpu()) // (frames * rows * columns)))


def batches(items: Iterable[Item], request: Callable[[Item], Request], size: int | None) -> Iterator[list[Item]]:
    """Part items, in their order, into batches of those that follow each other and go together.

    Args:
        request: gives an item's request, with the size that its source dictates.
        size: most items of a batch; None for `default_size`.
    """
    batch: list[Item] = []
    for item in items:
        if batch:
            first = request(batch[0])
            if len(batch) >= (size or default_size(first)) or not go_together(first, request(item)):
                yield batch
                batch = []
        batch.append(item)
    if batch:
        yield batch
