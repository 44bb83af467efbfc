"""Architecture of a Lance checkpoint, read from its llm_config.json."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lance_mlx.errors import LanceError, reason
from lance_mlx.files import read_json

Config = TypeVar("Config")
LATENT_CHANNELS = 48
SPATIAL_STRIDE = 16
"""Pixels per latent cell, along height and along width."""
TEMPORAL_STRIDE = 4
"""Frames per latent frame, after the first."""
MAX_NUM_FRAMES = 121
MAX_LATENT_SIDE = 64
"""Latent cells per side of the position table."""
MAX_LATENT_FRAMES = MAX_NUM_FRAMES // TEMPORAL_STRIDE + 1
"""Latent frames of the position table."""

# Keys of official configurations that do not change what inference computes here. `tie_word_embeddings` is among them
# although the official file says true: the checkpoint holds an lm_head of its own and upstream's launcher overrides
# the key.
_INERT_KEYS = frozenset(
    """
    architectures attention_dropout initializer_range use_cache tie_word_embeddings torch_dtype dtype freeze_und
    transformers_version _name_or_path bos_token_id eos_token_id pad_token_id sliding_window max_window_layers
    max_position_embeddings _attn_implementation is_causal
    """.split()
)
# Keys with the one value that the implementation computes.
_FIXED_KEYS = {
    "model_type": ("qwen2_5_vl", "qwen2"),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "layer_module": ("Qwen2MoTDecoderLayer",),
    "qk_norm": (True,),
    "qk_norm_und": (True,),
    "qk_norm_gen": (True,),
    "apply_qwen_2_5_vl_pos_emb": (True,),
}
_SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# They are built before the weights are looked at.
_MOST = {"num_hidden_layers": 1000, "depth": 1000}
_TOKEN_KEYS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


@dataclass(frozen=True)
class LanceConfig:
    """Sizes of the two-expert transformer and of its multimodal RoPE.

    Attributes:
        mrope_section: rotary frequencies given to the t, h and w axis; they add up to `head_dim // 2`.
        tokens_per_second: RoPE positions per latent frame along t.
        special_tokens: token text -> id, for the visual tokens that the configuration names.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tokens_per_second: int
    special_tokens: dict[str, int]

    @classmethod
    def from_file(cls, path: Path) -> "LanceConfig":
        """Read llm_config.json; raises LanceError naming a missing, unknown, misshapen or contradictory key."""
        return read_config(path, cls.from_dict, "give the folder of an official Lance checkpoint")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LanceConfig":
        """Build from the keys of llm_config.json; raises LanceError as `from_file` does."""
        known = {*_INERT_KEYS, *_FIXED_KEYS, *_SIZE_KEYS, *_TOKEN_KEYS}
        known |= {"head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "vision_config"}
        check_keys(values, known, _FIXED_KEYS)
        sizes = {key: integer(values, key) for key in _SIZE_KEYS}
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        if heads % kv_heads:
            raise LanceError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if sizes["hidden_size"] % heads:
            raise LanceError(f"hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads {heads}")
        head_dim = sizes["hidden_size"] // heads
        if values.get("head_dim", head_dim) != head_dim:
            raise LanceError(
                f"head_dim {values['head_dim']} contradicts hidden_size / num_attention_heads = {head_dim}"
            )
        section = _mrope_section(values.get("rope_scaling"), head_dim)
        vision = values.get("vision_config", {})
        if not isinstance(vision, dict) or vision.get("spatial_merge_size", 2) != 2:
            raise LanceError("vision_config.spatial_merge_size must be 2")
        if vision.get("out_hidden_size", sizes["hidden_size"]) != sizes["hidden_size"]:
            raise LanceError(f"vision_config.out_hidden_size {vision['out_hidden_size']} is not hidden_size")
        return cls(
            **sizes,
            head_dim=head_dim,
            rms_norm_eps=_positive(values, "rms_norm_eps", 1e-6),
            rope_theta=_positive(values, "rope_theta", 1e6),
            mrope_section=section,
            tokens_per_second=integer(vision, "tokens_per_second") if "tokens_per_second" in vision else 2,
            special_tokens={text: integer(values, key, 0) for key, text in _TOKEN_KEYS.items() if key in values},
        )


def read_config(path: Path, build: Callable[[dict[str, Any]], Config], remedy: str) -> Config:
    """What `build` makes of the object in a JSON file; every LanceError names the file, a missing one's the remedy."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise LanceError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError) as error:
        raise LanceError(f"{path} is not readable JSON ({reason(error)}): fetch it again") from None
    if not isinstance(values, dict):
        raise LanceError(f"{path} must hold a JSON object")
    try:
        return build(values)
    except LanceError as error:
        raise LanceError(f"{path}: {error}") from None


def check_keys(values: dict[str, Any], known: set[str], fixed: dict[str, tuple]) -> None:
    """Raise LanceError for a key that is not known, and for a fixed key with another value than those it may have."""
    unknown = sorted(set(values) - known)
    if unknown:
        raise LanceError(f"unknown key '{unknown[0]}': this version would ignore it")
    for key, allowed in fixed.items():
        if key in values and values[key] not in allowed:
            raise LanceError(f"'{key}' is {values[key]!r}, but only {allowed[0]!r} is supported")


def integer(values: dict[str, Any], key: str, least: int = 1) -> int:
    """The integer of that key; raises LanceError when it is missing, of another type, too small or beyond any model."""
    value, most = values.get(key), _MOST.get(key, 2**24)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise LanceError(f"'{key}' must be an integer from {least} to {most}, not {value!r}")
    return value


def _positive(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise LanceError(f"'{key}' must be a positive number below 1e30, not {value!r}")
    return float(value)


def _mrope_section(rope_scaling: Any, head_dim: int) -> tuple[int, int, int]:
    section = rope_scaling.get("mrope_section") if isinstance(rope_scaling, dict) else None
    if not (isinstance(section, list) and len(section) == 3 and all(isinstance(size, int) for size in section)):
        raise LanceError("rope_scaling.mrope_section must be a list of three integers")
    if head_dim % 2 or sum(section) != head_dim // 2 or min(section) < 0:
        raise LanceError(f"rope_scaling.mrope_section {section} must add up to head_dim / 2 = {head_dim / 2:g}")
    return tuple(section)
