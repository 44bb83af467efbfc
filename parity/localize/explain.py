"""Trying hypotheses at a place that is wrong by itself, alone and together, and ranking what they explain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from parity.errors import interrupted
from parity.hypotheses import Hypothesis, attempt, unpatched
from parity.hypotheses.tap_probe import TapProbe
from parity.laws import Law, fitted
from parity.localize.findings import EXPLAINS, Explanation
from parity.localize.part_of_rows import in_some_tokens
from parity.tensors.rounding import ULP

# As many causes may meet in one place.
DEPTH = 3
# Hypotheses that are tried on a second input, and that others are tried on top of.
FINALISTS, BASES = 8, 4
# What two hypotheses together leave must be less than this part of what the better one leaves: else one is enough.
WORTH_ANOTHER = 0.5
LISTED = 5
# The least part of the integers that still differ which a further cause has to account for, and how many may be found.
LEAST_PART, PARTS = 0.1, 6
# As many integers that differ have to speak for each of several causes: what fewer do may be by chance.
FEWEST = 2
# What a hypothesis removes that makes a sequence of another length, the less the nearer its tokens are, or changes what
# is right beside it: less than this.
UNFIT = -1e8
# Two that leave this much of each other fit alike: what has more numbers to choose always leaves a little less.
ALIKE = 1.5
# An explanation that removes so much computes what was computed, if not rounded in the same places: in bfloat16 right
# ones were seen to leave up to 5 times what rounding may do.
NEARLY, ROUNDED_ELSEWHERE = 0.95, 10
# What removes so much without a number read from the data does not do so by chance.
NEXT_TO_ALL = 0.99
# The part of whole numbers that may be off by one where they were rounded from what was computed otherwise.
ONCE_IN = 0.01
# What is read with more numbers than this describes what was computed, rather than why: it stands back behind any
# cause that leaves nothing to explain.
MANY = 32
# What so few choices reproduce to the last bit is not so by chance.
CHOICES = 2
_DIGITS = 6


_REMOVED: WeakKeyDictionary[TapProbe, dict[tuple[Hypothesis, ...], float | None]] = WeakKeyDictionary()
Failed = dict[str, str]
"""What hypotheses raised other than DoesNotApply, in a line, by the hypothesis's name."""


@dataclass(frozen=True)
class Causes:
    """What explains a place: the hypotheses that together do, first cause first, and all tried, best first.

    Of those in `beside` each moves what is computed by no more than rounding: they say how the others round.
    `failed` holds what hypotheses raised, by their names; whoever tries the causes elsewhere adds to it. Where integers
    are explained in part, `parts` holds the part of those that differ which each cause accounts for. `agrees`
    says whether what the causes leave would agree.
    """

    together: tuple[Hypothesis, ...]
    removed: float
    ranked: tuple[Explanation, ...]
    failed: Failed = field(default_factory=dict)
    parts: tuple[float, ...] = ()
    agrees: bool = True
    beside: tuple[Hypothesis, ...] = ()


Tried = tuple[Hypothesis, float, float | None]
"""A hypothesis, and what it removes here and on a second input."""


def explain(
    site: TapProbe, second: TapProbe | None, hypotheses: Sequence[Hypothesis], known: Sequence[Hypothesis] = ()
) -> Causes:
    """Try all hypotheses about a site's component.

    `second` is another place of the same kind that is wrong too: an explanation has to hold there as well. `known` are
    causes found before, on top of which all others are tried.
    """
    about = [hypothesis for hypothesis in hypotheses if hypothesis.about(site.component)]
    failed: Failed = {}
    if known:
        return _beyond(site, [h for h in about if h not in known], known, failed)
    tried = _by_merit(site, about, failed)
    # What was said beforehand says more than what is read, of some tokens alone or where several of it meet.
    alone = [h for h, _ in tried] if not any(_agrees(site, share) for _, share in tried) else []
    for likely in (_by_merit(site, _of_some_tokens(site, alone, failed), failed), tried):
        if likely and _suffices(site, second, causes := _caused(site, second, likely, failed, reads=False), failed):
            return causes
    return _caused(site, second, _ordered(site, [*tried, *_by_merit(site, _read(site, [], failed), failed)]), failed)


