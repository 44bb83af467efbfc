"""Laws of the sampler, read from made-up inputs: guidance, Euler steps, times, noise, statistics."""

from dataclasses import replace

import numpy as np
import pytest

from parity.laws import LAWS, Component, fitted
from parity.laws.renorm import Renorm
from parity.laws.rounding import bfloat16
from parity.laws.schedule import shifted

SEEDS = (0, 1, 2)
TIMES = shifted(np.linspace(1, 0, 5), 3.5)
AXES = ("latent", "channel")


def arrays(seed, count=4, shape=(24, 48)):
    """Arrays of which the second is near the first, as two velocities are."""
    rng = np.random.default_rng(seed)
    first, *others = rng.standard_normal((count, *shape)).astype(np.float32)
    return [first, (first + 0.4 * others[0]).astype(np.float32), *others[1:]]


def of(kind, own, inputs, facts, rounding=1e-6):
    own = own.astype(np.float32)
    axes = tuple(facts.get("axes", ()))
    return Component(kind, inputs, facts, own, rounding * float(np.linalg.norm(own)), axes)


def mixed(cond, uncond, scale, renorm):
    guided = uncond + scale * (cond - uncond)
    return guided * renorm.factor(cond, uncond, guided)


def guidance(seed, step=1):
    cond, uncond, *_ = arrays(seed)
    facts = {"scale": 4.0, "renorm": "global", "minimum": 0.0, "t": TIMES[step], "step": step, "steps": 4,
             "axes": AXES, "grid": (2, 3, 4), "what": "the guided velocity"}  # fmt: skip
    own = mixed(cond, uncond, 4.0, Renorm("global"))
    return of("guidance", own, {"cond": cond, "uncond": uncond}, facts), cond, uncond


def euler(seed, step=1):
    velocity, before, state, noise = arrays(seed)
    made = np.ones((24, 1), bool)
    made[:6] = False
    interval = TIMES[step] - TIMES[step + 1]
    inputs = {"x_t": state, "velocity": velocity, "the velocity before": before, "the noise": noise}
    facts = {"times": TIMES, "step": step, "made": made, "axes": AXES, "grid": (4, 2, 3), "what": "the state"}
    own = np.where(made, state - interval * velocity, state)
    return of("euler", own, inputs, facts), made, interval


def best(component, got):
    """The smallest law that leaves no more than rounding."""
    got = np.asarray(got, component.own.dtype)
    whole = np.linalg.norm(got.astype(np.float64) - component.own)
    laws = []
    for law in fitted(component, got):
        value = law.apply(component)
        if value is not None and value.shape == got.shape and np.linalg.norm(got - value) <= 2e-3 * whole:
            laws.append(law)
    return min(laws, key=lambda law: law.size, default=None)


def says(component, got):
    law = best(component, got)
    return law and law.sentence


def test_of_two_ways_to_say_it_the_one_with_fewer_numbers_is_told():
    component, cond, _ = guidance(0)
    # In bfloat16 all channels are rounded otherwise, three of them are guided.
    component = replace(component, own=bfloat16(component.own), rounding=9e-4 * float(np.linalg.norm(component.own)))
    off = np.random.default_rng(1).choice([1, 1 + 2.0**-7], component.own.shape)
    got = np.where(np.arange(48) < 3, bfloat16(component.own * off), bfloat16(cond))
    assert says(component, got) == "from channel 3 on the guided velocity is cond"


