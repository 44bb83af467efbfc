"""What rounding alone does to a pair: equally right ways to compute each part from what it is given."""

import copy
from collections.abc import Container, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from parity.oracle.floors import Floors, LevelTable
from parity.pairs.names import kind_of
from parity.pairs.pair import Pair
from parity.pairs.sides import TorchSide
from parity.tensors.recording import Recording, Tap
from parity.tensors.rounding import rounded

DRAWS = 4

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2)}
# What libraries compute by polynomials of their own, to a unit in the last place, and what is divided by a sum.
_APPROXIMATED = {
    aten.exp.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.tanh.default, aten.rsqrt.default,
    aten.sqrt.default, aten.cos.default, aten.sin.default, aten._softmax.default, aten.pow.Tensor_Scalar,
    aten.div.Tensor, aten.mean.dim, aten.sum.dim_IntList, aten.native_layer_norm.default, aten.native_group_norm.default,
}  # fmt: skip


class Draw(NamedTuple):
    """One equally right order of rounding; see parity.oracle.trusted.Variant."""

    name: str
    draw: int
    family: str = "disturbed"
    numerics: Any = None


class _Disturbed(TorchDispatchMode):
    """Sums in another order, and functions off by up to a unit in the last place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            left, right = _PRODUCTS[func]
            order = torch.randperm(args[left].shape[-1], generator=self._random)
            args = list(args)
            args[left], args[right] = args[left][..., order], args[right].index_select(-2, order)
            return func(*args, **kwargs)
        if func is aten.convolution.default and args[8] == 1 and not args[6]:
            order = torch.randperm(args[1].shape[1], generator=self._random)
            return func(args[0].index_select(1, order), args[1].index_select(1, order), *args[2:], **kwargs)
        output = func(*args, **kwargs)
        if func in _APPROXIMATED:
            first = output[0] if isinstance(output, tuple) else output
            first = self._off(first)
            return (first, *output[1:]) if isinstance(output, tuple) else first
        return output

    def _off(self, value: Tensor) -> Tensor:
        if value.dtype not in (torch.float32, torch.bfloat16):
            return value
        # A unit in the last place of bfloat16 would be a rounding too many: it is computed wider and rounded once.
        unit = torch.finfo(torch.float32).eps if value.dtype == torch.float32 else torch.finfo(torch.bfloat16).eps / 2
        noise = torch.rand(value.shape, generator=self._random) * 2 - 1
        return (value.float() * (1 + unit * noise)).to(value.dtype)


def measured(pair: Pair, own: Recording, told: Container[str]) -> Floors:
    """How far right ways to compute each part from the trusted model's own values are from the most exact one.

    `told` are the taps that the port tells: it computes all others on the way, and so do they.
    """
    given = {name: tap for name, tap in own.items() if name in told}
    wide = copy.deepcopy(pair.trusted).double()
    center = TorchSide(given, wide=True).run(pair, wide).taps
    del wide
    table = LevelTable(kind_of)
    for number, (draw, taps) in enumerate(_variants(pair, own, given)):
        table.add(number, _typed(center, taps), taps, draw)
    names = tuple(draw.name for draw in _draws())
    return table.floors(given, names)


def _draws() -> list[Draw]:
    return [Draw("itself", 0, "itself"), *(Draw(f"disturbed {number}", number) for number in range(1, DRAWS + 1))]


def _variants(pair: Pair, own: Recording, given: Recording) -> Iterator[tuple[Draw, Recording]]:
    for draw in _draws():
        if not draw.draw:
            yield draw, own
            continue
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_Disturbed(draw.draw))
            yield draw, TorchSide(given).run(pair).taps


def _typed(center: Recording, taps: Recording) -> Recording:
    """The most exact values with the dtypes of a run, whose roundings are counted in its units."""
    return {
        name: Tap(rounded(tap.array, "bfloat16"), "bfloat16") if taps[name].dtype == "bfloat16" else tap
        for name, tap in center.items()
        if name in taps
    }
