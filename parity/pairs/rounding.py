"""What rounding alone does to a pair: equally right ways to compute each part from what it is given."""

import copy
import math
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from parity.oracle.floors import Floors, LevelTable
from parity.pairs.names import kind_of
from parity.pairs.pair import Pair
from parity.pairs.torch_side import TorchSide
from parity.tensors.recording import Recording, Tap
from parity.tensors.rounding import rounded

DRAWS = 4
# Terms that may be added up one after the other in a narrow dtype: of more, most are lost beside their sum.
RUNNING = 64

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
_FUNCTIONS = {
    aten.exp.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.tanh.default, aten.rsqrt.default,
    aten.sqrt.default, aten.cos.default, aten.sin.default, aten.pow.Tensor_Scalar, aten.div.Tensor,
}  # fmt: skip
# Made of an exponential and what cancels it.
_CANCELLING = {aten.elu.default, aten.expm1.default, aten.softplus.default, aten.mish.default}
_SUMS = {
    aten.mean.dim, aten.sum.dim_IntList, aten.var.correction, aten.cumsum.default, aten._softmax.default,
    aten.native_layer_norm.default, aten.native_group_norm.default,
}  # fmt: skip
# In units of 2^-24: how far libraries' exponentials are off (MLX's on a CPU: 1.5, root mean square), and what the
# rounding of one term after the other makes of a sum of n terms, over the square root of n (0.4 / sqrt(3)).
_FUNCTION, _TERM = 1.5, 0.23


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
        if func not in _FUNCTIONS | _CANCELLING | _SUMS:
            return output
        first = output[0] if isinstance(output, tuple) else output
        if first.dtype not in (torch.float32, torch.bfloat16):
            return output
        first = self._off(func, args, first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def _off(self, func: Any, args: tuple, value: Tensor) -> Tensor:
        """A result as another library rounds it."""
        wide = value.float()
        if func in _FUNCTIONS:
            # The two terms of GELU cancel where x is below 0.
            by = args[0].float() if func is aten.gelu.default else wide
            return (wide + by * self._noise(wide.shape, _FUNCTION)).to(value.dtype)
        if func in _CANCELLING:
            return (wide + wide.abs().clamp(min=1) * self._noise(wide.shape, _FUNCTION)).to(value.dtype)
        if func is aten.cumsum.default:
            terms = args[0].float().abs().cumsum(args[1])
            return (wide + terms * self._noise(wide.shape, _TERM * wide.shape[args[1]] ** 0.5)).to(value.dtype)
        if func in (aten.mean.dim, aten.sum.dim_IntList, aten.var.correction):
            off = _TERM * (args[0].numel() / max(wide.numel(), 1)) ** 0.5
            return (wide * (1 + self._noise(wide.shape, off))).to(value.dtype)
        # What is divided by a sum over a row is off as that is, all of it alike.
        count = wide.shape[0] * args[6] if func is aten.native_group_norm.default else wide.numel() // wide.shape[-1]
        rows = wide.reshape(count, -1)
        off = _TERM * rows.shape[1] ** 0.5
        shift = 0 if func is aten._softmax.default else self._noise((count, 1), off)
        return (rows * (1 + self._noise((count, 1), off)) + shift).reshape(wide.shape).to(value.dtype)

    def _noise(self, shape: tuple[int, ...], units: float) -> Tensor:
        return torch.randn(tuple(shape), generator=self._random) * (units * 2.0**-24)


class _Stepwise(TorchDispatchMode):
    """What a model of a narrow dtype computes in float32 or at once rounded after each step, as libraries do that have
    no such steps; but for statistics, one to a row, and what is made of no narrow values, such as angles of positions
    or times: those turned by a rounded angle are wrong ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        # Whether something that was computed in float32 was made of narrow values.
        self._of_narrow = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        narrow = any(each.dtype == self._dtype or self._of_narrow.get(each, False) for each in given)
        if narrow and not func._schema.is_mutable:
            # What narrow values meet is one of them too.
            args = tree_map(lambda each: self._rounded(each) if self._is_wide(each) else each, args)
            output = self._made(func, args, kwargs)
        else:
            output = func(*args, **kwargs)
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and each.dtype == torch.float32:
                self._of_narrow[each] = narrow
        return output

    def _is_wide(self, value: Any) -> bool:
        wide = isinstance(value, Tensor) and self._of_narrow.get(value, True) is False
        return wide and value.ndim > 0 and value.shape[-1] > 1

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(self._dtype).to(value.dtype)

    def _made(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is aten._softmax.default:
            return self._softmax(*args[:2])
        if func is aten.cumsum.default:
            return self._running(args[0], args[1])
        if func in (aten.silu.default, aten.gelu.default) and args[0].dtype == self._dtype:
            return _activated(args[0], func, kwargs.get("approximate", "none"))
        if func is aten.native_layer_norm.default and args[0].dtype == self._dtype:
            x, shape, weight, bias, eps = args
            axes = tuple(range(-len(shape), 0))
            off = x - x.mean(axes, keepdim=True)
            normed = off * torch.rsqrt((off * off).mean(axes, keepdim=True) + eps)
            rest = func(*args)[1:]
            made = normed if weight is None else normed * weight
            return (made if bias is None else made + bias, *rest)
        if func is aten.native_group_norm.default and args[0].dtype == self._dtype:
            x, weight, bias, *shape = args
            (made, *rest) = func(x, None, None, *shape)
            across = (1, -1, *(1 for _ in made.shape[2:]))
            made = made if weight is None else made * weight.reshape(across)
            return (made if bias is None else made + bias.reshape(across), *rest)
        if func in _CANCELLING and args[0].dtype == self._dtype:
            return _in_steps(args, func)
        if func in (aten.mean.dim, aten.sum.dim_IntList) and args[0].dtype == self._dtype and args[1] and not kwargs:
            # The sum is rounded, and its part of it again.
            total = self._total(*args)
            return total / (args[0].numel() // max(total.numel(), 1)) if func is aten.mean.dim else total
        if func is aten.addmm.default and not kwargs:
            return args[1] @ args[2] + args[0]
        if func is aten.convolution.default and args[2] is not None:
            made = func(*args[:2], None, *args[3:])
            return made + args[2].reshape(-1, *(1 for _ in made.shape[2:]))
        output = func(*args, **kwargs)
        wide = isinstance(output, Tensor) and output.dtype == torch.float32 and output.ndim and output.shape[-1] > 1
        return self._rounded(output) if wide and func is not aten._to_copy.default else output

    def _softmax(self, x: Tensor, axis: int) -> Tensor:
        """Exponentials, their sum and its inverse rounded; the sum also term by term where these are few."""
        top = x.amax(axis, keepdim=True)
        powers = self._rounded(torch.exp(self._rounded(x - torch.where(top.isfinite(), top, 0))))
        if x.shape[axis] <= RUNNING:
            total = self._running(powers, axis).narrow(axis, x.shape[axis] - 1, 1)
        else:
            total = self._rounded(powers.sum(axis, keepdim=True))
        return self._rounded(powers * self._rounded(1 / total))

    def _total(self, x: Tensor, axes: list[int], keep: bool = False) -> Tensor:
        """A sum, rounded after each term where these are few."""
        total = x.sum(axes, keepdim=True)
        if 0 < x.numel() <= RUNNING * total.numel():
            terms = x.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes))
            total = self._running(terms, terms.ndim - 1)[..., -1].reshape(total.shape)
        return total if keep else total.squeeze(axes)

    def _running(self, x: Tensor, axis: int) -> Tensor:
        """A running sum, rounded after each term."""
        sums = [torch.zeros_like(x.select(axis, 0))] if x.shape[axis] else []
        for place in range(x.shape[axis]):
            sums.append(self._rounded(sums[-1] + x.select(axis, place)))
        return torch.stack(sums[1:], axis) if sums else x


def _activated(x: Tensor, func: Any, approximate: str) -> Tensor:
    """SiLU or GELU of bfloat16, one operation after the other."""
    if func is aten.silu.default:
        return x * torch.sigmoid(x)
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _in_steps(args: tuple, func: Any) -> Tensor:
    """What is made of an exponential, one operation after the other."""
    x = args[0]
    if func is aten.expm1.default:
        return torch.exp(x) - 1
    if func is aten.elu.default:
        alpha = args[1] if len(args) > 1 else 1.0
        return torch.where(x > 0, x, alpha * (torch.exp(x) - 1))
    soft = torch.log(1 + torch.exp(x))
    return soft if func is aten.softplus.default else x * torch.tanh(soft)


def measured(pair: Pair, own: Recording, told: Container[str]) -> Floors:
    """How far right ways to compute each part from the trusted model's own values are from the most exact one.

    `told` are the taps that the port tells: it computes all others on the way, and so do they.
    """
    given = {name: tap for name, tap in own.items() if name in told}
    center = _exact(pair, own, given)
    table, names = LevelTable(kind_of), list[str]()
    for number, (draw, taps) in enumerate(_variants(pair, own, given)):
        table.add(number, _typed(center, taps), taps, draw)
        names.append(draw.name)
    floors = table.floors(given, tuple(names))
    # What a part reads may have been computed once more, and rounded as what it is the result of.
    first: dict[bytes, str] = {}
    for name in floors.levels:
        tap = given[name]
        made = first.setdefault(tap.array.tobytes(), name)
        floors.levels[name] = max(floors.levels.get(name, 0.0), floors.levels.get(made, 0.0))
    return floors


def _exact(pair: Pair, own: Recording, given: Recording) -> Recording:
    """What the trusted model computes in float64; itself where some of its functions have no such thing."""
    try:
        return TorchSide(given, wide=True).run(pair, copy.deepcopy(pair.trusted).double()).taps
    except (RuntimeError, NotImplementedError):
        return own


def _variants(pair: Pair, own: Recording, given: Recording) -> Iterator[tuple[Draw, Recording]]:
    yield Draw("itself", 0, "itself"), own
    for number in range(1, DRAWS + 1):
        with _Disturbed(number):
            yield Draw(f"disturbed {number}", number), TorchSide(given, attend=_step_by_step).run(pair).taps
    dtypes = {parameter.dtype for parameter in pair.trusted.parameters()}
    for dtype in dtypes & {torch.bfloat16, torch.float16}:
        with _Stepwise(dtype):
            yield Draw("rounded step by step", 0, "stepwise"), TorchSide(given, attend=_step_by_step).run(pair).taps


def _step_by_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's attention, each step of it rounded to the dtype of the queries."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        added = (
            torch.zeros_like(scores).masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
        )
        scores = scores + added
    return torch.softmax(scores.float(), -1).to(query.dtype) @ value


def _typed(center: Recording, taps: Recording) -> Recording:
    """The most exact values with the dtypes of a run, whose roundings are counted in its units."""
    return {
        name: Tap(rounded(tap.array, "bfloat16"), "bfloat16") if taps[name].dtype == "bfloat16" else tap
        for name, tap in center.items()
        if name in taps
    }
