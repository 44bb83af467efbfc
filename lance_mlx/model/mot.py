"""The mixture-of-transformers language model: two experts, one attention.

Shapes: n tokens of a segment, of which `und` rows belong to the understanding expert and `gen` rows to the generation
expert; m keys, those of the cached prefix included. A segment's latents are one contiguous run. A pass takes one
segment in one or more readings, such as the arms of guidance: their rows follow each other and share every product, and
each attends for itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.backend.allocator import release
from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.backend.pieces import by_rows
from lance_mlx.config import LanceConfig
from lance_mlx.model.attention import attention
from lance_mlx.model.layers import MLP, FusedLinear, Linear
from lance_mlx.model.rope import Rotary, RotaryTable

FREE_BYTES = 40_000_000
"""Size of an MLP's values up to which a GPU may be given all layers at once. With larger ones it is given the next
layer when the last but one is done: MLX would hold what ten batches of its work make, several times as much, and took
longer for it on an H200."""


class ExpertRows(NamedTuple):
    """Rows of a pass, parted by expert: each expert computes its own rows and no others.

    Attributes:
        und: [und, ...]; all tokens of a text segment, or the two brackets around a latent block.
        gen: [gen, ...], the latents of the block, or None.

    Of several readings, und and gen hold those of the first, then those of the second; `apart` and `joined` go from one
    form to the other.
    """

    und: mx.array
    gen: mx.array | None

    def interleave(self) -> mx.array:
        """The rows in sequence order, [n, ...]."""
        if self.gen is None:
            return self.und
        return mx.concatenate([self.und[:1], self.gen, self.und[1:]], axis=0)

    def by_expert(self, rows: mx.array) -> "ExpertRows":
        """Rows in sequence order, split by expert as these are."""
        if self.gen is None:
            return ExpertRows(rows, None)
        return ExpertRows(mx.concatenate([rows[:1], rows[-1:]], axis=0), rows[1:-1])

    def split_arms(self, arms: int) -> list["ExpertRows"]:
        """The rows of every guidance arm by themselves."""
        if arms == 1:
            return [self]
        gen = [None] * arms if self.gen is None else mx.split(self.gen, arms)
        return [ExpertRows(*rows) for rows in zip(mx.split(self.und, arms), gen, strict=True)]

    @classmethod
    def concat_arms(cls, parts: Sequence["ExpertRows"]) -> "ExpertRows":
        """The rows of several arms of one segment, after each other."""
        if len(parts) == 1:
            return parts[0]
        und, gen = zip(*parts, strict=True)
        return cls(mx.concatenate(und), None if gen[0] is None else mx.concatenate(gen))

    def __add__(self, other: "ExpertRows") -> "ExpertRows":
        return ExpertRows(self.und + other.und, None if self.gen is None else self.gen + other.gen)


class KeyValues(NamedTuple):
    """Keys and values of the tokens seen so far in one layer, [m, kv_heads, head_dim] each."""

    keys: mx.array
    values: mx.array


KVCache = tuple[KeyValues, ...]
"""One KeyValues a layer; the empty tuple before the first pass. Passes return a new cache and never change the given
one."""


class ArmInput(NamedTuple):
    """A segment in one guidance arm: where its tokens are, and the cache of what came before."""

    rotary: RotaryTable
    cache: KVCache

    def at(self, index: int) -> "LayerInput":
        """What the layer of that number needs of it."""
        return LayerInput(self.rotary, self.cache[index] if self.cache else None)


class LayerInput(NamedTuple):
    """An arm's segment as one layer sees it; `past` is None before the first pass."""

    rotary: RotaryTable
    past: KeyValues | None

    def followed_by(self, keys: mx.array, values: mx.array) -> KeyValues:
        """Keys and values of what was read before and of these, [n, kv_heads, head_dim] each."""
        if self.past is None:
            return KeyValues(keys, values)
        return KeyValues(
            mx.concatenate([self.past.keys, keys], axis=0), mx.concatenate([self.past.values, values], axis=0)
        )