@pytest.mark.parametrize("seed", SEEDS)
def test_velocities_that_are_mixed_otherwise_and_noise_that_is_brought_to_a_deviation_are_told(seed):
    component, cond, uncond = guidance(seed)
    step = cond - uncond
    guided = cond + 3 * (step - np.vdot(step, cond) / np.vdot(cond, cond) * cond)
    got = guided * Renorm("global").factor(cond, uncond, guided)
    assert says(component, got) == "guidance leaves out what lies along the conditional velocity"
    noise, *_ = arrays(seed)
    component = of("array", noise, {}, {"what": "the noise", "grid": (2, 3, 4), "axes": AXES})
    assert says(component, (noise - noise.mean()) / noise.std()) == "the noise is brought to mean 0 and deviation 1"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_guidance_scale_and_how_it_is_scaled_back_are_read(seed):
    component, cond, uncond = guidance(seed)
    glob = Renorm("global")
    scale = np.full((1, 48), 4.0)
    scale[0, 7] = 1.5
    rows = np.full((24, 1), 4.0)
    rows[12:] = 2
    for sentence, got in {
        "the guidance scale is 3.2": mixed(cond, uncond, 3.2, glob),
        "there is no renorm": mixed(cond, uncond, 4, Renorm("none")),
        "the renorm is per token": mixed(cond, uncond, 4, Renorm("per token")),
        "the guidance scale is 5 and the renorm is per token": mixed(cond, uncond, 5, Renorm("per token")),
        "the renorm is at least 0.9": mixed(cond, uncond, 4, Renorm("global", low=0.9)),
        "the renorm is used to 0.7": mixed(cond, uncond, 4, Renorm("global", blend=0.7)),
        "in channel 7 alone the guidance scale is 1.5": mixed(cond, uncond, scale, glob),
        "in frame 1 alone the guidance scale is 2": mixed(cond, uncond, rows, glob),
        "the guided velocity is negated": -component.own,
        "the guided velocity is 1.01 times as large": component.own * 1.01,
        "the guidance scale is 1": cond,
        "the guided velocity is uncond": uncond,
    }.items():
        assert says(component, got) == sentence


def test_a_scale_that_falls_with_t_is_true_of_another_step_too():
    component, cond, uncond = guidance(0, 1)
    got = mixed(cond, uncond, 1 + 3 * TIMES[1], Renorm("global")).astype(np.float32)
    other, cond, uncond = guidance(3, 2)
    there = mixed(cond, uncond, 1 + 3 * TIMES[2], Renorm("global"))
    true = [law.sentence for law in fitted(component, got)
            if np.linalg.norm(law.apply(other) - there) < 1e-4 * np.linalg.norm(there)]  # fmt: skip
    assert true == ["the guidance scale falls with t, from the scale to 1"]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_length_of_a_step_and_what_mixes_in_are_read(seed):
    component, made, interval = euler(seed)
    state, velocity, before, noise = component.inputs.values()
    still = component.own.copy()
    still[10] = state[10]
    for sentence, got in {
        "the Euler step is as long as the one after it should be": state - (TIMES[2] - TIMES[3]) * velocity,
        "the Euler step is 1.05 times as long": state - 1.05 * interval * velocity,
        "the Euler step goes the other way": state + interval * velocity,
        "the Euler step moves nothing": state,
        "the Euler step makes x_t - 1.5 dt velocity + 0.5 dt the velocity before": (
            state - interval * (1.5 * velocity - 0.5 * before)
        ),
        "the Euler step makes x_t - dt velocity + 0.1 the noise": state - interval * velocity + 0.1 * noise,
    }.items():
        assert says(component, np.where(made, got, state)) == sentence
    assert says(component, still) == "in latent 10 alone the Euler step moves nothing"
    assert says(component, state - interval * velocity) == "in what is given the Euler step moves it too"


def test_what_a_step_moves_is_told_as_such_and_not_by_where_it_shows():
    component, made, _ = euler(0)
    got = np.where(made, component.own.clip(-2.5, 2.5), component.own)
    assert (np.abs(component.own[~made[:, 0]]) > 2.5).any()
    assert says(component, got) == "what is moved of the state is clamped to [-2.5, 2.5]"
    later, made, _ = euler(2, 2)
    expected = np.where(made, later.own.clip(-2.5, 2.5), later.own)
    np.testing.assert_array_equal(best(component, got).apply(later), expected)
    # Where some of it alone is held, it is told of that.
    at = int((made[:, 0] * (np.abs(component.own) > 2.5).sum(1)).argmax())
    one = np.where(np.arange(24)[:, None] == at, got, component.own)
    assert not any("what is moved" in law.sentence for law in fitted(component, one))


@pytest.mark.parametrize("rounding", [1e-6, 4e-3])
def test_a_law_holds_under_rounding(rounding):
    component, made, interval = euler(0)
    component = Component(component.kind, component.inputs, component.facts, component.own,
                          rounding * float(np.linalg.norm(component.own)))  # fmt: skip
    state, velocity, *_ = component.inputs.values()
    noise = rounding * np.random.default_rng(5).standard_normal(state.shape) / 2
    got = (np.where(made, state - 1.2 * interval * velocity, state) * (1 + noise)).astype(np.float32)
    sentences = [law.sentence for law in fitted(component, got)]
    assert "the Euler step is 1.2 times as long" in sentences


