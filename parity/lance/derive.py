"""Derives anew what a bundle holds twice: integers from its request, and tensors that follow from others of its own.

No weights are needed. The reference's functions compute, and what they give is the bundle's own value up to the
roundings of the few operations in between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parity.bundle.reading import CONFIG, Bundle
from parity.errors import ParityError, one_line
from parity.lance.derived_request import DerivedRequest
from parity.lance.names import parse, velocity_calls
from parity.lance.record import draw
from parity.lance.recorded_taps import INPUTS
from parity.lance.weight_sums import require_checkpoint
from parity.tensors.recording import Tap
from reference.errors import ReferenceError
from reference.mot import LanguageModel, Rope
from reference.numerics import Numerics
from reference.preprocess import Preprocessed
from reference.sampler import advance, guide, start
from reference.understanding import BLOCK
from reference.vae import Posterior

ROUNDINGS = 10
"""Roundings, of half a last place each, by which a value may differ from the derived one: a guided step has ten.

On the machine that captured the present bundles there is no difference at all; other processors add up norms in another
order and have other cosines.
"""
HALF_PLACE = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
_EXPERTS = ("", "_moe_gen")


@dataclass(frozen=True)
class Derived:
    """One tensor that was derived anew; `problem` is None where it is what it must be, `few` where most of it is."""

    quantity: str
    tensor: str
    problem: str | None
    few: bool = False


def derive(bundle: Bundle) -> Iterator[Derived]:
    """Yield every tensor of a bundle that can be derived, with what is wrong with it."""
    try:
        facts = DerivedRequest(bundle)
        facts.layout  # noqa: B018 -- everything else starts from it
    except (ReferenceError, ParityError) as error:
        yield Derived("layout", "manifest.json", f"the request cannot be laid out: {error}")
        return
    parts: list[Callable[[DerivedRequest], Iterator[Derived]]] = [_integers, _media, _positions, _layers]
    parts += [_tokens] if facts.request.understanding else [_drawn, _encoded, _schedule, _steps, _pixels]
    yield from _all_of(parts, facts)


def _all_of(parts: Sequence[Callable[[DerivedRequest], Iterator[Derived]]], facts: DerivedRequest) -> Iterator[Derived]:
    for part in parts:
        try:
            with one_line("cannot be derived"):
                yield from part(facts)
        except ParityError as error:
            # Tensors that do not fit each other, which the parts before have named.
            yield Derived(part.__name__.strip("_"), "taps.safetensors", str(error))


def require_consistent(bundle: Bundle) -> None:
    """Raise ParityError where a bundle's checkpoint is not the capture's, or its request and its tensors contradict
    each other, as far as that is seen without a model: then nothing else that is said of it means anything.
    """
    require_checkpoint(bundle)
    if problem := _contradiction(bundle):
        likely = "the inputs: the request or the numerics is not the capture's: restore manifest.json"
        if problem.what.startswith("inputs/") and CONFIG not in bundle.manifest:
            likely = (
                "the inputs: the request or the tokenizer is not the capture's: restore manifest.json, or "
                f"vocab.json, merges.txt and tokenizer_config.json in {bundle.checkpoint.name}/{bundle.variant}"
            )
        if problem.damaged and problem.what.startswith("inputs/"):
            # So does another word in the request.
            likely = f"inputs.safetensors, most of whose values fit: copy it again; or {likely}"
        elif problem.damaged:
            likely = "the captured file: most of its values fit: copy it again"
        raise ParityError(
            f"bundle {bundle.name} does not fit its request: {problem.what}; likely {likely}, or capture it again"
        )


class _Contradiction(NamedTuple):
    what: str
    damaged: bool = False


def _contradiction(bundle: Bundle) -> _Contradiction | None:
    taps, noise = bundle.expected, bundle.taps.get("sampler.noise")
    if noise is not None and noise.dtype != bundle.dtype:
        return _Contradiction(f"it says {bundle.dtype} and sampler.noise is {noise.dtype}")
    whole = [name for name in taps if name.startswith("velocity_call")]
    parts_of_it = [name for name in taps if name.startswith(("cond.", "uncond."))]
    if not bundle.task.startswith("x2t") and (whole if bundle.entry == "kv_cache" else parts_of_it and not whole):
        return _Contradiction(f"it says {bundle.entry} and holds {(whole or parts_of_it)[0]}")
    try:
        facts = DerivedRequest(bundle)
        facts.layout  # noqa: B018 -- everything else starts from it
    except (ReferenceError, ParityError):
        # What cannot be laid out cannot be run either, and whoever runs it says why.
        return None
    parts = [_integers, _tokens if facts.request.understanding else _schedule]
    wrong = [item for item in _all_of(parts, facts) if item.problem]
    if not wrong:
        return None
    # Another request moves every step.
    damaged = len(wrong) == 1 and wrong[0].few
    return _Contradiction(f"{wrong[0].tensor} {wrong[0].problem}", damaged)


def _integers(facts: DerivedRequest) -> Iterator[Derived]:
    arrays, given = facts.layout.arrays(), facts.bundle.inputs
    for name in INPUTS:
        tensor = f"inputs/{name}"
        if name in given and name in arrays:
            yield _equal("layout", tensor, given[name].array, arrays[name])
        elif name in given or name in arrays:
            yield Derived("layout", tensor, "missing" if name in arrays else "the request has no such thing")


def _media(facts: DerivedRequest) -> Iterator[Derived]:
    if facts.media is None:
        return
    if isinstance(facts.media, str):
        yield Derived("sizes of media", "manifest.json", facts.media)
        return
    still = facts.request.task == "i2v"
    for index, (made, given) in enumerate(zip(facts.media, facts.given, strict=True)):
        # Of an i2v's picture the frames are those of what is made.
        for name, a, b in (("vae_pixels", made.vae, given.vae), ("vit_video_grid_thw", made.vit, given.vit)):
            a, b = (size and size[still:] for size in (a, b))
            if b is not None:
                tensor = f"inputs/{name}" + (str(index) if name == "vae_pixels" else "")
                yield Derived("sizes of media", tensor, None if a == b else f"is of size {b}, its file makes {a}")


def _positions(facts: DerivedRequest) -> Iterator[Derived]:
    for name, tap in facts.taps.items():
        call, _, path = name.partition("/")
        if path == "position_ids":
            expected = facts.position_ids(call)
            if expected is None:
                yield Derived("position ids", name, "the request has no such call")
            else:
                yield _equal("position ids", name, tap.array, expected)


def _layers(facts: DerivedRequest) -> Iterator[Derived]:
    """RoPE from the normed queries and keys, and the residual stream from what is added to it."""
    numerics = Numerics(facts.bundle.dtype)
    for name, tap in facts.taps.items():
        call, _, path = name.partition("/")
        if "layers." not in path or path.startswith(("encoder", "decoder")):
            continue
        number = parse(name).layer
        at = f"{call}/language_model.model.layers.{number}"
        if path.endswith("_rope"):
            ids = facts.position_ids(call)
            x = _merged(facts, call, f"{at}.self_attn.{path[-6]}_norm")
            if ids is not None and x is not None and len(x) == ids.shape[1]:
                around = SimpleNamespace(config=facts.config, numerics=numerics)
                cos, sin = LanguageModel.rotation(around, torch.from_numpy(ids))
                scale = x.float().abs().amax(-1, keepdim=True).expand(x.shape) * 2
                yield _near("RoPE", name, tap, Rope()(x, cos, sin), scale, numerics.dtype)
        elif name == at:
            before = f"{call}/language_model.model.layers.{number - 1}" if number else f"{call}/hidden_in"
            x, attn, mlp = facts.tensor(before), _merged(facts, call, f"{at}.self_attn.o_proj"), None
            if x is not None and attn is not None:
                mlp = _merged(facts, call, f"{at}.mlp")
            if mlp is not None and x.shape == attn.shape == mlp.shape:
                scale = x.float().abs() + attn.float().abs() + mlp.float().abs()
                yield _near("residual stream", name, tap, x + attn + mlp, scale)


def _merged(facts: DerivedRequest, call: str, name: str) -> Tensor | None:
    """What both experts made of their tokens, in the order of the sequence."""
    und, gen = (facts.tensor(f"{name}{expert}") for expert in _EXPERTS)
    if gen is None:
        return und
    rows = facts.rows(call)
    if und is None or rows is None:
        return None
    own = facts.inputs.latent_of[rows] >= 0
    if len(gen) != own.sum() or len(und) != (~own).sum():
        return None
    out = gen.new_empty(len(rows), *gen.shape[1:])
    out[own], out[~own] = gen, und.to(gen.dtype)
    return out


def _tokens(facts: DerivedRequest) -> Iterator[Derived]:
    tap = facts.taps.get("tokens")
    if tap is None:
        return
    limit = facts.request.max_new_tokens
    if facts.bundle.entry == "full_sequence":
        asked = facts.layout.answer
        limit = -(-(asked + limit) // BLOCK) * BLOCK - asked
    tokens, end, problem, few = tap.array, facts.tokenizer.im_end, None, False
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(facts.tokenizer):
        problem, few = f"holds an id outside 0 to {len(facts.tokenizer) - 1}", True
    elif not 1 <= tokens.size <= limit:
        problem = f"holds {tokens.size} tokens, the request allows {limit}"
    elif end in tokens[:-1]:
        problem, few = "goes on after <|im_end|>", True
    elif tokens.size < limit and tokens[-1] != end:
        problem = f"stops after {tokens.size} tokens, before <|im_end|> and before the limit of {limit}"
    yield Derived("answer", "tokens", problem, few)


def _drawn(facts: DerivedRequest) -> Iterator[Derived]:
    """What a bundle that this project recorded drew from its seed; others do not tell how they drew."""
    bundle = facts.bundle
    if not facts.recorded or "seed" not in bundle.request:
        return
    drawn = draw(facts.request, facts.layout, _given(facts), bundle.dtype, bundle.request["seed"])
    noise = {"sampler.noise": drawn.noise} | {f"vae.encode{i}.eps": eps for i, eps in enumerate(drawn.eps)}
    for name, array in noise.items():
        if name in bundle.taps:
            expected, dtype = torch.from_numpy(array), bundle.taps[name].dtype
            yield _near("draws from the seed", name, bundle.taps[name], expected, expected.abs() + 1, dtype)
    if drawn.vae_pixels:
        name = f"vae_pixels{len(drawn.vae_pixels) - 1}"
        expected = torch.from_numpy(drawn.vae_pixels[-1])
        yield _near("draws from the seed", f"inputs/{name}", bundle.inputs[name], expected, expected.abs() + 1)


def _given(facts: DerivedRequest) -> list[Preprocessed]:
    pixels = facts.replay.vae_pixels
    pixels = (pixels[0][:, :1],) if facts.request.task == "i2v" else pixels[:-1]
    return [Preprocessed(array) for array in pixels]


def _encoded(facts: DerivedRequest) -> Iterator[Derived]:
    pixels = facts.replay.vae_pixels
    for index, array in enumerate(pixels):
        name = f"inputs/vae_pixels{index}"
        if index < len(pixels) - 1:
            yield Derived("range of pixels", name, _outside(array))
        elif facts.request.task == "i2v":
            shown = array[:, :4]
            repeated = bool((shown == shown[:, :1]).all())
            yield Derived("range of pixels", name, _outside(shown) if repeated else "its first 4 frames differ")
    for index, split in enumerate(facts.layout.latent_splits[: len(pixels)]):
        mean, logvar, eps = (facts.tensor(f"vae.encode{index}.{part}") for part in ("mean", "logvar", "eps"))
        grid = split.grid
        for part, tensor in (("mean", mean), ("logvar", logvar), ("eps", eps)):
            shape = (1, mean.shape[1] if mean is not None else 0, grid.frames, grid.rows, grid.columns)
            if tensor is not None and tuple(tensor.shape) != shape:
                yield Derived("latents", f"vae.encode{index}.{part}", f"has shape {list(tensor.shape)}, not {shape}")
        name = f"vae.latent{index}"
        if name in facts.taps and None not in (mean, logvar, eps) and mean.shape == logvar.shape == eps.shape:
            spread = (eps * torch.exp(0.5 * logvar)).abs() * (1 + logvar.abs()) + mean.abs()
            expected = Posterior(mean, logvar).sample(eps)
            yield _near("latents", name, facts.taps[name], expected, spread[0].movedim(0, -1))


def _schedule(facts: DerivedRequest) -> Iterator[Derived]:
    count, steps = len(facts.layout.latent_rows), facts.request.num_steps
    held = {parse(name).numbers["step"] for name in facts.bundle.expected if name.startswith("sampler.timestep")}
    for step in sorted(held ^ set(range(steps))) if held else ():
        there = "is there" if step in held else "is missing"
        yield Derived("timesteps", f"sampler.timestep{step}", f"{there}, but the request makes {steps} steps")
    for step, t in enumerate(facts.times[:-1]):
        expected = torch.zeros(count)
        expected[facts.inputs.made] = t
        if (tap := facts.taps.get(f"sampler.timestep{step}")) is not None:
            yield _near("timesteps", f"sampler.timestep{step}", tap, expected, expected)
    if facts.bundle.entry == "full_sequence":
        what = "velocity_call"
        ran = {parse(name).numbers["number"] for name in facts.bundle.expected if name.startswith(what)}
        expected = set(range(len(velocity_calls(facts.guided)))) if ran else set()
    else:
        what = "uncond.step"
        steps = {parse(name).numbers["step"] for name in facts.bundle.expected if name.startswith("cond.step")}
        ran = {parse(name).numbers["step"] for name in facts.bundle.expected if name.startswith(what)}
        expected = {step for step, both in enumerate(facts.guided) if both and step in steps}
    for number in sorted(ran | expected):
        wrong = number in ran ^ expected
        there = "is there" if number in ran else "is missing"
        problem = f"{there}, but the request guides {sum(facts.guided)} of {len(facts.guided)} steps"
        yield Derived("guided steps", f"{what}{number}", problem if wrong else None)


def _steps(facts: DerivedRequest) -> Iterator[Derived]:
    """The first state from the noise, and every later one, with the latent, from the state and velocities before it."""
    noise, made = facts.tensor("sampler.noise"), facts.inputs.made
    clean = [facts.tensor(f"vae.latent{index}") for index in range(len(facts.replay.vae_pixels))]
    if noise is not None and None not in clean and len(noise) == len(facts.layout.latent_rows):
        first = start(noise, torch.cat([x.flatten(0, 2) for x in clean]) if clean else None, made)
        for name in ("sampler.x_init", "sampler.x_t0"):
            if name in facts.taps:
                yield _near("first state", name, facts.taps[name], first, first.float().abs())
    numbers = {call: number for number, call in enumerate(velocity_calls(facts.guided))}
    for step in range(facts.request.num_steps):
        x_t = facts.tensor(f"sampler.x_t{step}")
        cond, uncond = (_velocity(facts, arm, step, numbers) for arm in ("cond", "uncond"))
        last = step == facts.request.num_steps - 1
        name = "latent" if last else f"sampler.x_t{step + 1}"
        tap = facts.taps.get(name)
        if x_t is None or cond is None or tap is None or (facts.guided[step] and uncond is None):
            continue
        velocity = guide(cond, uncond, facts.request) if facts.guided[step] else cond
        rows = made if len(velocity) == len(made) else facts.inputs.latent_of[facts.layout.target.inside.astype(int)]
        moving = torch.isin(rows, made)
        interval = facts.times[step] - facts.times[step + 1]
        expected = advance(x_t, velocity[moving], interval, made)
        spread = cond.float().abs()
        if facts.guided[step]:
            spread = uncond.float().abs() + abs(facts.request.cfg_text_scale) * (spread + uncond.float().abs())
        scale = x_t.float().abs()
        scale[made] += spread[moving] * interval
        if last:
            grid = facts.layout.target.grid
            shape = (grid.frames, grid.rows, grid.columns)
            expected, scale = (x[-grid.size :].unflatten(0, shape) for x in (expected, scale))
        yield _near("last state" if last else "states", name, tap, expected, scale)


def _velocity(facts: DerivedRequest, arm: str, step: int, numbers: Mapping[tuple[str, int], int]) -> Tensor | None:
    """The velocity of an arm's latents in a step, as the entry holds it."""
    if facts.bundle.entry == "full_sequence":
        return facts.tensor(f"velocity_call{numbers[arm, step]}") if (arm, step) in numbers else None
    block = facts.tensor(f"{arm}.step{step}/llm2vae")
    # The two brackets have a row each.
    return None if block is None or len(block) != facts.layout.target.length else block[1:-1]