def _suffices(site: TapProbe, second: TapProbe | None, causes: Causes, failed: Failed) -> bool:
    """Whether causes leave no more than rounding, and hold on a second input."""
    # What agrees and yet leaves more than rounding may be next to the cause: what is read may be the cause itself.
    enough = sum(causes.parts) >= 1 - 1e-9 if causes.parts else causes.agrees and _whole(site, causes.removed)
    if not causes.together or not enough:
        return False
    there = removed(second, causes.together, failed) if second is not None else None
    return there is None or there >= NEARLY


def _caused(
    site: TapProbe,
    second: TapProbe | None,
    tried: Sequence[tuple[Hypothesis, float]],
    failed: Failed,
    reads: bool = True,
) -> Causes:
    """What of all that was tried explains a site, alone or together; `reads`: also with laws read on top of it."""
    ranked = _ranked(site, tried, second, failed)
    if not ranked:
        return Causes((), 0.0, (), failed)
    best, first = ranked[0][0], ranked[0][1]
    together, amount = (best,), first
    # Integers have to be equal: most of them is no cause.
    enough = 1 - 1e-9 if _integral(site) else EXPLAINS
    # Where no cause removes even a little, several together are not looked for.
    if not _agrees(site, first) and (site.exact or first >= LEAST_PART):
        stack, reached = _stacked(site, [(h, r) for h, r, _ in ranked], failed, reads)
        if reached >= enough:
            together, amount = _needed(site, stack, reached, failed)
            if second is not None:
                together, amount = _confirmed(site, second, together, amount, failed)
    listed = tuple(_told(site, h, r, s) for h, r, s in ranked[:LISTED] if r > UNFIT)
    if _integral(site) and amount < 1 - 1e-9 and (found := _in_part(site, [h for h, _ in tried], failed)):
        together, parts = zip(*found, strict=True)
        return Causes(together, sum(parts), listed, failed, parts)
    together = together if amount >= enough else ()
    beside = tuple(h for h in together if _moves_little(site, h, failed)) if len(together) > 1 else ()
    beside = beside if len(beside) < len(together) else ()
    agrees = _agrees(site, amount) and not (len(together) > 1 and _differing(site) < FEWEST * len(together))
    return Causes(together, amount, listed, failed, agrees=agrees, beside=beside)


def _differing(site: TapProbe) -> float:
    """How many integers differ; infinitely many where that is not known, or it is no integers."""
    if not _integral(site) or site.got.shape != site.expected.shape:
        return math.inf
    return int(np.sum(site.judged(site.got != site.expected)))


def _by_merit(site: TapProbe, hypotheses: Sequence[Hypothesis], failed: Failed) -> list[tuple[Hypothesis, float]]:
    """Those that apply with what they remove: first those that leave no more than rounding, the smallest before."""
    return _ordered(site, [(h, r) for h in hypotheses if (r := removed(site, [h], failed)) is not None])


def _of_some_tokens(site: TapProbe, hypotheses: Sequence[Hypothesis], failed: Failed) -> list[Hypothesis]:
    """Those that are true of some tokens alone."""
    arrays = [(h, _attempted(site, [h], failed)) for h in hypotheses if not site.exact]
    return [part for h, array in arrays if array is not None for part in in_some_tokens(site, h, array)]


def _ordered(site: TapProbe, tried: Sequence[tuple[Hypothesis, float]]) -> list[tuple[Hypothesis, float]]:
    """First those that leave no more than rounding, or nearly as little as the best: of them what is right to the last
    bit before, and then the smallest."""
    best = max((share for _, share in tried), default=0.0)
    near = _alike(site, [(h, share, share) for h, share in tried], 1.0) if tried and _agrees(site, best) else best
    fits = [share >= near or _whole(site, share) for _, share in tried]
    merit = [
        (0, not _to_the_last_bit(h, share), h.size, -share) if fit else (1, -share)
        for (h, share), fit in zip(tried, fits, strict=True)
    ]
    return [tried[i] for i in sorted(range(len(tried)), key=merit.__getitem__)]


