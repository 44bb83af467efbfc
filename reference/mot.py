"""The mixture-of-transformers language model: two experts a layer, one attention over all tokens.

Shapes: n query tokens of this pass, m cached tokens before them, h heads, d head_dim.
UND rows use the bare parameters, GEN rows those with the suffix _moe_gen.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.config import LanguageConfig
from reference.layout import Mode
from reference.numerics import Linear, Numerics, attend, widened


class KVCache:
    """Keys (after RoPE) and values [m, kv_heads, d] of the tokens before this pass, one pair a layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

    def before(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Cached keys and values of a layer followed by new ones."""
        if layer not in self.layers:
            return k, v
        old_k, old_v = self.layers[layer]
        return torch.cat([old_k, k]), torch.cat([old_v, v])


@dataclass(frozen=True)
class Pass:
    """What every layer of one pass shares.

    gen: bool [n], True for rows of the generation expert. mask: bool [n, m + n] or None when all is seen.
    cache: earlier tokens, extended by this pass if `keep`. raise_qk: queries and keys are normed and rotated in
    float32 whatever the weights' dtype. cos, sin: [n, d].
    """

    gen: Tensor
    mask: Tensor | None
    cache: KVCache
    keep: bool
    raise_qk: bool
    cos: Tensor
    sin: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to x's dtype, times the weight (bytedance/Lance modeling_qwen2.py:Qwen2RMSNorm).

    With a float32 x and a bfloat16 weight the product is float32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """SiLU-gated feed-forward layer, [n, hidden] -> [n, hidden]."""

    def __init__(self, hidden: int, inner: int, bias: bool, numerics: Numerics) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner, bias, numerics)
        self.up_proj = Linear(hidden, inner, bias, numerics)
        self.down_proj = Linear(inner, hidden, bias, numerics)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Rope(nn.Module):
    """Rotates [n, heads, d] by cos and sin [n, d]; first and second half of d form the pairs."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return x * cos[:, None] + turned * sin[:, None]


class Attend(nn.Module):
    """Attention of q [n, h, d] over k, v [m + n, kv_heads, d] -> [n, h, d]."""

    def __init__(self, numerics: Numerics) -> None:
        super().__init__()
        self.kind, self.draw = numerics.attention, numerics.draw

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask, self.kind, self.draw)


def by_expert(x: Tensor, gen: Tensor, und_module: nn.Module, gen_module: nn.Module) -> Tensor:
    """Apply each expert's module to its own rows of x, in sequence order, and put the results back in place."""
    if not gen.any():
        return und_module(x)
    und_out, gen_out = und_module(x[~gen]), gen_module(x[gen])
    out = gen_out.new_empty(x.shape[0], *gen_out.shape[1:])
    out[~gen], out[gen] = und_out, gen_out
    return out


