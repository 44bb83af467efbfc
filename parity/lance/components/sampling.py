"""The flow sampler: guidance, Euler steps, times, noise, and the latents that the VAE's encoder is sampled for."""

from typing import TYPE_CHECKING, Any

import numpy as np

from parity.hypotheses.base import DoesNotApply
from parity.lance.components.base import Known
from parity.lance.hypotheses.tools import times_of
from parity.lance.names import velocity_calls
from reference.request import Renorm
from reference.vae import DEVIATION, MEAN

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

RENORMS = {Renorm.GLOBAL: "global", Renorm.CHANNEL: "per token", Renorm.NONE: "none"}
Read = tuple[dict[str, np.ndarray], dict[str, Any]]
ROWS = ("latent", "channel")


def present(**values: np.ndarray | None) -> dict[str, np.ndarray]:
    """The arrays that are there, by their names with spaces."""
    return {name.replace("_", " "): array for name, array in values.items() if array is not None}


def target_grid(site: "TapProbe", rows: int) -> tuple[int, int, int] | None:
    """Frames, rows and columns of some latents at the end of the state; None where they are more than the target's."""
    grid = site.layout.target.grid
    area = grid.rows * grid.columns
    return (rows // area, grid.rows, grid.columns) if rows <= grid.size and not rows % area else None


def arm_velocity(site: "TapProbe", arm: str, step: int) -> np.ndarray | None:
    """The velocity of one arm in a step, [rows, 48]; None where it has none."""
    guided = site.oracle.bundle.guided
    calls = velocity_calls(guided)
    if (arm, step) not in calls:
        return None
    found = site.value(f"velocity_call{calls.index((arm, step))}") if site.entry == "full_sequence" else None
    block = site.value(f"{arm}.step{step}/llm2vae")
    if found is None and block is not None:
        found = block[1:-1]
    return found


def guidance(site: "TapProbe") -> Read:
    """cond, uncond [n, 48]; see parity.laws.guidance."""
    if not site.tap.name.startswith("sampler.velocity"):
        raise DoesNotApply
    step, request = site.tap.numbers["step"], site.request
    arms = {arm: arm_velocity(site, arm, step) for arm in ("cond", "uncond")}
    if arms["cond"] is None or arms["cond"].shape != site.expected.shape:
        raise DoesNotApply
    return present(**arms), {
        "scale": request.cfg_text_scale,
        "renorm": RENORMS[request.cfg_renorm_type],
        "minimum": request.cfg_renorm_min,
        "t": float(times_of(site)[step]),
        "step": step,
        "steps": request.num_steps,
        "grid": target_grid(site, len(site.expected)),
        "axes": ROWS,
        "what": "the guided velocity",
    }


def guided(site: "TapProbe") -> Read:
    """Whether each step is guided."""
    if site.tap.name != "inputs/guided":
        raise DoesNotApply
    return {}, {"times": times_of(site), "interval": site.request.cfg_interval}


def euler(site: "TapProbe") -> Read:
    """x_t, velocity and the one before [n, 48]; see parity.laws.sampling."""
    step = site.tap.numbers.get("step", site.request.num_steps) - 1
    state, noise = site.value(f"sampler.x_t{step}"), site.value("sampler.noise")
    velocity, before = (site.value(f"sampler.velocity{number}") for number in (step, step - 1))
    if step < 0 or state is None or velocity is None:
        raise DoesNotApply
    layout, shape = site.layout, site.expected.shape
    own = int(np.prod(shape[:-1]))
    made = np.isin(layout.latent_rows, layout.made_rows)

    def rows(array: np.ndarray | None) -> np.ndarray | None:
        """The last rows, those that there are none of being 0."""
        if array is None:
            return None
        whole = np.zeros((len(state), array.shape[-1]), np.float32)
        whole[len(state) - len(array) :] = array
        return whole[len(state) - own :].reshape(shape)

    inputs = present(velocity=rows(velocity), the_noise=rows(noise), the_velocity_before=rows(before))
    facts = {"times": times_of(site), "step": step, "made": made[len(made) - own :].reshape(*shape[:-1], 1)}
    axes = ROWS if len(shape) == 2 else ("frame", "row", "column", "channel")
    extra = {"grid": target_grid(site, own), "axes": axes, "what": "the state"}
    return {"x_t": rows(state), **inputs}, facts | extra


def schedule(site: "TapProbe") -> Read:
    """t at every boundary."""
    if site.tap.name != "inputs/timesteps":
        raise DoesNotApply
    return {}, {"shift": site.request.timestep_shift, "steps": site.request.num_steps}


def latent_times(site: "TapProbe") -> Read:
    """t of every latent."""
    if not site.tap.name.startswith("sampler.timestep"):
        raise DoesNotApply
    made = np.isin(site.layout.latent_rows, site.layout.made_rows)
    return {}, {"times": times_of(site), "step": site.tap.numbers["step"], "made": made, "axes": ("latent",)}


def noise(site: "TapProbe") -> Read:
    """The noise and the clean latents [n, 48] that a first state is put together from."""
    name = site.tap.name
    if name.startswith("sampler."):
        drawn, index, clean = site.value("sampler.noise"), 0, []
        while (latent := site.value(f"vae.latent{index}")) is not None:
            clean.append(latent.reshape(-1, latent.shape[-1]))
            index += 1
        given = np.concatenate(clean) if clean else None
        facts = {"grid": target_grid(site, len(site.expected)), "axes": ROWS}
        if name == "sampler.noise":
            return present(the_clean_latents=given), facts | {"what": "the noise"}
        return present(the_noise=drawn, the_clean_latents=given), facts | {"what": "the first state"}
    return {}, {"axes": ("picture", "channel", "frame", "row", "column"), "what": "the noise of the sample"}


def sample(site: "TapProbe") -> Read:
    """What a latent [t, h, w, 48] is sampled from: its mean and its noise in several units."""
    index = site.tap.numbers["index"]
    parts = [site.value(f"vae.encode{index}.{part}") for part in ("mean", "logvar", "eps")]
    if any(part is None for part in parts):
        raise DoesNotApply
    mean, logvar, eps = (np.moveaxis(part[0], 0, -1) for part in parts)
    inputs = {
        "the mean": mean,
        "the deviation times the noise": np.exp(0.5 * logvar) * eps,
        "the variance times the noise": np.exp(logvar) * eps,
        "the noise": eps,
        "the log-variance times the noise": logvar * eps,
        "the deviation": np.exp(0.5 * logvar),
    }
    return inputs, {"axes": ("frame", "row", "column", "channel"), "what": "the latent"}


def mean(site: "TapProbe") -> Read:
    """The normalised mean [1, 48, t, h, w]."""
    return {}, {"mean": MEAN, "deviation": DEVIATION, "what": "the mean",
                "axes": ("picture", "channel", "frame", "row", "column")}  # fmt: skip


def logvar(site: "TapProbe") -> Read:
    """The log-variance [1, 48, t, h, w] beside the mean."""
    beside = site.value(site.tap.name.replace("logvar", "mean"))
    return present(the_mean=beside), {
        "what": "the log-variance",
        "axes": ("picture", "channel", "frame", "row", "column"),
    }


def velocity(site: "TapProbe") -> Read:
    """The velocity of one arm, [n, 48]."""
    return {}, {"grid": target_grid(site, len(site.expected)), "axes": ROWS, "what": "the velocity"}


KNOWN = (
    Known("guidance", ("guidance",), guidance),
    Known("guided", ("guidance",), guided),
    Known("euler", ("euler",), euler),
    Known("schedule", ("schedule",), schedule),
    Known("times", ("schedule",), latent_times),
    Known("array", ("noise",), noise),
    Known("array", ("vae.encoder.sample",), sample),
    Known("normalised", ("vae.encoder.mean",), mean),
    Known("array", ("vae.encoder.logvar",), logvar),
    Known("array", ("velocity*",), velocity),
)
