"""What the VAE's causal convolutions have before the first chunk, and carry into those after it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis
from parity.lance.hypotheses.tools import forward
from reference.vae_layers import CausalConv3d, StreamState

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

CONVOLUTIONS = ("vae.*conv1", "vae.*conv2", "vae.*.residual.2", "vae.*.residual.6", "vae.*.head.2", "vae.*coder.head",
                "vae.*.time_conv", "vae.*.resample.1")  # fmt: skip


@forward
def _first_frame(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *state: StreamState) -> Tensor:
    if not isinstance(module, CausalConv3d) or module.kernel_size[0] == 1:
        raise DoesNotApply
    history = state[0].history
    if module not in history:
        history[module] = x[:, :, :1].repeat(1, 1, module.history, 1, 1)
    return original(x, *state)


HYPOTHESES = [Hypothesis("convolutions repeat the first frame before the start", CONVOLUTIONS, _first_frame)]