def test_in_bfloat16_the_numbers_are_read_too():
    cond, uncond, state, _ = (bfloat16(array) for array in arrays(0, shape=(120, 48)))
    interval = TIMES[1] - TIMES[2]
    facts = {"times": TIMES, "step": 1, "made": np.ones((120, 1), bool), "axes": AXES, "what": "the state"}
    step = of("euler", bfloat16(state - bfloat16(interval * cond)), {"x_t": state, "velocity": cond}, facts, 4e-4)
    got = bfloat16(state - bfloat16(np.float32(1.05 * interval) * cond))
    laws = {law.sentence: law.apply(step) for law in fitted(step, got)}
    assert np.mean(laws["the Euler step is 1.05 times as long"] == got) > 0.95
    facts = {"scale": 4.0, "renorm": "global", "minimum": 0.0, "t": 1.0, "step": 0, "steps": 4, "axes": AXES}
    own = bfloat16(mixed(cond, uncond, 4.0, Renorm("global")))
    component = of("guidance", own, {"cond": cond, "uncond": uncond}, facts, 4e-4)

    def rounded(scale):
        guided = bfloat16(uncond + bfloat16(scale * bfloat16(cond - uncond)))
        return bfloat16(guided * Renorm("global").factor(cond, uncond, guided))

    assert "the guidance scale is 3.2" in {law.sentence for law in fitted(component, rounded(3.2))}


def test_what_is_rounded_at_every_step_is_read_to_the_last_bit():
    cond, uncond, *_ = (bfloat16(array) for array in arrays(0, shape=(120, 48)))
    uncond *= np.float32(0.98)
    facts = {"scale": 4.0, "renorm": "global", "minimum": 0.0, "t": 1.0, "step": 0, "steps": 4, "axes": AXES}

    def rounded(to):
        guided = bfloat16(uncond + bfloat16(4 * bfloat16(cond - uncond)))
        ratio = bfloat16(bfloat16(np.linalg.norm(to)) / bfloat16(np.linalg.norm(guided)))
        return bfloat16(guided * ratio)

    component = of("guidance", rounded(cond), {"cond": cond, "uncond": uncond}, facts, 4e-4)
    law = fitted(component, rounded(uncond))[0]
    assert law.sentence == "the renorm aims at the unconditional velocity"
    np.testing.assert_array_equal(law.apply(component), rounded(uncond))


@pytest.mark.parametrize("shift", [2.0, 3.5, 7.0])
def test_times_are_read(shift):
    u = np.linspace(1, 0, 6)
    own = shifted(u, shift).astype(np.float32)
    component = of("schedule", own, {}, {"shift": shift, "steps": 5}, 0)
    last = own.copy()
    last[-1] = 0.001
    for sentence, got in {
        "the timestep shift is 3": shifted(u, 3.0),
        "the timestep shift is inverted": shifted(u, 1 / shift),
        "t is in reverse": own[::-1],
        "t is times 1000": own * 1000,
        "the schedule is a cosine": shifted((1 + np.cos(np.pi * (1 - u))) / 2, shift),
        "the last t alone is 0.001": last,
        "t is 0.98 t + 0.02": np.float32(0.98) * own + np.float32(0.02),
        "the schedule goes evenly from 0.999": shifted(np.linspace(0.999, 0, 6), shift),
        "the schedule goes evenly from 0.98 to 0.02": shifted(np.linspace(0.98, 0.02, 6), shift),
        "the schedule goes evenly to 0.001 and then to 0": shifted(np.append(np.linspace(1, 0.001, 5), 0), shift),
    }.items():
        assert says(component, got.astype(np.float32)) == sentence


def test_the_times_of_latents_are_read():
    made = np.arange(12) >= 4
    own = np.where(made, TIMES[1], 0).astype(np.float32)
    component = of("times", own, {}, {"times": TIMES, "step": 1, "made": made, "axes": ("latent",)}, 0)
    assert says(component, np.full(12, TIMES[1])) == "t of what is given is the step's t"
    assert says(component, np.where(made, TIMES[2], 0)) == "t is that of the step after it"
    assert says(component, np.where(np.arange(12) == 5, 0.5, own)) == "t in latent 5 alone is 0.5"


