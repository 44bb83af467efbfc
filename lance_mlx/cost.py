"""What a pass costs: floating point operations of the transformer, counted from its sizes."""

from collections.abc import Iterable

from lance_mlx.config import LanceConfig
from lance_mlx.sequence import Sequence


def expert_weights(config: LanceConfig) -> int:
    """Weights of one expert's projections in one layer: what a token is multiplied with."""
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * heads + 2 * kv_heads + 3 * config.intermediate_size)


def pass_operations(config: LanceConfig, rows: int, keys: int) -> int:
    """Floating point operations of a pass of `rows` tokens, each of one expert, which see `keys` tokens.

    A multiplication and an addition count as two. Norms, RoPE and activations are left out: a few in a thousand.
    """
    projections = 2 * rows * expert_weights(config)
    attention = 4 * rows * keys * config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * (projections + attention)


def step_operations(config: LanceConfig, arms: Iterable[Sequence]) -> int:
    """Floating point operations of a denoising step: each arm passes the denoised block, which sees its prefix and
    itself."""
    return sum(pass_operations(config, len(arm.target), arm.starts[arm.target_index] + len(arm.target)) for arm in arms)
