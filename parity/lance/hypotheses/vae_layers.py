"""Hypotheses about the VAE's convolutions: how they pad, and what they remember of the chunk before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference.vae_layers
from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tools import around, forward, module_of
from reference.vae_layers import CausalConv3d, StreamState

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

CONVOLUTIONS = ("vae.*conv1", "vae.*conv2", "vae.*.residual.2", "vae.*.residual.6", "vae.*.head.2", "vae.*coder.head",
                "vae.*.time_conv", "vae.*.resample.1")  # fmt: skip


def border(mode: str) -> Patch:
    """A convolution that pads rows and columns in another way than with zeros."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        module = module_of(site)

        def convolve(original: Callable, x: Tensor, layer: nn.Module, padding: object, *rest: object) -> Tensor:
            if layer is not module:
                return original(x, layer, padding, *rest)
            sides = (padding,) * 2 if isinstance(padding, int) else tuple(padding)
            rows, columns = sides[-2:]
            if not (rows or columns) or (mode == "reflect" and min(x.shape[-2:]) <= max(rows, columns)):
                raise DoesNotApply
            sides_in_time = (0, 0) if x.ndim == 5 else ()
            padded = F.pad(x, (columns, columns, rows, rows, *sides_in_time), mode=mode)
            return original(padded, layer, (0,) * len(layer.kernel_size), *rest)

        with around(reference.vae_layers, "convolve", convolve):
            yield

    return patched


def remembering(change: Callable[[CausalConv3d, Tensor, StreamState], None]) -> Patch:
    """A causal convolution whose history is changed before it runs."""

    def convolved(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *state: StreamState) -> Tensor:
        if not isinstance(module, CausalConv3d) or module.kernel_size[0] == 1:
            raise DoesNotApply
        change(module, x, *state)
        return original(x, *state)

    return forward(convolved)


def first_frame(module: CausalConv3d, x: Tensor, state: StreamState) -> None:
    if module not in state.history:
        state.history[module] = x[:, :, :1].repeat(1, 1, module.history, 1, 1)


def of_history(change: Callable[[Tensor], Tensor]) -> Patch:
    """A causal convolution that remembers something else of the chunk before, [1, C, frames, H, W]."""

    def changed(module: CausalConv3d, x: Tensor, state: StreamState) -> None:
        past = state.history.get(module)
        if past is not None:
            state.history[module] = change(past)

    return remembering(changed)


def last_frame_alone(past: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(past[:, :, :-1]), past[:, :, -1:]], 2)


def last_frame_again(past: Tensor) -> Tensor:
    return past[:, :, -1:].expand_as(past).clone()


def looking_ahead(zeros: bool) -> Patch:
    """As many frames after the present one as before it; behind the last are zeros, or it is repeated."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        module = module_of(site)
        if not isinstance(module, CausalConv3d) or module.kernel_size[0] != 3 or module.stride[0] != 1:
            raise DoesNotApply

        def convolve(original: Callable, x: Tensor, layer: nn.Module, *rest: object) -> Tensor:
            if layer is module:
                last = torch.zeros_like(x[:, :, :1]) if zeros else x[:, :, -1:]
                x = torch.cat([x[:, :, 1:], last], 2)
            return original(x, layer, *rest)

        with around(reference.vae_layers, "convolve", convolve):
            yield

    return patched


HYPOTHESES = [
    Hypothesis("convolutions pad with the border's values", CONVOLUTIONS, border("replicate")),
    Hypothesis("convolutions pad with a mirrored border", CONVOLUTIONS, border("reflect")),
    Hypothesis("convolutions pad with the opposite border", CONVOLUTIONS, border("circular")),
    Hypothesis("convolutions repeat the first frame before the start", CONVOLUTIONS, remembering(first_frame)),
    Hypothesis("convolutions forget the frames of the chunk before", CONVOLUTIONS, of_history(torch.zeros_like)),
    Hypothesis("convolutions remember the last frame alone", CONVOLUTIONS, of_history(last_frame_alone)),
    Hypothesis("convolutions remember frames in reverse", CONVOLUTIONS, of_history(lambda past: past.flip(2))),
    Hypothesis("convolutions repeat the last frame of the chunk before", CONVOLUTIONS, of_history(last_frame_again)),
    Hypothesis("convolutions are not causal", CONVOLUTIONS, looking_ahead(zeros=True)),
    Hypothesis("convolutions are not causal and repeat the last frame", CONVOLUTIONS, looking_ahead(zeros=False)),
]  # fmt: skip
