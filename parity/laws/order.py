"""Orders of the indices along an axis, and what is said of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parity.laws.numbers import norm_of
from parity.laws.support import LISTED, Span, plural, spans

# An index map is read from so many slices.
SAMPLED = 512
# What an order may leave of the residual: another fault may sit on top of it.
LEFT = 0.5
ZERO = -1
Map = Callable[[int], np.ndarray | None]
"""For an axis's length, which index stands at each: int [n], ZERO for none; None where that has no meaning."""


@dataclass(frozen=True)
class Order:
    """A map of indices, how it is said with the axis's name ({one}, {many}), and how many numbers say it."""

    says: str
    size: float
    of: Map

    def of_axis(self, name: str) -> str:
        """What is said of an axis."""
        return self.says.format(one=name, many=plural(name))

    def taken(self, array: np.ndarray, axis: int) -> np.ndarray | None:
        """An array in this order along an axis; None where that has no meaning."""
        index = self.of(array.shape[axis])
        if index is None:
            return None
        moved = np.take(array, np.maximum(index, 0), axis)
        if (index == ZERO).any():
            moved[(slice(None),) * axis + (index == ZERO,)] = 0
        return moved


def fitting(own: np.ndarray, got: np.ndarray, wrong: np.ndarray, likely: Sequence[Order] = ()) -> Iterator[Order]:
    """The orders of slices [n, k] that may make others [m, k], which leave little; `wrong` tells which ones differ."""
    residual = norm_of(got - own) if len(own) == len(got) else norm_of(got)
    least, whole = LEFT * residual, 1e-3 * residual
    for order in (*likely, *_candidates(own, got, wrong)):
        made = order.taken(own, 0)
        if made is None or len(made) != len(got):
            continue
        left = norm_of(got - made)
        # Another is worth saying only where it leaves much less, or as little in fewer numbers than a list takes.
        if left < least and (order.size < LISTED or least > whole):
            least = max(0.5 * left, whole)
            yield order


