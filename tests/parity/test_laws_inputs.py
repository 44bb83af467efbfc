"""Laws of what a model is given, read from made-up inputs: table rows, sines and cosines, pixels."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from parity.lance.components.visuals import CLIP, IMAGENET, PATCHES, STATISTICS, patches_of, pixels_of
from parity.laws import Component, fitted
from parity.laws.waves import ORDERS, Perceptron, Waves

SEEDS = (0, 1, 2)
GRID = (2, 2, 3)
NUMBERS = (np.indices((3, 4, 5)).reshape(3, -1).T).astype(np.float64)
WIDTHS = (20, 20, 24)
PLACES, TIMES = Waves(10000.0, "sines first"), Waves(10000.0, "cosines first")


def of(kind, own, inputs, facts, rounding=1e-6):
    own = own.astype(np.float32)
    return Component(kind, inputs, facts, own, rounding * float(np.linalg.norm(own)))


def says(component, got):
    """The smallest law that leaves no more than rounding."""
    got = np.asarray(got, np.float32)
    whole = np.linalg.norm(got.astype(np.float64) - component.own)
    laws = [law for law in fitted(component, got) if np.linalg.norm(got - law.apply(component)) <= 2e-3 * whole]
    found = min(laws, key=lambda law: law.size, default=None)
    return found and found.sentence


def table(seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((300, 32)).astype(np.float32)
    ids = rng.permutation(280)[:40].astype(np.int32)
    facts = {"table": rows, "axes": ("token", "channel"), "what": "the embedding"}
    return of("embedding", rows[ids], {"ids": ids}, facts), rows, ids


def places(waves=PLACES, numbers=NUMBERS):
    return np.concatenate([waves.of(numbers[:, axis], width) for axis, width in enumerate(WIDTHS)], 1)


def of_places():
    facts = {"widths": WIDTHS, "waves": PLACES, "names": ("frames", "rows", "columns"), "grid": (3, 4, 5),
             "axes": ("latent", "channel"), "what": "the embedding of places"}  # fmt: skip
    return of("sinusoids", places(), {"places": NUMBERS}, facts)


def of_times(seed):
    rng = np.random.default_rng(seed)
    layers = Perceptron(*(0.1 * rng.standard_normal(s) for s in ((48, 64), (48,), (32, 48), (32,))))
    t = np.array([0.9130435, 0.0])
    facts = {"waves": TIMES, "width": 64, "layers": layers, "axes": ("time", "channel"), "what": "the embedding of t",
             "times": {"that of the step after it": 0.7777778}}  # fmt: skip
    return of("time", layers(TIMES.of(t, 64)), {"numbers": t}, facts), layers, t


def pixels(seed):
    """Patches of smooth 8-bit pixels, and the pixels [3, frames, h, w]."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (3, 4, 8, 12))
    fine = np.kron(coarse, np.ones((1, 1, 7, 7))) + rng.uniform(-9, 9, (3, 4, 56, 84))
    eight = np.round(np.clip(fine, 0, 255)).astype(np.float32) / np.float32(255)
    facts = {"view": partial(pixels_of, GRID), "back": partial(patches_of, GRID), "what": "the ViT's pixels",
             "mean": CLIP[0], "deviation": CLIP[1], "known": STATISTICS, "patches": PATCHES}  # fmt: skip
    return of("preprocess", patched(eight, *CLIP), {}, facts, 0), eight


def patched(eight, mean, deviation):
    mean, deviation = (np.array(values, np.float32).reshape(3, 1, 1, 1) for values in (mean, deviation))
    return patches_of(GRID, (eight - mean) / deviation)


@pytest.mark.parametrize("seed", SEEDS)
def test_which_rows_of_a_table_are_taken_is_read(seed):
    component, rows, ids = table(seed)
    one = ids.copy()
    one[5] = 299
    for sentence, got in {
        "the rows of the table that are taken are off by +1": rows[ids + 1],
        "the rows of the table that are taken are at most 99": rows[np.minimum(ids, 99)],
        "the token 1 behind is embedded": rows[np.roll(ids, -1)],
        f"the rows of the table that are taken are 299 where {ids[5]} should be": rows[one],
        "the embedding is 8 times as large": 8 * rows[ids],
    }.items():
        if "99" not in sentence or (ids == 99).any() or "299" in sentence:
            assert says(component, got) == sentence


