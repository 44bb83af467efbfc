"""What the hypotheses patch the reference with; everything wraps what it finds and leaves no trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Patch
from parity.lance.hypotheses.tokens import GEN, pass_tokens
from reference.sampler import time_grid

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

LINEARS = ("layers.*_proj", "layers.*_proj_moe_gen", "lm_head", "vae2llm", "llm2vae", "vit_model.*")
CONVOLUTIONS = ("vae.*", "vit_model.patch_embed*")
WEIGHTED = ("layers.*", "norm*", "lm_head", "embed_tokens", "vae2llm", "llm2vae", "time_embedder*", "vit_model.*",
            "vae.*")  # fmt: skip
VAE_PARTS = ("encoder", "decoder", "conv1", "conv2")
# What has its own module in each of the two experts, below a layer; an MLP's parts are named after it.
TWINS = (
    *(f"{name}_proj" for name in "qkvo"),
    *("q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "norm", "mlp"),
)


@contextmanager
def around(owner: object, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Call `wrapper(original, ...)` in the place of an attribute that is a function or method."""
    original = getattr(owner, name)

    def patched(*args: Any, **values: Any) -> Any:
        return wrapper(original, *args, **values)

    with patch.object(owner, name, patched):
        yield


@contextmanager
def parameters(module: nn.Module, values: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Give a module's own parameters other values."""
    with patch.dict(module._parameters, values):
        yield


def forward(wrapper: Callable[..., Tensor]) -> Patch:
    """A patch of the site's own module: `wrapper(site, module, original, *inputs)` is its forward."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        module = module_of(site)

        def replaced(original: Callable[..., Tensor], *inputs: Any) -> Tensor:
            return wrapper(site, module, original, *inputs)

        with around(module, "forward", replaced):
            yield

    return patched


def in_own_pass(wrapper: Callable[..., Tensor]) -> Patch:
    """As `forward`, but for calls with other rows than the site's pass gives the module, which stay as they are.

    A pass runs after those whose tokens it sees.
    """

    def own(site: "TapProbe", module: nn.Module, original: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        if len(x) != rows_in_pass(site):
            return original(x, *rest)
        return wrapper(site, module, original, x, *rest)

    return forward(own)


def rows_in_pass(site: "TapProbe") -> int:
    """How many rows the site's module is given in its pass: those of its expert, or all."""
    tokens = pass_tokens(site)
    gen = int(tokens.rows(tokens.gen).sum())
    if GEN in site.component:
        return gen
    return tokens.queries - gen if has_twin(site.path) else tokens.queries


def has_twin(path: str) -> bool:
    """Whether the same module is there for the other expert too."""
    try:
        twin_path(path)
    except DoesNotApply:
        return False
    return True


def on_input(change: Callable[["TapProbe", Tensor], Tensor]) -> Patch:
    """A patch that changes the first input of the site's own module."""
    return forward(lambda site, module, original, x, *rest: original(change(site, x), *rest))


def on_output(change: Callable[["TapProbe", Tensor], Tensor]) -> Patch:
    """A patch that changes the output of the site's own module."""
    return forward(lambda site, module, original, *inputs: change(site, original(*inputs)))


def function(owner: object, name: str, wrapper: Callable[..., Any]) -> Patch:
    """A patch of a function of the reference: `wrapper(site, original, ...)` is called in its place."""
    return lambda site: around(owner, name, partial(_with_site, site, wrapper))


def _with_site(site: "TapProbe", wrapper: Callable[..., Any], original: Callable, *args: Any, **values: Any) -> Any:
    return wrapper(site, original, *args, **values)


def module_of(site: "TapProbe") -> nn.Module:
    """The module whose output a site is; raises DoesNotApply when a function makes it."""
    if site.module is None or of_weight(site):
        raise DoesNotApply
    return site.module


def of_weight(site: "TapProbe") -> bool:
    """Whether a site is a parameter and no activation."""
    return site.tap.name.startswith("weights/")


def submodule(site: "TapProbe", path: str) -> nn.Module:
    """A module of the reference by its path in the checkpoint; raises DoesNotApply when there is none."""
    pipeline = site.pipeline
    head = path.partition(".")[0]
    if head == "vit_model":
        root: nn.Module = pipeline.vit_model
        path = path.removeprefix("vit_model").removeprefix(".")
    else:
        root = pipeline.vae if head in VAE_PARTS else pipeline.model
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise DoesNotApply from None


def parent_of(site: "TapProbe") -> nn.Module:
    """The module that holds the site's own."""
    module_of(site)
    return submodule(site, site.path.rpartition(".")[0])


def twin_path(path: str) -> str:
    """Path of the same module in the other expert; raises DoesNotApply for what exists once."""
    if GEN in path:
        return path.replace(GEN, "")
    parts = path.split(".")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i] in TWINS and not path.startswith("vit_model"):
            return ".".join([*parts[:i], parts[i] + GEN, *parts[i + 1 :]])
    raise DoesNotApply


def times_of(site: "TapProbe") -> np.ndarray:
    """t at every boundary of the request's steps."""
    return time_grid(site.request.num_steps, site.request.timestep_shift).numpy()


def leaf(module: nn.Module) -> nn.Module:
    """The one module that holds a module's parameters; raises DoesNotApply when there are several or none."""
    holders = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    if len(holders) != 1:
        raise DoesNotApply
    return holders[0]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to a dtype, in their own dtype."""
    return x.to(dtype).to(x.dtype)