@pytest.mark.parametrize("seed", SEEDS)
def test_arrays_that_are_summed_or_laid_out_otherwise_are_read(seed):
    noise, _, clean, _ = arrays(seed)
    facts = {"what": "the noise", "grid": (2, 3, 4), "axes": AXES}
    component = of("array", noise, {"the clean latents": clean}, facts)
    seen = noise.reshape(2, 3, 4, 48)
    for sentence, got in {
        "the noise is 0.5 times as large": 0.5 * noise,
        "the noise is the noise + 0.1 the clean latents": noise + 0.1 * clean,
        "of the noise channels are reversed": noise[:, ::-1],
        "of the noise channels 1 and 2 are exchanged": noise[:, [0, 2, 1, *range(3, 48)]],
        "of the noise latents are rolled by 1": np.roll(noise, 1, 0),
        "of the noise frames are reversed": seen[::-1].reshape(24, 48),
        "of the noise rows and columns in memory are exchanged before they are laid out": (
            seen.swapaxes(1, 2).reshape(24, 48)
        ),
        "the noise is clamped to [-2, 2]": np.clip(noise, -2, 2),
        "in frame 1 alone the noise is negated": np.where(np.arange(24)[:, None] < 12, noise, -noise),
        "in channel 5 alone the noise is 0": np.where(np.arange(48) == 5, 0, noise),
    }.items():
        assert says(component, got) == sentence


def test_the_statistics_of_a_channel_are_read():
    rng = np.random.default_rng(0)
    mean, deviation = rng.uniform(-0.5, 0.5, 48), rng.uniform(0.4, 1.6, 48)
    own = rng.standard_normal((1, 48, 3, 4, 4)).astype(np.float32)
    component = of("normalised", own, {}, {"mean": mean, "deviation": deviation, "what": "the mean"})
    shape = (1, 48, 1, 1, 1)
    raw = own * deviation.reshape(shape) + mean.reshape(shape)
    assert says(component, raw) == "of the mean the mean is left out and the deviation is left out"
    other = deviation.copy()
    other[7] = 2.5
    got = (raw - mean.reshape(shape)) / other.reshape(shape)
    assert says(component, got) in (
        "of the mean the deviation of channel 7 alone is 2.5",
        f"in channel 7 alone the mean is {deviation[7] / 2.5:.4g} times as large",
    )


def test_which_steps_are_guided_is_read():
    component = Component("guided", {}, {"times": TIMES, "interval": (0.4, 1.0)}, np.ones(4, np.int32))
    assert fitted(component, np.array([1, 1, 1, 0]))[0].sentence.startswith("guidance acts where t is above about")
    assert {law.sentence for law in fitted(component, np.array([0, 0, 0, 0]))} == {"guidance never acts"}
    assert [law.sentence for law in fitted(component, np.array([1, 0, 1, 0]))] == ["guidance acts in steps 0 and 2"]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_read_from_what_is_right_from_noise_and_from_what_is_degenerate(seed):
    rng = np.random.default_rng(seed + 10)
    noise = arrays(seed)[0]
    for component in (
        guidance(seed)[0],
        euler(seed)[0],
        of("array", noise, {}, {"axes": AXES}),
        of("normalised", rng.standard_normal((1, 6, 2, 3, 4)), {}, {"mean": np.zeros(6), "deviation": np.ones(6)}),
        of("schedule", shifted(np.linspace(1, 0, 9), 3.5), {}, {"shift": 3.5, "steps": 8}, 0),
    ):
        assert fitted(component, component.own) == []
        assert fitted(component, rng.standard_normal(component.own.shape).astype(np.float32)) == []
        assert fitted(replace(component, axes=()), np.full_like(component.own, np.nan)) == []
        # Of known axes it is said that what is behind the first is missing.
        assert fitted(replace(component, axes=()), component.own[:1]) == []
        for law in fitted(component, np.zeros_like(component.own)):
            assert np.linalg.norm(law.apply(component)) <= component.rounding


def test_every_kind_has_fitters():
    assert {"guidance", "euler", "schedule", "times", "guided", "array", "normalised"} <= set(LAWS)