def _pixels(facts: DerivedRequest) -> Iterator[Derived]:
    tap = facts.taps.get("pixels")
    if tap is None:
        return
    grid = facts.layout.target.grid
    shape = (3, 4 * grid.frames - 3, 16 * grid.rows, 16 * grid.columns)
    wrong = None if tap.array.shape == shape else f"has shape {list(tap.array.shape)}, the request makes {list(shape)}"
    yield Derived("range of pixels", "pixels", wrong or _outside(tap.array))


def _outside(array: np.ndarray) -> str | None:
    # What is not finite is said of the tensor itself.
    largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    return None if largest <= 1.0 else f"reaches {largest:.7g}, pixels lie in [-1, 1]"


def _equal(quantity: str, tensor: str, got: np.ndarray, expected: np.ndarray) -> Derived:
    if got.shape != expected.shape:
        return Derived(quantity, tensor, f"has shape {list(got.shape)}, the request makes {list(expected.shape)}")
    wrong = np.argwhere(got != expected)
    if not len(wrong):
        return Derived(quantity, tensor, None)
    at = tuple(int(i) for i in wrong[0])
    few = len(wrong) <= got.size / 2
    return Derived(quantity, tensor, f"holds {got[at]} at {list(at)}, the request makes {expected[at]}", few)


