"""A step of the optimizer as a component: AdamW, schedule, clipping and average against PyTorch's, gradients given.

What is different is read off by simulating the steps under every single change that a port may have made.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn
import numpy as np
import torch

from lance_mlx.training import step as mlx_step
from parity.lance.training.bundle import TrainingBundle
from parity.lance.training.torch_side import TorchTraining
from parity.localize.findings import EXPLAINS, LOCAL, Explanation, Finding
from parity.tensors.rounding import ULP
from reference.training import Optimizer, OptimizerSettings, gradients_of

STEPS = 4
_LOUD = (1.0, 0.2, 3.0, 0.7)
"""What the gradients are multiplied by, step by step, so that some are clipped and some are not."""
_ROUNDINGS = 64
"""Units in the last place of a parameter, beside its update, by which two right optimizers may be apart."""
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Changed:
    """One way to step that is not AdamW's; the defaults are."""

    eps_inside: bool = False
    first: bool = True
    second: bool = True
    decay: str = "decoupled"
    clip: str = "total"
    ahead: int = 0
    betas: tuple[float, float] | None = None
    average: str = "after"
    times: float = 1.0
    rounded: bool = False


CHANGES: dict[str, Changed] = {
    "eps is inside of the root": Changed(eps_inside=True),
    "the moments are not corrected for their bias": Changed(first=False, second=False),
    "the first moment is not corrected for its bias": Changed(first=False),
    "the second moment is not corrected for its bias": Changed(second=False),
    "decay is added to the gradient": Changed(decay="gradient"),
    "decay is not scaled by the learning rate": Changed(decay="unscaled"),
    "nothing is decayed": Changed(decay="none"),
    "matrices alone are decayed": Changed(decay="matrices"),
    "gradients are not clipped": Changed(clip="none"),
    "each parameter is clipped by itself": Changed(clip="each"),
    "gradients are clipped element by element": Changed(clip="value"),
    "gradients are always scaled to the bound": Changed(clip="always"),
    "the schedule is a step ahead": Changed(ahead=1),
    "the schedule is a step late": Changed(ahead=-1),
    "there is no warmup": Changed(ahead=10**6),
    "beta2 is 0.999": Changed(betas=(0.9, 0.999)),
    "the betas are exchanged": Changed(betas=(0.95, 0.9)),
    "there is no first moment": Changed(betas=(0.0, 0.95)),
    "the average takes in the step before": Changed(average="late"),
    "the average's weights are exchanged": Changed(average="exchanged"),
    "the average is never moved": Changed(average="never"),
    "updates go up the gradient": Changed(times=-1.0),
    "gradients are halved before they are clipped": Changed(times=0.5),
    "gradients are doubled before they are clipped": Changed(times=2.0),
    "parameters are rounded to bfloat16 after each step": Changed(rounded=True),
}


class _Torch(torch.nn.Module):
    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        for name, array in arrays.items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(array.copy())))


class _Mlx(mlx.nn.Module):
    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        for name, array in arrays.items():
            self[name] = mx.array(array)


def optimizer_findings(bundle: TrainingBundle, side: TorchTraining) -> Iterator[Finding]:
    """What is wrong by itself about a step, nothing where it is PyTorch's."""
    parameters, gradients = _given(bundle, side)
    settings = _settings(bundle, gradients)
    right, got = _torch_steps(parameters, gradients, settings), _mlx_steps(parameters, gradients, settings)
    allowed = _ROUNDINGS * ULP["float32"] * _norm(parameters) / _norm(_moved(right, parameters))
    error = _apart(right, got, parameters)
    if error <= allowed:
        return
    tried = [(name, 1 - _apart(_simulated(parameters, gradients, settings, change), got, parameters) / error)
             for name, change in CHANGES.items()]  # fmt: skip
    ranked = [Explanation(name, share) for name, share in sorted(tried, key=lambda each: -each[1]) if share > 0]
    component = "average" if _apart(_of(right, "w"), _of(got, "w"), parameters) <= allowed else "optimizer"
    best = ranked[0].name if ranked and ranked[0].residual_removed >= EXPLAINS else ""
    component = "clipping" if "clipped" in best else "schedule" if "schedule" in best or "warmup" in best else component
    yield Finding(component, "step1", "step1", LOCAL, error, allowed / 2, explanations=ranked[:5], allowed=allowed,
                  detail=f"in {STEPS} steps from the given gradients and state", rated=False)  # fmt: skip


def _given(bundle: TrainingBundle, side: TorchTraining) -> tuple[Arrays, list[Arrays]]:
    """Some parameters of each form, in float32, and their gradients of every step."""
    loss = side.forward().loss
    found = {name: each.float().numpy() for name, each in gradients_of(side.model, loss).items()}
    start = bundle.unrounded()
    live = sorted((n for n in found if found[n].any()), key=lambda n: (found[n].size, n))
    vectors, matrices = ([n for n in live if (found[n].ndim > 1) is many] for many in (False, True))
    chosen = [*vectors[:3], *vectors[-2:], *matrices[:2]]
    flat = {name: name.replace(".", "_") for name in chosen}
    gradients = [{flat[n]: found[n] * np.float32(loud) for n in chosen} for loud in _LOUD]
    return {flat[n]: start[n].copy() for n in chosen}, gradients