def known(n: int) -> Iterator[Order]:
    """Orders of an axis of n that can be said without being read."""
    yield from _unread(n)
    yield from (_rolled(by - n if by > n // 2 else by) for by in range(1, n))


def _unread(count: int) -> Iterator[Order]:
    yield Order("{many} are reversed", 0.5, lambda n: np.arange(n)[::-1])
    if count % 2 == 0:
        yield Order("{many} are exchanged in pairs", 1, lambda n: np.arange(n) ^ 1 if n % 2 == 0 else None)
        yield Order(
            "{many} are exchanged by halves", 1, lambda n: np.roll(np.arange(n), n // 2) if n % 2 == 0 else None
        )
    yield from _regrouped(count)
    for side in (side for side in range(2, count // 2 + 1) if count % side == 0):
        for words, size, within in (
            *((f"{{many}} of every {side} are read as {a} x {b} transposed", 1.8,
               lambda groups, a=a, b=b: groups.reshape(-1, a, b).swapaxes(1, 2).reshape(groups.shape))
              for a, b in ((2, side // 2), (side // 2, 2)) if side > 4 and side % 2 == 0),
            (f"{{many}} are reversed in each group of {side}", 1.5, lambda groups: groups[:, ::-1]),
            (f"groups of {side} {{many}} are reversed", 1.6, lambda groups: groups[::-1]),
            (f"{{many}} of every {side} are exchanged by halves", 1.7,
             lambda groups: np.roll(groups, groups.shape[1] // 2, 1)),
        ):  # fmt: skip
            yield Order(words, size, lambda n, side=side, within=within: (
                None if n % side else within(np.arange(n).reshape(-1, side)).ravel()))  # fmt: skip


def _rolled(by: int) -> Order:
    return Order(f"{{many}} are rolled by {by}", 1, lambda n: (np.arange(n) - by) % n)


def _candidates(own: np.ndarray, got: np.ndarray, wrong: np.ndarray) -> Iterator[Order]:
    """Orders that may make slices [m, k] of others [n, k]."""
    count, total = len(own), len(got)
    found = _matched(own, got, wrong)
    if total != count:
        yield from _of_another_length(count, total, found)
        return
    places = np.flatnonzero(wrong)
    known = {int(i): int(j) for i, j in zip(places, found, strict=False) if j != ZERO}
    steps = np.array([j - i for i, j in known.items()], int)
    whole = len(known) == len(places)
    if whole and len(places) <= max(4, count // 8):
        yield from _few(known)
    if whole and len(set(known.values())) == 1 and len(places) > 1:
        yield from _constant(places, next(iter(known.values())), count)
    for step in _common(steps % count):
        by = (-step) % count
        by = by - count if by > count // 2 else by
        yield _rolled(by)
        for edge, said in ((True, "repeated"), (False, "replaced by 0")):
            yield _shifted(by, edge, said)
            yield _shifted(by - count if by > 0 else by + count, edge, said)
    yield from _unread(count)
    if whole and len(set(steps.tolist())) == 1 and len(places) > 1:
        yield from _neighbours(places, int(steps[0]), count)
    if whole and set(known) == set(known.values()) and 2 < len(places) < count and np.ptp(places) + 1 == len(places):
        yield from _block(places, known)
    if whole and len(places) > 2:
        yield from _in_blocks(known, count)
        yield _listed(known)


def _few(known: dict[int, int]) -> Iterator[Order]:
    """Few indices that hold what belongs to others."""
    if len(known) == 2 and all(known.get(j) == i for i, j in known.items()):
        first, second = sorted(known)
        swap = {first: second, second: first}
        yield Order(f"{{many}} {first} and {second} are exchanged", 1.5, _exceptions(swap))
    elif len(known) == 1:
        ((at, other),) = known.items()
        if abs(at - other) == 1:
            side = "before" if other < at else "after"
            yield Order(f"{{one}} {at} is a copy of the {{one}} {side} it", 1.5, _exceptions(known))
        else:
            yield Order(f"{{one}} {at} is a copy of {{one}} {other}", 1.5, _exceptions(known))


def _exceptions(known: dict[int, int]) -> Map:
    def of(n: int) -> np.ndarray | None:
        index = np.arange(n)
        for at, other in known.items():
            if max(at, other) >= n:
                return None
            index[at] = other
        return index

    return of


def _neighbours(places: np.ndarray, step: int, count: int) -> Iterator[Order]:
    """A part in which each index holds what belongs to one at a distance."""
    chosen = np.isin(np.arange(count), places)
    side = "before" if step < 0 else "after"
    for span in spans("{one}", chosen):

        def of(n: int, span: Span = span) -> np.ndarray:
            index = np.arange(n)
            return np.where(span.of(n), np.clip(index + step, 0, n - 1), index)

        what = f"the {{one}} {side}" if abs(step) == 1 else f"{{one}} {abs(step)} {side}"
        yield Order(_braced(f"{span.within} each {{one}} is {what}"), 1 + span.size, of)


def _constant(places: np.ndarray, other: int, count: int) -> Iterator[Order]:
    chosen = np.isin(np.arange(count), places)
    whole = [Span("{one}", "", False, 0, lambda n: np.ones(n, bool))]
    # The one that all are copies of is right.
    beside = chosen.copy()
    beside[other] = True
    for span in spans("{one}", chosen) if not beside.all() else whole:

        def of(n: int, span: Span = span) -> np.ndarray | None:
            return np.where(span.of(n), other, np.arange(n)) if other < n else None

        words = f"{span.within} each {{one}} is {{one}} {other}" if span.words else f"every {{one}} is {{one}} {other}"
        yield Order(_braced(words), 1 + span.size, of)


def _braced(words: str) -> str:
    """Words that hold the plural of "{one}" as it is said of any name."""
    return words.replace(plural("{one}"), "{many}")


def _block(places: np.ndarray, known: dict[int, int]) -> Iterator[Order]:
    """A part whose indices are in another order among themselves."""
    first, last = int(places[0]), int(places[-1])
    if all(known[i] == first + last - i for i in known):
        yield Order(f"{{many}} {first} to {last} are reversed", 2, _exceptions(known))
    steps = {(known[i] - i) % len(places) for i in known}
    if len(steps) == 1 and (step := steps.pop()):
        by = (-step) % len(places)
        by = by - len(places) if by > len(places) // 2 else by
        yield Order(f"{{many}} {first} to {last} are rolled by {by}", 2.5, _exceptions(known))


def _shifted(by: int, edge: bool, said: str) -> Order:
    what = f"{abs(by)} too late, the first" if by > 0 else f"{abs(by)} too early, the last"

    def of(n: int) -> np.ndarray:
        index = np.arange(n) - by
        return np.clip(index, 0, n - 1) if edge else np.where((index < 0) | (index >= n), ZERO, index)

    return Order(f"{{many}} are {what} {said}", 1.5, of)


def _regrouped(count: int) -> Iterator[Order]:
    """Indices counted along two sides in the other order."""
    for side in (side for side in range(2, count // 2 + 1) if count % side == 0):
        for said, fixed in ((f"{side} x {count // side}", True), (f"{count // side} x {side}", False)):

            def of(n: int, side: int = side, fixed: bool = fixed) -> np.ndarray | None:
                return None if n % side else np.arange(n).reshape((side, -1) if fixed else (-1, side)).T.ravel()

            if fixed or side < count // side:
                yield Order(f"{{many}} are read as {said} transposed", 1.5, of)


def _in_blocks(known: dict[int, int], count: int) -> Iterator[Order]:
    """Blocks in another order, and an order that is the same in every block."""
    order = np.arange(count)
    order[list(known)] = list(known.values())
    same = _exceptions(known)
    for block in (size for size in range(count // 2, 1, -1) if count % size == 0):
        blocks = order.reshape(-1, block)
        if (blocks == blocks[:, :1] + np.arange(block)).all() and not (blocks[:, 0] % block).any():
            moved = np.flatnonzero(blocks[:, 0] // block != np.arange(len(blocks)))
            if len(moved) == 2:
                first, second = (f"{i * block} to {(i + 1) * block - 1}" for i in moved)
                yield Order(f"{{many}} {first} and {second} are exchanged", 2, same)
            else:
                shown = ", ".join(map(str, blocks[:16, 0] // block)) + (", ..." if len(blocks) > 16 else "")
                yield Order(f"blocks of {block} {{many}} come as {shown}", 1.0 + len(moved), same)
            return
    for block in (size for size in range(2, count // 2 + 1) if count % size == 0):
        inside, blocks = order[:block], order.reshape(-1, block) - np.arange(count).reshape(-1, block)[:, :1]
        if (blocks == inside).all():
            for told in (*_regrouped(block), _rolled(int((block // 2 - inside[0]) % block - block // 2))):
                if np.array_equal(told.of(block), inside):
                    words = told.says.replace("{many}", f"{{many}} of every {block}")
                    yield Order(words, told.size + 1, lambda n, block=block, told=told: (
                        None if n % block else (np.arange(0, n, block)[:, None] + told.of(block)).ravel()))  # fmt: skip
                    return


def _listed(known: dict[int, int]) -> Order:
    shown = ", ".join(f"{i} holds {j}" for i, j in list(known.items())[:LISTED])
    more = f" and so on, {len(known)} in all" if len(known) > LISTED else ""
    return Order(f"{{many}} are in another order: {shown}{more}", float(max(len(known), LISTED)), _exceptions(known))


def _of_another_length(count: int, total: int, found: np.ndarray) -> Iterator[Order]:
    """Indices that are missing, or there twice."""
    more = total - count
    if more < 0:
        what = "{one} is" if more == -1 else f"{-more} {{many}} are"
        yield Order(f"the last {what} missing", 1, lambda n: np.arange(n + more) if n > -more else None)
        yield Order(f"the first {what} missing", 1, lambda n: np.arange(-more, n) if n > -more else None)
        lacking = sorted(set(range(count)) - set(found.tolist()))
        if len(lacking) == -more <= LISTED:
            which, one = " and ".join(map(str, lacking)), len(lacking) == 1
            words = f"{{one}} {which} is missing" if one else f"{{many}} {which} are missing"

            def without(n: int) -> np.ndarray | None:
                return np.delete(np.arange(n), lacking) if n > lacking[-1] else None

            yield Order(words, float(len(lacking)), without)
        every = count // total
        for first in range(min(every, 4)) if total * every == count else ():
            says = f"of every {every} {{many}} only the one at {first} is kept"
            yield Order(says, 1.5, lambda n, first=first: np.arange(n)[first::every])
    else:
        yield Order("the last {one} is repeated", 1, lambda n: np.minimum(np.arange(n + more), n - 1))
        yield Order("the first {one} is repeated", 1, lambda n: np.maximum(np.arange(-more, n), 0))
        times = total // count
        if times * count == total:
            yield Order(f"each {{one}} is there {times} times in turn", 1, lambda n: np.repeat(np.arange(n), times))
            yield Order(f"all {{many}} are repeated {times} times", 1, lambda n: np.tile(np.arange(n), times))


def _matched(own: np.ndarray, got: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """For each wrong slice the one of own that it is, ZERO where it is none; of SAMPLED of them at most."""
    places = np.flatnonzero(wrong)
    if len(places) * len(own) > SAMPLED * 4096:
        places = places[: SAMPLED * 4096 // len(own)]
    distance = (got[places] ** 2).sum(1)[:, None] - 2 * got[places] @ own.T + (own**2).sum(1)
    best = np.argmin(distance, 1)
    exact = ((got[places] - own[best]) ** 2).sum(1)
    scale = np.maximum((own[best] ** 2).sum(1), (got[places] ** 2).sum(1))
    return np.where((exact <= 0.05 * scale) & (scale > 0), best, ZERO)


def _common(steps: np.ndarray) -> list[int]:
    """The two commonest distances."""
    values, counts = np.unique(steps, return_counts=True)
    return [int(values[i]) for i in np.argsort(-counts)[:2] if values[i]]