class ScaledDotProductAttention(nn.Module):
    """Attention of a pass over the cached prefix and itself."""

    def __call__(self, queries: mx.array, kv: KeyValues, causal: bool) -> mx.array:
        """queries [n, heads, head_dim] -> [n, heads, head_dim]."""
        q, k, v = (x.transpose(1, 0, 2)[None] for x in (queries, kv.keys, kv.values))
        return attention(q, k, v, causal)[0].transpose(1, 0, 2)


class SelfAttention(nn.Module):
    """Attention whose projections and query/key norms exist once per expert."""

    def __init__(self, config: LanceConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim, self._width = head_dim, hidden
        heads, kv_heads = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        for suffix in ("", "_moe_gen"):
            self[f"q_proj{suffix}"] = Linear(hidden, heads)
            self[f"k_proj{suffix}"] = Linear(hidden, kv_heads)
            self[f"v_proj{suffix}"] = Linear(hidden, kv_heads)
            self[f"o_proj{suffix}"] = Linear(heads, hidden, bias=False)
            self[f"q_norm{suffix}"] = nn.RMSNorm(head_dim, config.rms_norm_eps)
            self[f"k_norm{suffix}"] = nn.RMSNorm(head_dim, config.rms_norm_eps)
        self._qkv: FusedLinear | None = None
        self.q_rope = Rotary()
        self.k_rope = Rotary()
        self.sdpa = ScaledDotProductAttention()

    def __call__(
        self, x: ExpertRows, contexts: Sequence[LayerInput], causal: bool, qk_float32: bool
    ) -> tuple[ExpertRows, list[KeyValues]]:
        """Attend; returns the output rows, and each reading's keys and values with its past.

        Args:
            qk_float32: norm and rotate queries and keys in float32 and round them only before attention.
        """
        dtype = x.und.dtype
        queries, keys, values = self._heads(x)
        queries, keys = self._normed(queries, "q", qk_float32), self._normed(keys, "k", qk_float32)
        attended, seen = [], []
        by_arm = (rows.split_arms(len(contexts)) for rows in (queries, keys, values))
        for q, k, v, context in zip(*by_arm, contexts, strict=True):
            turned, keys = self._turned("q", q, context.rotary, dtype), self._turned("k", k, context.rotary, dtype)
            kv = context.followed_by(keys, v.interleave())
            attended.append(q.by_expert(self.sdpa(turned, kv, causal)))
            seen.append(kv)
        rows = ExpertRows.concat_arms(attended)
        und = self.o_proj(rows.und.flatten(1))
        gen = None if rows.gen is None else self.o_proj_moe_gen(rows.gen.flatten(1))
        return ExpertRows(und, gen), seen

    def join(self) -> None:
        """Let the projections of text be one product for one row; the weights have to be loaded."""
        self._qkv = FusedLinear(self._projections(""))

    def _projections(self, suffix: str) -> list[Linear]:
        return [self[f"{kind}_proj{suffix}"] for kind in "qkv"]

    def _heads(self, x: ExpertRows) -> list[ExpertRows]:
        """Queries, keys and values, [rows, heads, head_dim] each."""

        def apart(rows: mx.array, suffix: str) -> list[mx.array]:
            return [linear(rows) for linear in self._projections(suffix)]

        def headed(y: mx.array | None) -> mx.array | None:
            return None if y is None else y.reshape(len(y), -1, self.head_dim)

        und = self._qkv(x.und) if self._qkv else apart(x.und, "")
        gen = [None] * 3 if x.gen is None else apart(x.gen, "_moe_gen")
        return [ExpertRows(headed(u), headed(g)) for u, g in zip(und, gen, strict=True)]

    def _normed(self, heads: ExpertRows, kind: str, wide: bool) -> ExpertRows:
        def norm(suffix: str, rows: mx.array) -> mx.array:
            return self[f"{kind}_norm{suffix}"](rows.astype(mx.float32) if wide else rows)

        return _each(norm, heads, self._width)

    def _turned(self, kind: str, heads: ExpertRows, rotary: RotaryTable, dtype: mx.Dtype) -> mx.array:
        """The heads in sequence order, rotated."""

        def turn(rows: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
            return self[f"{kind}_rope"](rows, replace(rotary, cos=cos, sin=sin)).astype(dtype)

        return by_rows(turn, self._width, heads.interleave(), rotary.cos, rotary.sin)


class MoTDecoderLayer(nn.Module):
    """Pre-norm transformer layer with both experts."""

    def __init__(self, config: LanceConfig) -> None:
        super().__init__()
        self._intermediate_size = config.intermediate_size
        self.self_attn = SelfAttention(config)
        for suffix in ("", "_moe_gen"):
            self[f"mlp{suffix}"] = MLP(config.hidden_size, config.intermediate_size, bias=False)
            self[f"input_layernorm{suffix}"] = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
            self[f"post_attention_layernorm{suffix}"] = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, x: ExpertRows, contexts: Sequence[LayerInput], causal: bool, qk_float32: bool
    ) -> tuple[ExpertRows, list[KeyValues]]:
        """Residual stream in and out, with the layer's keys and values of every reading."""
        attended, seen = self.self_attn(_by_expert(self, "input_layernorm", x), contexts, causal, qk_float32)
        return _each(self._fed, x + attended, self._intermediate_size), seen

    def _fed(self, suffix: str, x: mx.array) -> mx.array:
        """One expert's residual stream [rows, hidden] after its feed-forward."""
        return x + self[f"mlp{suffix}"](self[f"post_attention_layernorm{suffix}"](x))


class MoTModel(nn.Module):
    """Token embeddings, decoder layers and the two final norms (bytedance/Lance modeling/lance/qwen2_navit.py)."""

    def __init__(self, config: LanceConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [MoTDecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.joined = False
        self._intermediate_size = config.intermediate_size

    def __call__(
        self, inputs_embeds: ExpertRows, readings: Sequence[ArmInput], causal: bool, qk_float32: bool, keep: bool = True
    ) -> tuple[ExpertRows, list[KVCache]]:
        """One pass over a segment: its final hidden states [rows, hidden] and each reading's cache with this pass in
        it, or none where it is not to be kept."""
        x, layers = inputs_embeds, []
        paced = not runs_on_cpu() and self._mlp_bytes(x) > FREE_BYTES
        for index, layer in enumerate(self.layers):
            before = x
            x, seen = layer(x, [reading.at(index) for reading in readings], causal, qk_float32)
            if keep:
                layers.append(seen)
            if paced:
                mx.async_eval(x, seen if keep else ())
                mx.eval(before)
        return _by_expert(self, "norm", x), list(zip(*layers, strict=True))

    def _mlp_bytes(self, x: ExpertRows) -> int:
        """Size of what is between gate and down projection."""
        return sum(len(rows) for rows in x if rows is not None) * self._intermediate_size * x.und.dtype.size


def join_projections(model: MoTModel) -> None:
    """Let text's projections of the same input be one product for a pass of one row, such as a token of an answer,
    unless they are already.

    The weights have to be loaded, and stay. The result is the same but for the order of sums.
    """
    if model.joined:
        return
    for layer in model.layers:
        layer.self_attn.join()
        layer.mlp.join()
        # What they were before would stay beside what they are.
        release()
    model.joined = True


class LanguageModel(nn.Module):
    """The transformer and its untied output head."""

    def __init__(self, config: LanceConfig) -> None:
        super().__init__()
        self.model = MoTModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)


def _by_expert(module: nn.Module, name: str, x: ExpertRows) -> ExpertRows:
    """Apply the child `name` to the understanding rows and its `_moe_gen` twin to the generation rows."""
    return _each(lambda suffix, rows: module[f"{name}{suffix}"](rows), x, x.und.shape[-1])


def _each(function: Callable[[str, mx.array], mx.array], x: ExpertRows, width: int) -> ExpertRows:
    """function(suffix of an expert's modules, its rows) of both experts; `width` as in by_rows."""
    suffixes = zip(("", "_moe_gen"), x, strict=True)
    return ExpertRows(*(None if rows is None else by_rows(partial(function, suffix), width, rows)
                        for suffix, rows in suffixes))  # fmt: skip