def _to_the_last_bit(hypothesis: Hypothesis, share: float) -> bool:
    """Whether a few choices, and not what was read number by number, leave nothing at all."""
    return share == 1 and hypothesis.size <= CHOICES and not hypothesis.describes


def _whole(site: TapProbe, share: float, times: float = 1.0) -> bool:
    """Whether what is left beside a removed part of the residual is no more than (some times) rounding."""
    if _integral(site):
        return share >= 1 - 1e-9
    return share >= 1 or (1 - share) * _residual(site, site.expected) <= times * _rounding(site)


def _agrees(site: TapProbe, share: float) -> bool:
    """Whether nothing is left to explain beside what a hypothesis removes."""
    left = (1 - share) * _residual(site, site.expected)
    if site.exact:
        return share >= 1 - 1e-9 or left <= _rounding(site)
    if site.allowed is None:
        return share >= NEARLY
    if site.got.dtype.kind != "f" and share >= NEARLY and left <= (ONCE_IN * site.got.size) ** 0.5:
        return True
    return left <= _norm(site.expected) * site.allowed * (ROUNDED_ELSEWHERE if share >= NEARLY else 1)


def _alike(site: TapProbe, tried: Sequence[tuple[Hypothesis, float, float]], whole: float) -> float:
    """The merit from which hypotheses do as well as the best; of each what it removes here and its merit are given."""
    best, _, merit = max(tried, key=lambda item: item[2])
    few = [m for h, share, m in tried if h.size <= MANY and m >= whole * NEARLY and _agrees(site, share)]
    return min([whole - ALIKE * (whole - merit), *(few if best.size > MANY else ())])


def _read(site: TapProbe, base: Sequence[Hypothesis], failed: Failed) -> list[Hypothesis]:
    """The laws that can be read from what was computed, on top of other hypotheses."""
    try:
        own = attempt(site, base) if base else unpatched(site)
        component = None if own is None else site.known(own)
        laws = [] if component is None else fitted(component, site.got)
    except Exception as error:
        if interrupted(error):
            raise
        failed.setdefault(f"laws about {site.component}", f"{type(error).__name__}: {error}")
        return []
    return [_of_law(law, component.kind) for law in laws]


def _of_law(law: Law, kind: str) -> Hypothesis:
    """A law as a hypothesis about all components of a kind, wherever they are."""

    def transform(site: TapProbe, array: np.ndarray) -> np.ndarray | None:
        component = site.known(array)
        return law.apply(component) if component is not None and component.kind == kind else None

    told = {"size": law.size, "figure": law.figure, "describes": law.describes}
    return Hypothesis(law.sentence, ("*",), transform=transform, **told)


def _beyond(site: TapProbe, others: Sequence[Hypothesis], known: Sequence[Hypothesis], failed: Failed) -> Causes:
    """The one cause that is missing where the known ones do not suffice; none where no other helps."""
    before = removed(site, known, failed) or 0.0
    tried = [(h, r) for h in others if (r := removed(site, [*known, h], failed)) is not None]
    tried.sort(key=lambda item: -item[1])
    ranked = tuple(_told(site, h, r) for h, r in tried[:LISTED] if r > UNFIT)
    if not tried or 1 - tried[0][1] > WORTH_ANOTHER * (1 - before):
        return Causes((), before, ranked, failed)
    return Causes((tried[0][0],), tried[0][1], ranked, failed)


