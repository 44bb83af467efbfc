"""Hypotheses about the VAE's stages: up- and down-sampling in time and space, and the shortcuts around them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tools import around, module_of, submodule
from reference.vae_decoder import Resample, UpBlock
from reference.vae_encoder import DownBlock
from reference.vae_layers import StreamState

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

TIME_CONV = ("vae.*.time_conv",)
UP = ("vae.decoder.upsamples.*.resample.1", "vae.decoder.upsamples.*.upsamples.?")
UP_STAGES = ("vae.decoder.upsamples.?",)
DOWN_STAGES = ("vae.encoder.downsamples.?",)


def held_by(site: "TapProbe", kind: type[nn.Module]) -> nn.Module:
    """The module of a kind that is the site's own or holds it."""
    path = site.path
    module = module_of(site)
    while not isinstance(module, kind):
        path = path.rpartition(".")[0]
        if not path:
            raise DoesNotApply
        module = submodule(site, path)
    return module


def resampled(change: Callable[[Resample, Callable, Tensor, StreamState], Tensor]) -> Patch:
    """An up-sampling that runs in another way."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        block = held_by(site, Resample)

        def upsampled(original: Callable, x: Tensor, state: StreamState) -> Tensor:
            return change(block, original, x, state)

        with around(block, "forward", upsampled):
            yield

    return patched


def through_time_conv(kept: int) -> Patch:
    """The stream's first frame goes through the temporal convolution, and one of its two frames is kept."""

    def upsampled(block: Resample, original: Callable, x: Tensor, state: StreamState) -> Tensor:
        if block.time_conv is None:
            raise DoesNotApply
        if state.chunks == 0:
            x = block.time_conv(x, state).unflatten(1, (2, -1))[:, kept]
            state.history.pop(block.time_conv, None)
        return original(x, state)

    return resampled(upsampled)


def sees_the_first(block: Resample, original: Callable, x: Tensor, state: StreamState) -> Tensor:
    if block.time_conv is None:
        raise DoesNotApply
    if state.chunks == 0:
        state.history[block.time_conv] = x
    return original(x, state)


def nearest(frames: Tensor) -> Tensor:
    return frames.repeat_interleave(2, -1).repeat_interleave(2, -2)


def halves(x: Tensor) -> Tensor:
    """[1, 2C, T, H, W] -> [1, C, 2T, H, W]: the first half of the channels is the first of two frames."""
    return torch.stack(x.unflatten(1, (2, -1)).unbind(1), 3).flatten(2, 3)


def spread(space: Callable[[Tensor], Tensor] = nearest, time: Callable[[Tensor], Tensor] = halves) -> Patch:
    """Frames [T, C, H, W] doubled in space, and frames that the temporal convolution made parted, in other ways."""

    def upsampled(block: Resample, original: Callable, x: Tensor, state: StreamState) -> Tensor:
        if block.time_conv is not None and state.chunks > 0:
            x = time(block.time_conv(x, state))
        frames = space(x[0].transpose(0, 1))
        return block.resample["1"](frames).transpose(0, 1)[None]

    return resampled(upsampled)


def interpolated(mode: str, **values: bool) -> Callable[[Tensor], Tensor]:
    return lambda frames: F.interpolate(frames.float(), scale_factor=2, mode=mode, **values).to(frames.dtype)


def strided(frames: Tensor) -> Tensor:
    """Zeros between the pixels."""
    out = frames.new_zeros(*frames.shape[:2], 2 * frames.shape[2], 2 * frames.shape[3])
    out[..., ::2, ::2] = frames
    return out