def _near(quantity: str, tensor: str, tap: Tap, expected: Tensor, scale: Tensor, dtype: str = "float32") -> Derived:
    """Compare a tap with its derived value.

    `scale` is the size of what is added up, which roundings are relative to, and `dtype` what is rounded to on the way,
    where that is not the dtype of the result.
    """
    if tuple(expected.shape) != tap.array.shape:
        return Derived(quantity, tensor, f"has shape {list(tap.array.shape)}, derived is {list(expected.shape)}")
    dtype = "bfloat16" if expected.dtype == torch.bfloat16 else dtype
    allowed = ROUNDINGS * HALF_PLACE[dtype] * scale.numpy()
    # What is not finite is no matter of derivation.
    with np.errstate(invalid="ignore"):
        excess = np.nan_to_num(np.abs(tap.array - expected.float().numpy()) - allowed)
    if not (excess > 0).any():
        return Derived(quantity, tensor, None)
    at = np.unravel_index(np.argmax(excess), excess.shape)
    place, count = [int(i) for i in at], int((excess > 0).sum())
    values = f"{tap.array[at]:.7g} at {place}, derived is {float(expected[tuple(place)]):.7g}"
    more = f" ({count} elements differ)" if count > 1 else ""
    return Derived(quantity, tensor, f"holds {values}{more}", count <= excess.size / 2)