def _in_part(site: TapProbe, hypotheses: Sequence[Hypothesis], failed: Failed) -> list[tuple[Hypothesis, float]]:
    """Causes of some of the integers that differ, each with the part of them that it accounts for on top of those
    before it; none where what agrees would differ under them, or most of what differs would be left."""
    found: list[tuple[Hypothesis, float]] = []
    reached = 0.0
    while len(found) < PARTS and reached < 1:
        causes = [hypothesis for hypothesis, _ in found]
        grown = [(_accounted(site, [*causes, h], failed), h) for h in hypotheses if h not in causes]
        share, best = max(grown, key=lambda item: item[0], default=(0.0, None))
        few = (share - reached) * _differing(site) < FEWEST - 0.5
        if best is None or few or share - reached < LEAST_PART * (1 - reached):
            break
        found.append((best, share - reached))
        reached = share
    return found if reached > 0.5 else []


def _accounted(site: TapProbe, hypotheses: Sequence[Hypothesis], failed: Failed) -> float:
    """The part of the integers that differ which come out as they were computed under hypotheses; 0 where others then
    differ."""
    amount = removed(site, hypotheses, failed)
    if amount is None or amount <= UNFIT or site.got.shape != site.expected.shape:
        return 0.0
    array = attempt(site, hypotheses)
    differs, alike = site.judged(site.got != site.expected), site.judged(array == site.got)
    return 0.0 if np.any(~differs & ~alike) or not differs.any() else float(np.mean(alike[differs]))


def _attempted(site: TapProbe, hypotheses: Sequence[Hypothesis], failed: Failed) -> np.ndarray | None:
    """What is computed under hypotheses; None where they do not apply, or raise, which is added to `failed`."""
    try:
        return attempt(site, hypotheses)
    except Exception as error:
        if interrupted(error):
            raise
        reason = next(iter(str(error).splitlines()), "")
        name = " and ".join(hypothesis.name for hypothesis in hypotheses)
        failed.setdefault(name, f"{type(error).__name__}: {reason}".removesuffix(": "))
        return None


def removed(site: TapProbe, hypotheses: Sequence[Hypothesis], failed: Failed) -> float | None:
    """The part of the residual norm that hypotheses remove.

    None where they do not apply or explain nothing, less than UNFIT where they make a sequence of another length or
    change what is right beside it: others on top may still put that right. What they raise is added to `failed`. What
    was found of a site is kept for as long as that is.
    """
    known, key = _REMOVED.setdefault(site, {}), tuple(hypotheses)
    if key not in known:
        array = _attempted(site, hypotheses, failed)
        if array is None:
            return None
        changed = any(removed(other, hypotheses, failed) not in (None, 1.0) for other in site.right)
        known[key] = 10 * UNFIT if changed else _removed_by(site, array)
    return known[key]


def rules_out(site: TapProbe, hypotheses: Sequence[Hypothesis]) -> bool:
    """Whether what was computed is further than agrees from what it would be under hypotheses."""
    array = _attempted(site, hypotheses, {})
    if array is None or array.shape != site.got.shape or site.allowed is None:
        return False
    return _distance(site.got, array) > site.allowed * _norm(site.expected)


def _removed_by(site: TapProbe, array: np.ndarray) -> float | None:
    if array.shape != site.got.shape:
        # A sequence may still become as long under another hypothesis on top; what is computed may not.
        return 10 * UNFIT + _shared(site, array) if site.exact else None
    if not site.exact:
        return _removed_of_activation(site, array)
    residual, left = _residual(site, site.expected), _distance(site.judged(site.got), site.judged(array))
    if not residual:
        return 0.0 if left else 1.0
    return 1 - left / residual


def _shared(site: TapProbe, array: np.ndarray) -> float:
    """The part of what one of two sequences of unlike lengths lacks or has too many of that a cause removes."""
    apart, left = (_bag_distance(site.got, values) for values in (site.expected, array))
    return 1 - left / apart if apart else 0.0


def _bag_distance(a: np.ndarray, b: np.ndarray) -> int:
    values = np.unique(np.concatenate([a.ravel(), b.ravel()]), return_inverse=True)[1]
    counts = [np.bincount(part, minlength=values.max(initial=0) + 1) for part in np.split(values, [a.size])]
    return int(np.abs(counts[0] - counts[1]).sum())


