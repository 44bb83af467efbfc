"""Every blind fault shows first in the component that it names, and leaves nothing behind."""

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from blind_faults import BLIND, KINDS, BlindFault

from parity.bundle.reading import Bundle, read_bundle
from parity.errors import ParityError
from parity.lance.faults import CATALOGUE
from parity.ports.loading import port_loader
from parity.ports.port import Port

ORACLES = Path(__file__).parents[1] / "oracles"
SHARED = ORACLES.parents[1] / "shared" / "oracles"
FASTEST_FIRST = ("t2i-fp32-kv", "x2t_image-fp32-nokv", "image_edit-fp32-nokv", "t2v-fp32-nokv", "i2v-fp32-nokv")
LONGER = ("x2t_video-fp32-kv",)
"""A bundle that is not embedded, for what shows in videos that are looked at."""
LEAST = 1e-4
"""Relative size that a fault has to have in its component somewhere in the run: more than rounding in float32."""
Taps = dict[str, np.ndarray]


class Everything:
    """All names of taps."""

    def __contains__(self, name: str) -> bool:
        return True


@cache
def bundle_of(name: str) -> Bundle | None:
    folder = next((root / name for root in (ORACLES, SHARED) if (root / name).is_dir()), None)
    return folder and read_bundle(folder)


@cache
def port_of(name: str) -> Port:
    """lance_mlx with a bundle's request loaded, cut to two steps or two tokens."""
    port = port_loader("mlx")(bundle_of(name))
    if port._asked.task.answers:
        port._asked = replace(port._asked, max_new_tokens=2, entry="kv_cache")
    else:
        port._asked = replace(port._asked, num_steps=2)
    return port


def taken(name: str) -> Taps:
    """What a run holds in the order in which it is made: prepared visuals, exact arrays, taps."""
    bundle, port = bundle_of(name), port_of(name)
    observed = port.run(Everything())
    taps = {f"inputs/{key}": array for key, array in (port.preprocessed(bundle.path.parent) or {}).items()}
    taps |= {key: tap.array for key, tap in observed.exact.items()}
    return taps | {key: tap.array for key, tap in observed.recording.items() if component(name, key)}


@cache
def component(name: str, tap: str) -> str:
    """The component of a tap; none for the integers of a layout."""
    try:
        return bundle_of(name).locate(tap).component
    except ParityError:
        return ""


@cache
def clean(name: str) -> Taps:
    return taken(name)


def distance(before: np.ndarray, after: np.ndarray) -> float:
    if before.shape != after.shape:
        return np.inf
    before, after = before.astype(np.float64), after.astype(np.float64)
    return float(np.linalg.norm(after - before) / max(np.linalg.norm(before), 1e-12))


def bundle_for(fault: BlindFault) -> str | None:
    """The fastest bundle that a fault suits; None where there is none here."""
    there = ((name, bundle_of(name)) for name in FASTEST_FIRST + LONGER)
    return next((name for name, bundle in there if bundle and fault.suits(bundle)), None)


def test_there_are_many_of_every_kind_and_their_names_are_unique():
    assert len({fault.name for fault in BLIND}) == len(BLIND) >= 96
    assert all(re.fullmatch(r"blind(-[a-z0-9]+)+", fault.name) for fault in BLIND)
    for kind, least in zip(KINDS, (45, 30, 12, 12), strict=True):
        assert sum(fault.kind == kind for fault in BLIND) >= least


def test_they_are_none_of_the_catalogue():
    assert not {fault.name for fault in BLIND} & CATALOGUE.keys()


def test_each_says_in_a_sentence_what_is_done_and_explains_nothing():
    for fault in BLIND:
        assert fault.about.endswith(".") and not re.search(r"\.\s+[A-Z]", fault.about), fault.name
        assert fault.explanation is None


SHOWN = [
    pytest.param(fault, id=fault.name, marks=[pytest.mark.exhaustive] if place % 4 else [])
    for place, fault in enumerate(BLIND)
]


@pytest.mark.parametrize("fault", SHOWN)
def test_a_fault_shows_first_in_its_component(fault):
    name = bundle_for(fault)
    if name is None:
        pytest.skip("no bundle here shows it")
    before = clean(name)
    with port_of(name).broken_by([fault]):
        after = taken(name)
    moved = [tap for tap in before if tap in after and not np.array_equal(before[tap], after[tap])]
    assert moved, f"{name} does not show it"
    assert fnmatchcase(component(name, moved[0]), fault.component), moved[0]
    own = [tap for tap in moved if fnmatchcase(component(name, tap), fault.component)]
    assert max(distance(before[tap], after[tap]) for tap in own) >= LEAST


@pytest.mark.parametrize("name", FASTEST_FIRST)
def test_nothing_is_left_behind(name):
    before = clean(name)
    with port_of(name).broken_by([fault for fault in BLIND if fault.suits(bundle_of(name))]):
        pass
    after = taken(name)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[tap], after[tap]) for tap in before)
