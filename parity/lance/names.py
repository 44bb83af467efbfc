"""The names of the taps: what each holds, where it lies in a run, and which component computes it.

A name is `{call}/{module path of the official checkpoint}`, or one of a few names without a call. The tables below are
the only place that knows them; `parse` splits a name and names its component, `rank` gives its place in a run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from parity.errors import ParityError
from parity.tensors.names import TapName

# The stages of a run, in order.
INPUTS, ENCODE, NOISE, PREFIX, STEPS, RESULT, DECODE, OUTPUT = range(8)


@dataclass(frozen=True)
class Kind:
    """A row of the tables: a pattern of names, what such a tap holds, its axes, and its component.

    `stage` and `order` (within the stage, or within one step) place the calls, and the taps that belong to none.
    `most` is the largest absolute value that such a tap can have, where there is one.
    """

    pattern: str
    what: str
    axes: str = ""
    component: str = ""
    call: str = ""
    stage: int = 0
    order: int = 0
    most: float | None = None


CALLS = (
    Kind("{arm}.prefix{index}", "a split of the prefix", stage=PREFIX),
    Kind("{arm}.prefill{index}", "a split of an understanding prompt", stage=PREFIX),
    Kind("{arm}.step{step}", "the target block in a denoising step", stage=STEPS, order=3),
    Kind("{arm}.decode{step}", "one answer token", stage=STEPS, order=3),
    Kind("vae.encode{index}.chunk{chunk}", "a chunk of frames through the VAE encoder", stage=ENCODE, order=3),
    Kind("vae.decode.chunk{chunk}", "a latent frame through the VAE decoder", stage=DECODE),
)

LATENTS = "latent, channel"
CODES = "1, channel, t, h, w"
SINGLES = (
    Kind("sampler.noise", "the drawn noise", LATENTS, "noise", "sampler", NOISE, 0),
    Kind("sampler.x_init", "the state before the first step", LATENTS, "noise", "sampler", NOISE, 1),
    Kind("sampler.x_t{step}", "the state at the start of a step", LATENTS, "euler", "sampler", STEPS, 0),
    Kind("sampler.timestep{step}", "t of a step, in [0, 1]", "latent", "schedule", "sampler", STEPS, 1),
    Kind("time_embedder", "the embedding of the first step's t", "hidden", "time_embedder", "sampler", STEPS, 2),
    Kind("velocity_call{number}", "the velocity of one arm", LATENTS, "velocity", "velocity", STEPS, 3),
    Kind("sampler.velocity{step}", "the velocity after guidance", LATENTS, "guidance", "sampler", STEPS, 5),
    Kind("latent", "the state after the last step", "t, h, w, channel", "euler", "sampler", RESULT, 0),
    Kind("tokens", "the answer's token ids", "token", "tokens", "decode", RESULT, 0),
    Kind("pixels", "the decoded frames, in [-1, 1]", "rgb, frame, h, w", "vae.pixels", "vae.decode", OUTPUT, most=1.0),
    Kind("vit_model{index}.patch_embed", "embedded patches", "patch, hidden", "", "vit_model", ENCODE, 0),
    Kind("vit_model{index}.blocks.{block}", "the stream after a block", "patch, hidden", "", "vit_model", ENCODE, 1),
    Kind("vit_model{index}.blocks.{block}.{module}", "a part of a block", "patch, channel", "", "vit_model", ENCODE, 1),
    Kind("vit_model{index}.merger.{module}", "a part of the merger", "token, channel", "", "vit_model", ENCODE, 2),
    Kind("vit_model{index}.merger", "merged tokens in window order", "token, hidden", "", "vit_model", ENCODE, 2),
    Kind("vit_model{index}", "the merged output", "token, hidden", "vit_model.merger", "vit_model", ENCODE, 2),
    Kind("vae.encode{index}.mean", "the normalised mean", CODES, "vae.encoder.mean", "vae.encode", ENCODE, 4),
    Kind("vae.encode{index}.logvar", "the log-variance", CODES, "vae.encoder.logvar", "vae.encode", ENCODE, 4),
    Kind("vae.encode{index}.eps", "the noise of the sample", CODES, "noise", "vae.encode", ENCODE, 5),
    Kind("vae.latent{index}", "the sampled latent", "t, h, w, channel", "vae.encoder.sample", "vae.encode", ENCODE, 6),
    Kind("frames", "the frames as 8-bit colours", "rgb, frame, h, w", "frames", "vae.decode", OUTPUT, 1),
    Kind("weights/{module}", "a parameter", "", "", "weights", INPUTS),
    Kind("inputs/request", "the request itself", "", "request", "inputs", INPUTS),
    Kind("inputs/vae_pixels{index}", "pixels for the VAE", "rgb, frame, h, w", "preprocess", "inputs", INPUTS),
    Kind("inputs/vit_patches{index}", "patches for the ViT", "patch, value", "preprocess", "inputs", INPUTS),
    Kind("inputs/answer", "where an answer begins", "", "sequence", "inputs", INPUTS),
    Kind("inputs/guided", "whether each step is guided", "step", "guidance", "inputs", INPUTS),
    Kind("inputs/text_ids.uncond", "token ids of the unconditional arm", "token", "sequence", "inputs", INPUTS),
    Kind("inputs/text_ids", "token ids", "token", "sequence", "inputs", INPUTS),
    Kind("inputs/modality", "roles", "token", "sequence", "inputs", INPUTS),
    Kind("inputs/split_lens", "tokens of each split", "split", "sequence", "inputs", INPUTS),
    Kind("inputs/attn_modes", "attention of each split", "split", "sequence", "inputs", INPUTS),
    Kind("inputs/{group}_indexes", "places in the sequence", "token", "sequence", "inputs", INPUTS),
    Kind("inputs/{group}_thw", "grids of visuals", "visual, axis", "grids", "inputs", INPUTS),
    Kind("inputs/video_sizes", "frames, height, width in pixels", "visual, axis", "grids", "inputs", INPUTS),
    Kind("inputs/position_ids.{arm}", "the (t, h, w) rotary ids", "axis, token", "positions", "inputs", INPUTS),
    Kind("inputs/timesteps", "t at every step boundary", "step", "schedule", "inputs", INPUTS),
    Kind("inputs/latent_position_ids", "rows of latent_pos_embed", "latent", "latent_pos_embed", "inputs", INPUTS),
)

# Within a call, in order of execution; an empty component is the path itself, shortened.
LAYER = "language_model.model.layers.{layer}"
ROWS = "token, hidden"
HEADS = "token, head, head_dim"
WIDE = "token, channel"
PATHS = (
    Kind("position_ids", "the (t, h, w) rotary ids", "axis, token", "positions"),
    Kind("language_model.model.embed_tokens", "embedded token ids", ROWS, "embed_tokens"),
    Kind("vae2llm", "latents at the model's width", ROWS, "vae2llm"),
    Kind("time_embedder", "the embedding of each time that occurs", "time, hidden", "time_embedder"),
    Kind("latent_pos_embed", "the embedded places of latents", ROWS, "latent_pos_embed"),
    Kind("hidden_in", "the input embeddings", ROWS, "embeddings"),
    Kind(LAYER + ".input_layernorm{expert}", "the normed stream of one expert's tokens", ROWS),
    Kind(LAYER + ".self_attn.q_proj{expert}", "projected queries", WIDE),
    Kind(LAYER + ".self_attn.k_proj{expert}", "projected keys", WIDE),
    Kind(LAYER + ".self_attn.v_proj{expert}", "values", WIDE),
    Kind(LAYER + ".self_attn.q_norm{expert}", "queries after their norm", HEADS),
    Kind(LAYER + ".self_attn.k_norm{expert}", "keys after their norm", HEADS),
    Kind(LAYER + ".self_attn.q_rope", "queries after RoPE", HEADS),
    Kind(LAYER + ".self_attn.k_rope", "keys after RoPE", HEADS),
    Kind(LAYER + ".self_attn.sdpa", "attention output before o_proj", HEADS),
    Kind(LAYER + ".self_attn.o_proj{expert}", "the attention branch of one expert's tokens", ROWS),
    Kind(LAYER + ".self_attn", "the attention branch", ROWS),
    Kind(LAYER + ".post_attention_layernorm{expert}", "the normed stream of one expert's tokens", ROWS),
    Kind(LAYER + ".mlp{expert}.gate_proj", "the MLP's gate before its activation", WIDE),
    Kind(LAYER + ".mlp{expert}.up_proj", "what the MLP's gate multiplies", WIDE),
    Kind(LAYER + ".mlp{expert}.down_proj", "the MLP's output", ROWS),
    Kind(LAYER + ".mlp{expert}", "the MLP branch of one expert's tokens", ROWS),
    Kind(LAYER, "the residual stream after a layer", ROWS),
    Kind("language_model.model.norm{expert}", "the final norm of one expert's tokens", ROWS, "norm{expert}"),
    Kind("hidden_out", "the output of the final norm", ROWS, "norm"),
    Kind("llm2vae", "the velocity of the whole target block", WIDE, "llm2vae"),
    Kind("language_model.lm_head", "the logits of the next token", "token, vocabulary", "lm_head"),
    Kind("{coder}.conv1", "a convolution's output", CODES),
    Kind("{coder}.downsamples.{block}", "a block's output", CODES),
    Kind("{coder}.middle.{block}", "a block's output", CODES),
    Kind("{coder}.upsamples.{block}", "a block's output", CODES),
    Kind("{coder}", "the output of the head", CODES, "vae.{coder}.head"),
)

RESULTS = ("latent", "pixels", "frames")
"""What a run that draws ends in, the last one to be looked at."""

_BEFORE = next(i for i, kind in enumerate(PATHS) if kind.pattern == "hidden_in")

WORDS = {
    "arm": "cond|uncond",
    "expert": "|_moe_gen",
    "coder": "encoder|decoder",
    "group": "[a-z_]+",
    "module": r"[\w.]+",
}


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    for i in range(1, len(parts), 2):
        parts[i] = f"(?P<{parts[i]}>{WORDS.get(parts[i], '0|[1-9][0-9]{0,8}')})"
    return re.compile("".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _find(kinds: Sequence[Kind], name: str) -> tuple[int, Kind, dict[str, str]] | None:
    for position, kind in enumerate(kinds):
        match = _regex(kind.pattern).fullmatch(name)
        if match:
            return position, kind, match.groupdict()
    return None


def _component_of(name: str) -> str:
    """The component of a name without a call: a part of the ViT, or the module that holds a weight."""
    if name.startswith("weights/"):
        path, _, parameter = name.removeprefix("weights/").rpartition(".")
        shortened = path.removeprefix("language_model.").removeprefix("model.")
        return shortened if parameter in ("weight", "bias", "gamma") else f"{shortened}.{parameter}"
    return re.sub(r"(?<=^vit_model)\d+", "", name)


@cache
def parse(name: str) -> TapName:
    """Return the parts of a tap name; raises ParityError for a name that no table describes."""
    single = _find(SINGLES, name)
    if single:
        inner, kind, found = single
        shown, call, path = kind, kind.call, name.removeprefix("inputs/")
        component = kind.component.format(**found) or _component_of(name)
    else:
        call, _, path = name.partition("/")
        caller = _find(CALLS, call)
        if not caller or not path:
            raise ParityError(f"tap {name!r} has no known call: parity/lance/names.py lists the names")
        kind, found = caller[1:]
        inner, shown, inside = _find(PATHS, path) or (len(PATHS), Kind(path, "a module's output"), {})
        found |= inside
        shortened = ("vae." if call.startswith("vae.") else "") + path.removeprefix("language_model.model.")
        component = shown.component.format(**found) or shortened
    numbers = {key: int(value) for key, value in found.items() if key not in WORDS}
    call_number = next((numbers[key] for key in ("step", "index", "chunk", "number") if key in numbers), 0)
    minor = numbers.get("chunk", int(found.get("arm") == "uncond"))
    # Before, in and after the layers: what comes before them are also the first rows of PATHS.
    section = 1 if "layer" in numbers else 2 * (inner > _BEFORE)
    within = (section, numbers.get("layer", 0), inner, numbers.get("block", 0))
    return TapName(
        name=name,
        call=call,
        path=path,
        component=component,
        what=shown.what,
        axes=shown.axes,
        integer=call == "inputs" or path in ("position_ids", "tokens", "frames"),
        arm=found.get("arm", ""),
        numbers=numbers,
        place=(kind.stage, call_number, kind.order, minor, *within),
        most=shown.most,
    )


def logits_name(step: int) -> str:
    """The tap of the logits that an answer's token is chosen from, counted from 0."""
    return f"cond.decode{step}/language_model.lm_head"


def velocity_calls(guided: Sequence[bool]) -> list[tuple[str, int]]:
    """Return (arm, step) of every velocity_call of the full-sequence entry: cond, and uncond where guided."""
    return [(arm, step) for step, both in enumerate(guided) for arm in ("cond", "uncond")[: 1 + both]]


def locate(name: str, guided: Sequence[bool]) -> TapName:
    """Return `parse(name)` with the arm and the step of a velocity_call filled in; `guided` tells it for each step."""
    tap = parse(name)
    calls = velocity_calls(guided)
    if "number" not in tap.numbers or tap.numbers["number"] >= len(calls):
        return tap
    arm, step = calls[tap.numbers["number"]]
    place = (tap.place[0], step, tap.place[2], int(arm == "uncond"), *tap.place[4:])
    return replace(tap, arm=arm, call=f"{arm}.step{step}", component=f"velocity.{arm}", place=place)