def _removed_of_activation(site: TapProbe, array: np.ndarray) -> float | None:
    """The part of the residual that what was computed under hypotheses removes, beyond rounding."""
    own, rounding = unpatched(site), _rounding(site)
    left = _distance(site.got, array)
    # What comes out as it does without the hypotheses, but for rounding, says nothing of them, nor does what is NaN.
    if (array.shape == own.shape and not _distance(array, own) > rounding) or not math.isfinite(left):
        return None
    whole, from_own = _residual(site, site.expected), _residual(site, own)
    residual = min(whole, from_own)
    # Where the reference as it is computes what was computed there is nothing to explain.
    if residual <= rounding or (math.isfinite(from_own) and from_own <= (1 - EXPLAINS) * whole):
        return None
    # Rounded, so that equal explanations stay in their order and float noise does not rank them.
    share = round(1 - left / residual, _DIGITS)
    return 0.0 if 0 < residual - left <= rounding else share


def _told(site: TapProbe, hypothesis: Hypothesis, share: float, second: float | None = None) -> Explanation:
    left = max(_floors(site, share), 0.0) if _rounding(site) else None
    agrees = _agrees(site, share) or (not hypothesis.size and _but_for_bfloat16(site, share))
    return Explanation.of(hypothesis, share, second, left, agrees)


def _but_for_bfloat16(site: TapProbe, share: float) -> bool:
    """Whether next to nothing is left beside what was said beforehand, and no more than bfloat16 rounds: the same may
    be computed in that where what is right is computed in float32."""
    left = (1 - share) * _residual(site, site.expected)
    narrow = site.dtype == "bfloat16" and not site.exact
    return narrow and share >= NEXT_TO_ALL and left <= ULP["bfloat16"] * _norm(site.expected)


def _ranked(
    site: TapProbe, tried: Sequence[tuple[Hypothesis, float]], second: TapProbe | None, failed: Failed
) -> list[Tried]:
    finalists = [(h, r, removed(second, [h], failed) if second is not None else None) for h, r in tried[:FINALISTS]]
    if second is not None:
        finalists = [item for item in finalists if _holds(site, second, *item)]
        # What was said beforehand does not hold where it does not apply; what was read may say nothing there.
        both = [(h, r, r + _there(h, r, s)) for h, r, s in finalists]
        near = _alike(site, both, 2.0) if both else 0.0
        order = sorted(range(len(both)), key=lambda i: (-min(both[i][2], near), both[i][0].size))
        finalists = [finalists[i] for i in order]
    return [*finalists, *((h, r, None) for h, r in tried[FINALISTS:] if not h.size or second is None)]


def _there(hypothesis: Hypothesis, here: float, there: float | None) -> float:
    if there is None:
        return 0.0 if hypothesis.size else -1.0
    return max(there, 0.0)


def _holds(site: TapProbe, second: TapProbe, hypothesis: Hypothesis, here: float, there: float | None) -> bool:
    """Whether what was read from one input is true of another that the same component is wrong with."""
    if not hypothesis.size or second.component != site.component or here < EXPLAINS:
        return True
    return there is None or there >= EXPLAINS


def _stacked(
    site: TapProbe, ranked: Sequence[tuple[Hypothesis, float]], failed: Failed, reads: bool
) -> tuple[tuple[Hypothesis, ...], float]:
    """The best combination of up to DEPTH hypotheses, tried on top of the best of the combinations before."""
    # Of two errors that have nothing to do with each other, what removes one removes something alone.
    by_merit = [h for h, share in ranked if site.exact or share > 0]
    bases: list[tuple[tuple[Hypothesis, ...], float]] = [((h,), share) for h, share in ranked]
    best = bases[0]
    bases = bases if site.exact else bases[:BASES]
    for _ in range(DEPTH - 1):
        grown = []
        # What a law leaves is read again: another may be on top of it.
        more = [(base, _read(site, base, failed)) for base, _ in bases[:BASES]] if reads else []
        for base, others in (*((base, by_merit) for base, _ in bases), *more):
            for hypothesis in others:
                if hypothesis in base:
                    continue
                amount = removed(site, [*base, hypothesis], failed)
                if amount is not None:
                    grown.append(((*base, hypothesis), amount))
                if amount is not None and amount >= 1 - 1e-9:
                    return grown[-1]
        grown.sort(key=lambda item: -item[1])
        if not grown:
            break
        if _worth(site, best[1], grown[0][1]):
            best = grown[0]
        bases = grown[: 4 * BASES if site.exact else 1]
    return best


