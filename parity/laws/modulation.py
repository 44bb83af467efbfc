"""Laws of results that are others times a factor for each channel, plus an offset: modulations, gates, layer scales.

Inputs are results [batch, tokens, channels] by name. Facts: terms (those of them that are multiplied and added up),
vectors (factors that there are, [batch, channels], by name), and where the one term is a layer norm norm: its eps, and
terms (those that input x, which it norms, is made of).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product as pairs

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.numbers import listed, norm_of, plainest
from parity.tensors.metrics import rel_l2

# What factors may leave of the residual; how near a factor is to what it is said to be, of its norm, in units of what
# is left of the result, and at least.
LEFT, WITHIN, NEAR = 0.05, 8.0, 1e-4
# Tokens that another factor below a norm is first tried on.
TOKENS = 24
OFFSET = "the offset"
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "{}": lambda v: v,
    "1 + {}": lambda v: 1 + v,
    "1 - {}": lambda v: 1 - v,
    "tanh of {}": np.tanh,
    "sigmoid of {}": lambda v: 1 / (1 + np.exp(-v)),
    "the square of {}": np.square,
    "1 + twice {}": lambda v: 1 + 2 * v,
}
PLAIN = ("{}", "1 + {}", "tanh of {}")
"""What trusted models make factors of."""


def factors(terms: Sequence[np.ndarray], made: np.ndarray) -> np.ndarray:
    """By what results [batch, tokens, channels] are multiplied to make another, and what is added: [k + 1, b, c]."""
    columns = np.stack([*terms, np.ones_like(made)]).astype(np.float64)
    size = np.sqrt(np.square(columns).sum(2, keepdims=True))
    columns = columns / np.where(size > 0, size, 1)
    columns = np.ascontiguousarray(columns.transpose(1, 3, 0, 2))
    seen = columns @ made.astype(np.float64).transpose(0, 2, 1)[..., None]
    # Columns that are alike share what there is.
    found = np.linalg.solve(columns @ columns.swapaxes(2, 3) + 1e-13 * np.eye(columns.shape[2]), seen)[..., 0]
    return np.moveaxis(found, 2, 0) / np.where(size > 0, size, 1)[:, :, 0]


def product(terms: Sequence[np.ndarray], by: np.ndarray) -> np.ndarray:
    """What results make with factors and an offset [k + 1, batch, channels]; float64."""
    return sum((term * factor[:, None] for term, factor in zip(terms, by, strict=False)), by[-1][:, None])


def normed(x: np.ndarray, eps: float, mean: bool = True) -> np.ndarray:
    """x [..., channels] over its deviation, less its mean unless that is left; float64."""
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True) if mean else x
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)


def normed_anew(inputs: Mapping[str, np.ndarray], facts: Mapping, own: np.ndarray, eps: float | None = None,
                mean: bool = True) -> np.ndarray | None:  # fmt: skip
    """A modulated layer norm with another eps, or of which the mean is left; None for any other result."""
    norm = facts.get("norm")
    if norm is None or (eps in (None, norm["eps"]) and mean):
        return None
    right = normed(inputs["x"], norm["eps"])
    other = normed(inputs["x"], norm["eps"] if eps is None else eps, mean)
    return (own + (other - right) * factors([right], own)[0][:, None]).astype(np.float32)


def read(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Another factor in the place of one, another offset, or another result in the place of one."""
    terms, facts = _terms(component), component.facts
    if terms is None or component.own.shape != got.shape or not np.isfinite(got).all():
        return
    residual = norm_of(got.astype(np.float64) - component.own)
    allowed = max(component.rounding, LEFT * residual)
    law = _with(component, got, terms, {}, allowed)
    if law is not None:
        yield law
        return
    if "norm" in facts:
        yield from _below(component, got, allowed)
    others = [name for name in component.inputs if name not in facts["terms"] and name != "x"]
    for name, other in pairs(facts["terms"], others):
        instead = [component.inputs[other if each == name else each] for each in facts["terms"]]
        if (law := _with(component, got, instead, {name: other}, allowed)) is not None:
            yield law


def _terms(component: Component) -> list[np.ndarray] | None:
    terms = [component.inputs.get(name) for name in component.facts.get("terms", ())]
    alike = all(term is not None and term.shape == component.own.shape for term in terms)
    return terms if terms and alike and component.own.ndim == 3 else None


def _with(
    component: Component, got: np.ndarray, terms: Sequence[np.ndarray], swapped: Mapping[str, str], allowed: float
) -> Law | None:
    """What a result is of terms; `swapped` which of them stand in the place of which. None where it is none of these,
    or of factors that are not known."""
    found = factors(terms, got)
    left = norm_of(got - product(terms, found))
    if left > allowed:
        return None
    said = _differing(component, factors(_terms(component), component.own), found, left / max(norm_of(got), 1e-30))
    if said is None or not (said or swapped):
        return None
    names = component.facts["terms"]

    def apply(other: Component) -> np.ndarray | None:
        right = _terms(other)
        if right is None or len(right) != len(names) or any(each not in other.inputs for each in swapped.values()):
            return None
        used = [other.inputs[swapped.get(name, name)] for name in other.facts["terms"]]
        return _changed(other, right, used, {place: what for place, (what, _) in said.items()})

    words = [f"{new} stands in the place of {old}" for old, new in swapped.items()]
    return Law(listed([*words, *(each for _, each in said.values())]), float(len(said) + 1.5 * len(swapped)), apply)