def test_waves_of_places_are_read():
    component, turned = of_places(), NUMBERS[:, [0, 2, 1]]
    for sentence, got in {
        "cosines come first": places(replace(PLACES, order="cosines first")),
        "sines and cosines alternate": places(replace(PLACES, order=ORDERS[2])),
        "the longest period is 1000": places(replace(PLACES, period=1000.0)),
        "frequencies are spaced by their number less 1": places(replace(PLACES, less=1.0)),
        "the places are off by +1": places(replace(PLACES, offset=1.0)),
        "the places count 0.5 times": places(replace(PLACES, scale=0.5)),
        "the places count 16/3 times": places(replace(PLACES, scale=16 / 3)),
        "the places count 4 times": places(replace(PLACES, scale=4.0)),
        "of columns the places are off by +2": places(numbers=NUMBERS + [0, 0, 2]),
        "of rows the places are those of columns and of columns the places are those of rows": places(numbers=turned),
        "the embedding of places is 0.5 times as large": 0.5 * places(),
    }.items():
        assert says(component, got) == sentence


@pytest.mark.parametrize("seed", SEEDS)
def test_waves_of_a_time_are_read_through_the_layers(seed):
    component, layers, t = of_times(seed)
    through = lambda waves=TIMES, net=layers, t=t: net(waves.of(t, 64))  # noqa: E731
    for sentence, got in {
        "t counts 1000 times": through(replace(TIMES, scale=1000.0)),
        "sines come first": through(replace(TIMES, order="sines first")),
        "the longest period is 300": through(replace(TIMES, period=300.0)),
        "frequencies are spaced by their number less 1": through(replace(TIMES, less=1.0)),
        "sines come first and t counts 1000 times": through(Waves(10000.0, "sines first", 1000.0)),
        "the activation is gelu": through(net=replace(layers, activation="gelu")),
        "the second bias is left out": through(net=replace(layers, bias=(True, False))),
        "t is that of the step after it": through(t=np.full(2, 0.7777778)),
    }.items():
        assert says(component, got) == f"in the embedding of t {sentence}"


@pytest.mark.parametrize("seed", SEEDS)
def test_only_as_many_means_and_deviations_are_told_as_differ(seed):
    component, eight = pixels(seed)
    one = (CLIP[1][0], 0.224, CLIP[1][2])
    for sentence, got in {
        "the deviation is ImageNet's": patched(eight, CLIP[0], IMAGENET[1]),
        "the mean is ImageNet's and the deviation is ImageNet's": patched(eight, *IMAGENET),
        "the deviation of green alone is 0.224": patched(eight, CLIP[0], one),
        "the mean is 0 and the deviation is 1": patched(eight, (0, 0, 0), (1, 1, 1)),
        "the mean is 0 and the deviation is 1/255": patched(eight, (0, 0, 0), (1 / 255,) * 3),
    }.items():
        law = fitted(component, got)[0]
        assert law.sentence == f"the ViT's pixels are normalised by others: {sentence}"
    assert np.array_equal(fitted(component, patched(eight, *IMAGENET))[0].apply(component), patched(eight, *IMAGENET))


@pytest.mark.parametrize("seed", SEEDS)
def test_pixels_that_stand_elsewhere_are_read(seed):
    component, eight = pixels(seed)
    values = component.own.reshape(-1, 3, 2, 14, 14)
    for sentence, got in {
        "the ViT's pixels have their colours in reverse": patches_of(GRID, pixels_of(GRID, component.own)[::-1]),
        "the ViT's pixels are mirrored": patched(eight[..., ::-1], *CLIP),
        "the ViT's pixels are moved 1 right": patched(np.roll(eight, 1, -1), *CLIP),
        "the ViT's pixels have frames in reverse": patched(eight[:, ::-1], *CLIP),
        "the ViT's pixels are moved 1 right and are normalised by others: the deviation is ImageNet's": patched(
            np.roll(eight, 1, -1), CLIP[0], IMAGENET[1]
        ),
        "the ViT's pixels are clamped to [-1, 1]": np.clip(component.own, -1, 1),
        "the values of a patch are in the order frame, colour, row, column": values.swapaxes(1, 2).reshape(
            component.own.shape
        ),
    }.items():
        assert says(component, got) == sentence


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_read_from_what_is_right_from_noise_and_from_what_is_degenerate(seed):
    rng = np.random.default_rng(seed + 10)
    for component in (table(seed)[0], of_places(), of_times(seed)[0], pixels(seed)[0]):
        assert fitted(component, component.own) == []
        assert fitted(component, rng.standard_normal(component.own.shape).astype(np.float32)) == []
        assert fitted(component, np.full_like(component.own, np.nan)) == []
        assert fitted(component, component.own[:1]) == []
        fitted(component, np.zeros_like(component.own))