def _needed(
    site: TapProbe, stack: tuple[Hypothesis, ...], reached: float, failed: Failed
) -> tuple[tuple[Hypothesis, ...], float]:
    """Those of a combination that it cannot do without."""
    for one in stack if len(stack) > 1 else ():
        fewer = tuple(other for other in stack if other is not one)
        alone = removed(site, fewer, failed)
        if alone is None:
            continue
        if alone >= reached or (not site.exact and _whole(site, alone, max(ALIKE, ALIKE * _floors(site, reached)))):
            return _needed(site, fewer, alone, failed)
    return stack, reached


def _confirmed(
    site: TapProbe, second: TapProbe, stack: tuple[Hypothesis, ...], reached: float, failed: Failed
) -> tuple[tuple[Hypothesis, ...], float]:
    """Those of a combination but for what was read here and makes nothing better where the same component is wrong
    again."""
    there = removed(second, stack, failed) if len(stack) > 1 and second.component == site.component else None
    for one in stack if there is not None else ():
        fewer = tuple(other for other in stack if other is not one)
        without = removed(second, fewer, failed) if one.size else None
        if without is not None and without >= there:
            return _confirmed(site, second, fewer, removed(site, fewer, failed) or 0.0, failed)
    return stack, reached


def _moves_little(site: TapProbe, hypothesis: Hypothesis, failed: Failed) -> bool:
    """Whether a hypothesis by itself changes what is computed by no more than rounding in other places does: a unit in
    bfloat16's last place, or what two right runs may be apart."""
    array = None if site.exact or site.allowed is None else _attempted(site, [hypothesis], failed)
    if array is None or array.shape != site.expected.shape:
        return False
    far = max(2 * site.allowed, ULP["bfloat16"] if site.dtype == "bfloat16" else 0.0)
    return _distance(array, unpatched(site)) <= far * _norm(site.expected)


def _floors(site: TapProbe, share: float) -> float:
    """What is left beside a removed part, in floors."""
    rounding = _rounding(site)
    return (1 - share) * _residual(site, site.expected) / rounding if rounding else 0.0


def _worth(site: TapProbe, before: float, after: float) -> bool:
    """Whether another cause is seen clearly, and beyond rounding."""
    beyond = (after - before) * _residual(site, site.expected) > _rounding(site)
    return beyond and 1 - after < WORTH_ANOTHER * (1 - before)


def _residual(site: TapProbe, value: np.ndarray) -> float:
    """How far what was computed is from a value; one of another shape cannot be subtracted: all of it is residual."""
    return _distance(site.got, value) if value.shape == site.got.shape else _norm(site.got)


def _rounding(site: TapProbe) -> float:
    if site.exact and not _integral(site):
        # What is read of a parameter is right to a unit in its last place.
        narrow = not (site.expected.astype(np.float32).view(np.uint32) & 0xFFFF).any()
        return max(_norm(site.expected), _norm(site.got)) * (2.0**-8 if narrow else 2.0**-23)
    return _norm(site.expected) * site.floor


def _integral(site: TapProbe) -> bool:
    return site.exact and site.expected.dtype.kind != "f"


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far two arrays of one shape are from each other: infinitely where one alone is not finite."""
    unlike = (a != b) & ~(np.isnan(a) & np.isnan(b))
    apart = float(np.linalg.norm(a[unlike].astype(np.float64) - b[unlike]))
    return math.inf if math.isnan(apart) else apart


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))
