"""The names of what a run of training computes, and where in it they lie."""

import re

from parity.lance.training.bundle import GRADIENT
from parity.tensors.names import TapName

STEP = re.compile(r"step\d+/")
"""Prefix of what an optimizer's step changes."""
IN = ".in"
"""Ends the name of what a module is given, which is where the gradient by its input lies."""
_PARAMETER = re.compile(r"\.(weight|bias)$")
_FORWARD = ("vit_model", "embed_tokens", "vae2llm", "time_embedder", "hidden_in", "layers.", "norm",
            "last_hidden_state", "llm2vae", "lm_head", "mse", "ce", "loss.mse", "loss.ce", "loss")  # fmt: skip
_WITHIN = ("input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "sdpa", "o_proj",
           "post_attention_layernorm", "gate_proj", "up_proj", "down_proj", "mlp")  # fmt: skip


def located(name: str) -> TapName:
    """A name with its component and its place: forwards, backwards in the opposite order, then the optimizer."""
    step = STEP.match(name)
    back, path = name.startswith(GRADIENT), STEP.sub("", name).removeprefix(GRADIENT)
    component = shortened(_PARAMETER.sub("", path).removesuffix(IN))
    where = _place(component, path.endswith(IN))
    if step or name == "total_norm":
        call, component, place = (step[0][:-1], "optimizer", (3, int(step[0][4:-1]))) if step else ("step1", "clipping",
                                                                                                   (3, 0))  # fmt: skip
    elif name.startswith("inputs/"):
        path = component = name.removeprefix("inputs/")
        call, place = "inputs", (-1,)
    elif back:
        call, place = "backward", (1, *(-each for each in where))
    elif _PARAMETER.search(name):
        # A parameter's gradient comes of the same step back as that by its module's input.
        call, place = "gradients", (1, *(-each for each in _place(component, True)), 1)
    elif name.startswith("loss_step"):
        call, component, place = "step1", "optimizer", (3, 1, 1)
    else:
        call, place = "forward", (0, *where)
    numbers = {"layer": int(found[1])} if (found := re.search(r"layers\.(\d+)", path)) else {}
    what = "what a step changes" if step else "the gradient of the loss" if back or call == "gradients" else ""
    return TapName(name, call, path, component, what, "", False, "", numbers, place)


def shortened(path: str) -> str:
    """A path as a component."""
    return path.removeprefix("language_model.").removeprefix("model.")


def _place(component: str, given: bool) -> tuple[int, ...]:
    """Where a component stands in the order of execution; what it is given comes before what it makes."""
    first = next((i for i, each in enumerate(_FORWARD) if component.startswith(each)), len(_FORWARD))
    layer = re.match(r"layers\.(\d+)", component)
    inner = component.rpartition(".")[2].removesuffix("_moe_gen")
    within = _WITHIN.index(inner) if layer and inner in _WITHIN else len(_WITHIN)
    return first, int(layer[1]) if layer else 0, within, int(not given)


# What reads a module's output: a gradient that arrives there wrong is that one's, which has no tap of its own.
_READERS = (
    (r"(layers\.\d+\.self_attn)\.([qk]_rope|v_proj(_moe_gen)?)", r"\1.sdpa"),
    (r"(layers\.\d+\.mlp(_moe_gen)?)\.(gate|up)_proj", r"\1.activation"),
    (r"(layers\.\d+)\.(self_attn\.o_proj|mlp(_moe_gen)?\.down_proj)(_moe_gen)?", r"\1.residual"),
    (r"(layers\.\d+)\.input_layernorm(_moe_gen)?", r"\1.self_attn"),
    (r"(layers\.\d+)\.post_attention_layernorm(_moe_gen)?", r"\1.mlp"),
    (r"(layers\.\d+\.self_attn)\.([qk])_proj(_moe_gen)?", r"\1.\2_norm"),
    (r"(layers\.\d+\.self_attn)\.([qk])_norm(_moe_gen)?", r"\1.\2_rope"),
    (r"(layers\.\d+\.self_attn)\.sdpa", r"\1.o_proj"),
    (r"hidden_in|layers\.\d+", "residual"),
    (r"embed_tokens|vae2llm", "embeddings"),
    (r"norm(_moe_gen)?", "last_hidden_state"),
    ("llm2vae", "mse"),
    ("lm_head", "ce"),
    ("mse|ce", "loss"),
)


def owner(name: str) -> str:
    """The component that is wrong where what is steered is wrong at a tap."""
    found = located(name)
    if found.call != "backward" or name.endswith(IN):
        return found.component
    for pattern, reader in _READERS:
        if match := re.fullmatch(pattern, found.component):
            return match.expand(reader)
    return found.component