def shortcut(kind: type[nn.Module], name: str, change: Callable[..., Tensor]) -> Patch:
    """The shortcut around a stage made in another way: `change(stage, original, *inputs)`."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        stage = module_of(site)
        if not isinstance(stage, kind):
            raise DoesNotApply
        with around(stage, name, lambda original, *inputs: change(stage, original, *inputs)):
            yield

    return patched


def repeated(change: Callable[..., Tensor]) -> Patch:
    return shortcut(UpBlock, "repeated", change)


def averaged(change: Callable[..., Tensor]) -> Patch:
    return shortcut(DownBlock, "averaged", change)


def tiled(stage: UpBlock, original: Callable, x: Tensor, state: StreamState) -> Tensor:
    """Channels tiled; what `original` repeats is then only laid out."""
    return original(x.repeat(1, stage.out * stage.time_factor * 4 // x.shape[1], 1, 1, 1), state)


def laid_out(order: tuple[int, int, int]) -> Callable[..., Tensor]:
    """Channels (out, t, h, w) whose three factors are in another order."""

    def change(stage: UpBlock, original: Callable, x: Tensor, state: StreamState) -> Tensor:
        x = x.repeat_interleave(stage.out * stage.time_factor * 4 // x.shape[1], 1)
        sides = (stage.time_factor, 2, 2)
        x = x.unflatten(1, (stage.out, *(sides[axis] for axis in order)))
        back = [2 + order.index(axis) for axis in range(3)]
        return original(x.permute(0, 1, *back, 5, 6, 7).flatten(1, 4), state)

    return change


def other_frame(stage: UpBlock, original: Callable, x: Tensor, state: StreamState) -> Tensor:
    if state.chunks or stage.time_factor == 1:
        return original(x, state)
    whole = original(x, StreamState(chunks=1))
    return whole[:, :, : whole.shape[2] - stage.time_factor + 1]


def without(stage: nn.Module, original: Callable, *inputs: object) -> Tensor:
    return torch.zeros_like(original(*inputs))


def grouped(stage: DownBlock, x: Tensor, before: bool) -> Tensor:
    """[1, C, T, H, W] -> [1, C * time * space * space, T', H', W'], a missing frame of zeros before or after."""
    time, space = stage.time_factor, stage.space_factor
    missing = -x.shape[2] % time
    x = F.pad(x, (0, 0, 0, 0, missing if before else 0, 0 if before else missing))
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def averaged_after(stage: DownBlock, original: Callable, x: Tensor) -> Tensor:
    return grouped(stage, x, before=False).unflatten(1, (stage.out, -1)).mean(2)


def averaged_apart(stage: DownBlock, original: Callable, x: Tensor) -> Tensor:
    return grouped(stage, x, before=True).unflatten(1, (-1, stage.out)).mean(1)


def first_of_group(stage: DownBlock, original: Callable, x: Tensor) -> Tensor:
    return grouped(stage, x, before=True).unflatten(1, (stage.out, -1))[:, :, 0]


def alternate(x: Tensor) -> Tensor:
    return torch.stack(x.unflatten(1, (-1, 2)).unbind(2), 3).flatten(2, 3)


def one_after_another(x: Tensor) -> Tensor:
    return torch.cat(x.unflatten(1, (2, -1)).unbind(1), 2)


HYPOTHESES = [
    Hypothesis("the temporal convolution remembers the first frame", TIME_CONV, resampled(sees_the_first)),
    Hypothesis("the first frame goes through the temporal convolution", UP, through_time_conv(kept=1)),
    Hypothesis("the first frame goes through the temporal convolution and the first of two is kept", UP,
               through_time_conv(kept=0)),
    Hypothesis("up-sampling is bilinear", UP, spread(interpolated("bilinear", align_corners=False))),
    Hypothesis("up-sampling is bilinear with aligned corners", UP, spread(
        interpolated("bilinear", align_corners=True))),
    Hypothesis("up-sampling is bicubic", UP, spread(interpolated("bicubic", align_corners=False))),
    Hypothesis("up-sampling tiles the frame", UP, spread(lambda frames: frames.repeat(1, 1, 2, 2))),
    Hypothesis("up-sampling puts zeros between pixels", UP, spread(strided)),
    Hypothesis("the temporal up-sampling splits channels alternately", UP, spread(time=alternate)),
    Hypothesis("the temporal up-sampling puts frames one after another", UP, spread(time=one_after_another)),
    Hypothesis("the shortcut is missing", UP_STAGES, repeated(without)),
    Hypothesis("the shortcut tiles channels instead of repeating them", UP_STAGES, repeated(tiled)),
    Hypothesis("the shortcut keeps the other frame", UP_STAGES, repeated(other_frame)),
    *(Hypothesis(f"the shortcut's channels are laid out {', '.join('thw'[i] for i in order)}", UP_STAGES,
                 repeated(laid_out(order))) for order in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))),
    Hypothesis("the average is missing", DOWN_STAGES, averaged(without)),
    Hypothesis("the average takes neighbouring channels in another order", DOWN_STAGES, averaged(averaged_apart)),
    Hypothesis("the average pads with zeros after the frame", DOWN_STAGES, averaged(averaged_after)),
    Hypothesis("the average takes one value of each group", DOWN_STAGES, averaged(first_of_group)),
]  # fmt: skip
