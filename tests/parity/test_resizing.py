"""Hypotheses about resizing: each makes another picture than upstream does, and the right one explains a fault."""

import numpy as np
import pytest
from fault_trials import try_fault

from parity.bundle.reading import read_bundle
from parity.hypotheses import attempt
from parity.hypotheses.tap_probe import TapProbe
from parity.lance.faults import CATALOGUE
from parity.lance.hypotheses import resizing
from parity.lance.names import parse
from parity.lance.ports import MlxPort
from parity.oracle.oracle import Oracle

PLACES = [(name, "vae_pixels0") for name in ("image_edit-fp32-nokv", "i2v-fp32-nokv")]
PLACES.append(("image_edit-fp32-nokv", "vit_patches0"))


def site_at(oracle: Oracle, tap: str) -> TapProbe:
    array = oracle.bundle.inputs[tap].array
    if tap == "vae_pixels0" and oracle.bundle.task == "i2v":
        array = array[:, :1]
    return TapProbe(oracle, parse(f"inputs/{tap}"), array, array, {f"inputs/{tap}": array})


@pytest.mark.parametrize(("name", "tap"), PLACES)
def test_upstreams_own_way_makes_upstreams_picture_and_every_other_another(oracle_of, name, tap):
    site = site_at(oracle_of(name), tap)
    own = resizing.resized(resizing.Way(resizing.bucket))(site, site.expected)
    # Where a side is cut by an odd number of pixels, upstream draws which end loses more.
    assert own.shape == site.expected.shape and own.dtype == np.float32
    made = {h.name: attempt(site, [h]) for h in resizing.HYPOTHESES}
    other = {n for n, a in made.items() if a is not None and (a.shape != own.shape or not np.array_equal(a, own))}
    assert {"pictures are resized bilinearly", "pictures are resized by the Hamming filter"} <= other
    assert {"pictures are resized by the mean of the area", "pictures are stretched to a square"} <= other


@pytest.mark.parametrize("fault", ["visuals-stretched", "visuals-resized-bilinearly", "vit-pixels-not-clip-normalised"])
def test_the_right_way_explains_a_fault(oracle_of, fault):
    oracle = oracle_of("image_edit-fp32-nokv")
    tried = try_fault(CATALOGUE[fault], oracle.bundle, oracle, MlxPort(oracle.bundle))
    assert tried.named and tried.explained, tried.why


def test_without_the_pictures_none_applies(linked_bundle):
    site = site_at(Oracle.of(read_bundle(linked_bundle("image_edit-fp32-nokv"))), "vae_pixels0")
    assert all(attempt(site, [hypothesis]) is None for hypothesis in resizing.HYPOTHESES)