def _changed(other: Component, right: list, used: list, said: Mapping[int, str]) -> np.ndarray | None:
    """A result with other terms and some other factors; None where these are not known."""
    by = factors(right, other.own)
    new = by.copy()
    for place, what in said.items():
        instead = _value(what, other.facts["vectors"], by[place].shape)
        if instead is None:
            return None
        new[place] = instead
    return (other.own + (product(used, new) - product(right, by))).astype(np.float32)


def _differing(
    component: Component, right: np.ndarray, found: np.ndarray, left: float
) -> dict[int, tuple[str, str]] | None:
    """Of the factors that are not what they should be what they are, and what is said of each; None where one is
    nothing that is known."""
    vectors, names = component.facts["vectors"], [*component.facts["terms"], OFFSET]
    near, said = max(WITHIN * left, NEAR), {}
    # What is added is known as exactly as the result, not as it is itself.
    whole = max(norm_of(each) for each in right)
    for place, (a, b, name) in enumerate(zip(right, found, names, strict=True)):
        if norm_of(a - b) <= near * whole:
            continue
        what = _named(b, vectors, near, near * whole, FORMS)
        was = _named(a, vectors, near, near * whole, PLAIN)
        if what is None or what == was:
            return None
        said[place] = what, _words(name, what, was)
    return said


def _named(
    vector: np.ndarray, vectors: Mapping[str, np.ndarray], near: float, nothing: float, forms: Sequence[str]
) -> str | None:
    """What a vector [batch, channels] is: a number, one that there is, or a function of one; None for none of these."""
    if norm_of(vector) <= nothing:
        return "0"
    number, said = plainest(float(np.mean(vector)), near * float(np.abs(vector).max()))
    if number and norm_of(vector - number) <= near * norm_of(vector):
        return said
    best = None
    for rank, (form, name) in enumerate(pairs(forms, vectors)):
        far = rel_l2(vector, FORMS[form](vectors[name]))
        if far is not None and far <= near and (best is None or (round(far, 6), rank) < best[0]):
            best = (round(far, 6), rank), form.format(name)
    return best and best[1]


def _value(said: str, vectors: Mapping[str, np.ndarray], shape: Sequence[int]) -> np.ndarray | None:
    """The vector that is called so."""
    for form, function in FORMS.items():
        before = form.removesuffix("{}")
        if said.startswith(before) and said.removeprefix(before) in vectors:
            return np.broadcast_to(function(vectors[said.removeprefix(before)].astype(np.float64)), shape)
    try:
        return np.full(shape, float(said))
    except ValueError:
        return None


def _words(name: str, what: str, was: str | None) -> str:
    instead = "" if was is None else f" instead of {was}"
    if name == OFFSET:
        return f"{what} is added{instead}" if what != "0" else f"{was or OFFSET} is not added"
    if what == "0":
        return f"{name} is left out"
    if what == "1" and was is not None:
        return f"{name} is not multiplied by {was}"
    return f"{name} is multiplied by {what}{instead}"


def _below(component: Component, got: np.ndarray, allowed: float) -> Iterator[Law]:
    """What is normed is made with another factor, and the modulation may be another too."""
    inner, facts = [component.inputs[name] for name in component.facts["norm"]["terms"]], component.facts
    if not inner:
        return
    x, eps = component.inputs["x"], facts["norm"]["eps"]
    by, some = factors(inner, x), slice(None, None, max(x.shape[1] // TOKENS, 1))
    sampled = allowed * (x[:, some].size / x.size) ** 0.5
    ways = pairs(range(len(inner)), ("0", "1", *(f.format(v) for f, v in pairs(list(FORMS)[:4], facts["vectors"]))))
    for place, what in ways:
        instead = _value(what, facts["vectors"], by[place].shape)
        more = (instead - by[place])[:, None]
        base = normed(x[:, some] + more * inner[place][:, some], eps)
        if norm_of(got[:, some] - product([base], factors([base], got[:, some]))) > 2 * sampled:
            continue
        base = normed(x + more * inner[place], eps)
        found = factors([base], got)
        left = norm_of(got - product([base], found))
        said = _differing(component, factors(_terms(component), component.own), found, left / max(norm_of(got), 1e-30))
        was = _named(by[place], facts["vectors"], 1e-3, 1e-3 * norm_of(by), PLAIN)
        if left > allowed or said is None or what == was:
            continue

        def apply(other: Component, place: int = place, what: str = what, said=said) -> np.ndarray | None:
            terms, norm = _terms(other), other.facts.get("norm")
            if terms is None or norm is None or place >= len(norm["terms"]):
                return None
            part = other.inputs[norm["terms"][place]]
            right = factors([other.inputs[name] for name in norm["terms"]], other.inputs["x"])[place]
            instead = _value(what, other.facts["vectors"], right.shape)
            if instead is None:
                return None
            base = normed(other.inputs["x"] + (instead - right)[:, None] * part, norm["eps"])
            base = terms[0] + (base - normed(other.inputs["x"], norm["eps"]))
            return _changed(other, terms, [base], {at: new for at, (new, _) in said.items()})

        words = [f"in what is normed {_words(facts['norm']['terms'][place], what, was)}"]
        yield Law(listed([*words, *(each for _, each in said.values())]), 1.5 + len(said), apply)
        return