def _settings(bundle: TrainingBundle, gradients: list[Arrays]) -> OptimizerSettings:
    """The bundle's, with numbers for what it leaves at nothing: all of the optimizer is to show."""
    given, values = bundle.training, np.concatenate([each.ravel() for each in gradients[0].values()])
    return OptimizerSettings(
        lr=1e-2, betas=(given["beta1"], given["beta2"]), eps=float(np.abs(values).mean()), weight_decay=0.3,
        warmup_steps=3, max_grad_norm=0.5 * _norm(gradients[0]), ema=0.75,
    )  # fmt: skip


def _torch_steps(parameters: Arrays, gradients: list[Arrays], settings: OptimizerSettings) -> list[Arrays]:
    module = _Torch(parameters)
    optimizer, found = Optimizer(module, settings), []
    for own in gradients:
        optimizer.step({name: torch.from_numpy(each) for name, each in own.items()})
        found.append({f"w.{n}": m.detach().numpy().copy() for n, m in optimizer.masters.items()}
                     | {f"average.{n}": m.numpy().copy() for n, m in optimizer.average.items()})  # fmt: skip
    return found


def _mlx_steps(parameters: Arrays, gradients: list[Arrays], settings: OptimizerSettings) -> list[Arrays]:
    module = _Mlx(parameters)
    told = mlx_step.OptimizerSettings(settings.lr, settings.betas, settings.eps, settings.weight_decay,
                                      settings.warmup_steps, settings.max_grad_norm, settings.ema)  # fmt: skip
    optimizer = mlx_step.Optimizer(told, {name: mx.array(each) for name, each in parameters.items()})
    found = []
    for own in gradients:
        optimizer.step(module, {name: mx.array(each) for name, each in own.items()})
        found.append({f"w.{n}": np.array(m) for n, m in optimizer.masters.items()}
                     | {f"average.{n}": np.array(m) for n, m in optimizer.average.items()})  # fmt: skip
    return found


def _simulated(parameters: Arrays, gradients: list[Arrays], settings: OptimizerSettings, how: Changed) -> list[Arrays]:
    """The same steps in float64, with a change."""
    w = {name: each.astype(np.float64) for name, each in parameters.items()}
    m, v = ({name: np.zeros_like(each) for name, each in w.items()} for _ in range(2))
    average, found, betas = dict(w), [], how.betas or settings.betas
    for step, given in enumerate(gradients):
        g = _clipped({n: how.times * each.astype(np.float64) for n, each in given.items()}, settings, how.clip)
        rate = settings.lr * min(max((step + how.ahead) / settings.warmup_steps, 0.0), 1.0)
        before = dict(w)
        for n in w:
            decay = settings.weight_decay * (how.decay != "none" and (how.decay != "matrices" or w[n].ndim > 1))
            if how.decay == "gradient":
                g[n], decay = g[n] + decay * w[n], 0.0
            m[n] = betas[0] * m[n] + (1 - betas[0]) * g[n]
            v[n] = betas[1] * v[n] + (1 - betas[1]) * g[n] ** 2
            first = m[n] / (1 - betas[0] ** (step + 1) if how.first else 1)
            second = v[n] / (1 - betas[1] ** (step + 1) if how.second else 1)
            root = np.sqrt(second + settings.eps) if how.eps_inside else np.sqrt(second) + settings.eps
            w[n] = w[n] * (1 - decay * (1 if how.decay == "unscaled" else rate)) - rate * first / root
            if how.rounded:
                w[n] = torch.from_numpy(w[n]).bfloat16().double().numpy()
        keep = settings.ema if how.average != "exchanged" else 1 - settings.ema
        taken = before if how.average == "late" else w
        if how.average != "never":
            average = {n: keep * average[n] + (1 - keep) * taken[n] for n in w}
        found.append({f"w.{n}": each for n, each in w.items()} | {f"average.{n}": e for n, e in average.items()})
    return found


def _clipped(gradients: Arrays, settings: OptimizerSettings, how: str) -> Arrays:
    bound, total = settings.max_grad_norm, _norm(gradients)
    if how == "value":
        return {n: np.clip(each, -bound, bound) for n, each in gradients.items()}
    if how == "each":
        return {n: each * min(1.0, bound / (_norm({n: each}) or 1)) for n, each in gradients.items()}
    factor = {"none": 1.0, "always": bound / total}.get(how, min(1.0, bound / (total + 1e-6)))
    return {n: each * factor for n, each in gradients.items()}


def _moved(steps: list[Arrays], start: Arrays) -> Arrays:
    return {f"{i}.{n}": each.astype(np.float64) - start[n.partition(".")[2]] for i, step in enumerate(steps)
            for n, each in step.items()}  # fmt: skip


def _of(steps: list[Arrays], what: str) -> list[Arrays]:
    return [{n: each for n, each in step.items() if n.startswith(f"{what}.")} for step in steps]


def _apart(right: list[Arrays], got: list[Arrays], start: Arrays) -> float:
    one, other = _moved(right, start), _moved(got, start)
    if one.keys() != other.keys():
        return float("inf")
    return _norm({n: one[n] - other[n] for n in one}) / (_norm(one) or 1)


def _norm(arrays: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(each, dtype=np.float64).sum() for each in arrays.values())))