class Attention(nn.Module):
    """Attention with per-expert projections and query/key norms (qwen2_navit.py:PackedAttentionMoT)."""

    def __init__(self, config: LanguageConfig, layer: int, numerics: Numerics) -> None:
        super().__init__()
        self.layer, self.dtype = layer, numerics.torch_dtype
        self.head_dim = config.head_dim
        q_size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        for suffix in ("", "_moe_gen"):
            self.add_module("q_proj" + suffix, Linear(config.hidden_size, q_size, True, numerics))
            self.add_module("k_proj" + suffix, Linear(config.hidden_size, kv_size, True, numerics))
            self.add_module("v_proj" + suffix, Linear(config.hidden_size, kv_size, True, numerics))
            self.add_module("o_proj" + suffix, Linear(q_size, config.hidden_size, False, numerics))
            self.add_module("q_norm" + suffix, RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module("k_norm" + suffix, RMSNorm(config.head_dim, config.rms_norm_eps))
        self.q_rope, self.k_rope, self.sdpa = Rope(), Rope(), Attend(numerics)

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        gen = shared.gen
        q, k, v = (
            by_expert(x, gen, und, own).unflatten(-1, (-1, self.head_dim))
            for und, own in (
                (self.q_proj, self.q_proj_moe_gen),
                (self.k_proj, self.k_proj_moe_gen),
                (self.v_proj, self.v_proj_moe_gen),
            )
        )
        if shared.raise_qk:
            q, k = widened(q), widened(k)
        q = by_expert(q, gen, self.q_norm, self.q_norm_moe_gen)
        k = by_expert(k, gen, self.k_norm, self.k_norm_moe_gen)
        q = self.q_rope(q, shared.cos, shared.sin).to(self.dtype)
        k = self.k_rope(k, shared.cos, shared.sin).to(self.dtype)
        k, v = shared.cache.before(self.layer, k, v)
        if shared.keep:
            shared.cache.layers[self.layer] = (k, v)
        out = self.sdpa(q, k, v, shared.mask).flatten(1)
        return by_expert(out, gen, self.o_proj, self.o_proj_moe_gen)


class DecoderLayer(nn.Module):
    """Norm, attention, norm, feed-forward, each with a residual (qwen2_navit.py:Qwen2MoTDecoderLayer)."""

    def __init__(self, config: LanguageConfig, layer: int, numerics: Numerics) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, numerics)
        for suffix in ("", "_moe_gen"):
            self.add_module("mlp" + suffix, MLP(config.hidden_size, config.intermediate_size, False, numerics))
            self.add_module("input_layernorm" + suffix, RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module("post_attention_layernorm" + suffix, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        gen = shared.gen
        x = x + self.self_attn(by_expert(x, gen, self.input_layernorm, self.input_layernorm_moe_gen), shared)
        normed = by_expert(x, gen, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return x + by_expert(normed, gen, self.mlp, self.mlp_moe_gen)


class Decoder(nn.Module):
    """The layers and the final norms."""

    def __init__(self, config: LanguageConfig, numerics: Numerics) -> None:
        super().__init__()
        # Not drawn at random: on the meta device that would import the whole of torch._dynamo, which takes seconds.
        rows = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i, numerics) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Qwen2.5-VL's decoder with two experts; lm_head turns final hidden states into logits."""

    def __init__(self, config: LanguageConfig, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        self.model = Decoder(config, numerics)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, numerics)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        gen: Tensor,
        mask: Tensor | None,
        cache: KVCache,
        keep: bool,
        raise_qk: bool,
    ) -> Tensor:
        """Run n tokens: inputs_embeds [n, hidden], position_ids [3, n] -> final hidden states [n, hidden]."""
        cos, sin = self.rotation(position_ids)
        shared = Pass(gen, mask, cache, keep, raise_qk, cos, sin)
        x = inputs_embeds
        for layer in self.model.layers:
            x = layer(x, shared)
        return by_expert(x, gen, self.model.norm, self.model.norm_moe_gen)

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, d] in the policy's dtype (modeling_qwen2_5_vl.py:Qwen2_5_VLRotaryEmbedding).

        In bfloat16 the frequencies themselves are rounded: upstream casts its buffers together with the weights.
        """
        d, dtype = self.config.head_dim, self.numerics.torch_dtype
        exponents = torch.arange(0, d, 2, device=position_ids.device).float() / d
        frequencies = (1.0 / self.config.rope_theta**exponents).to(dtype).float()
        angles = position_ids[:, :, None].float() * frequencies  # [3, n, d / 2]
        # Each run of frequencies turns by its own axis: t first, then h, then w.
        runs = angles.split(self.config.mrope_section, -1)
        angles = torch.cat([run[axis] for axis, run in enumerate(runs)], -1)
        angles = torch.cat([angles, angles], -1)
        # The angles are float32 in any dtype: that is what upstream turns by.
        angles = angles.to(torch.promote_types(angles.dtype, dtype))
        return angles.cos().to(dtype), angles.sin().to(dtype)


def visible(lengths: list[int], modes: list[Mode]) -> Tensor:
    """Mask bool [n, n] of a whole sequence of splits, True where a query sees a key (data_utils.py:create_sparse_mask).

    Every query sees itself and what comes before it, and the whole of its own split unless that is causal; nothing
    outside a noise split sees into it.
    """
    place = torch.arange(sum(lengths))
    split = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    causal, noise = (torch.tensor([mode is kind for mode in modes])[split] for kind in (Mode.CAUSAL, Mode.NOISE))
    own = split[:, None] == split[None]
    return ((place[:, None] >= place[None]) | (own & ~causal)) & (own | ~noise)


def causal(queries: int, past: int) -> Tensor:
    """Mask bool [queries, past + queries] of a causal split behind a cache of `past` tokens."""
    return torch.ones(queries, past + queries, dtype=torch.bool).tril(past)
