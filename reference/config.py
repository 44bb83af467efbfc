"""The configurations of the language model and the vision tower, read strictly."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reference.checks import is_finite, is_integer, require_file
from reference.errors import ReferenceError

# Keys of the official file that say nothing about inference. tie_word_embeddings is among them because it is wrong
# there: the file says true, the checkpoint holds an lm_head of its own and upstream unties it.
IGNORED = frozenset(
    "_attn_implementation _name_or_path apply_qwen_2_5_vl_pos_emb architectures attention_dropout attn_implementation "
    "bos_token_id dtype eos_token_id freeze_und initializer_range is_causal layer_module max_position_embeddings "
    "max_window_layers model_type pad_token_id qk_norm qk_norm_gen qk_norm_und sliding_window tie_word_embeddings "
    "torch_dtype transformers_version use_cache vision_token_id".split()
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
TOKENS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
USED = frozenset((*SIZES, *TOKENS, "rms_norm_eps", "rope_theta", "rope_scaling", "vision_config"))
CHECKED = frozenset(("hidden_act", "head_dim", "use_sliding_window"))
VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
)
VISION_IGNORED = frozenset(
    "_attn_implementation architectures dtype initializer_range model_type spatial_patch_size tokens_per_second "
    "torch_dtype transformers_version".split()
)
MOST_LAYERS = 1000
"""More than any model has: they would be built before the weights are looked at."""
VISION = frozenset((*VISION_SIZES, *VISION_IGNORED, "fullatt_block_indexes", "hidden_act", "in_channels", "in_chans"))


def read_object(path: Path) -> dict:
    """A JSON object; raises ReferenceError."""
    try:
        require_file(path)
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReferenceError(f"{path}: not found; give the checkpoint's folder in the official layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReferenceError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ReferenceError(f"{path}: not a JSON object")
    return values


def checker(path: Path) -> Callable[[bool, str], None]:
    """What complains about a file by its path."""

    def check(condition: bool, complaint: str) -> None:
        if not condition:
            raise ReferenceError(f"{path}: {complaint}")

    return check


def natural(value: object, most: int = 2**24) -> bool:
    """Whether a value is a positive integer, and none that no model could have."""
    return is_integer(value) and 0 < value <= most


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the language model and the ids of the four visual control tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vision_start_token_id: int
    vision_end_token_id: int
    image_token_id: int
    video_token_id: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tokens_per_second: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_file(cls, path: Path) -> "LanguageConfig":
        """Read and check llm_config.json; an unknown, missing or contradictory key is a ReferenceError."""
        return cls._from_values(read_object(path), path)

    @classmethod
    def _from_values(cls, values: dict, path: Path) -> "LanguageConfig":
        check = checker(path)
        unknown = sorted(values.keys() - USED - CHECKED - IGNORED)
        check(not unknown, f"unknown key '{', '.join(unknown)}'; this model has no meaning for it")
        missing = sorted(USED - values.keys())
        check(not missing, f"key '{', '.join(missing)}' is missing")
        for key in (*SIZES, *TOKENS):
            check(natural(values[key]), f"{key} is {values[key]!r}, not a positive integer of some size")
        layers = values["num_hidden_layers"]
        check(layers <= MOST_LAYERS, f"num_hidden_layers is {layers}, more than {MOST_LAYERS}")
        for key in ("rms_norm_eps", "rope_theta"):
            check(is_finite(values[key]) and values[key] > 0, f"{key} is {values[key]!r}, not a positive number")
        hidden, heads, kv_heads = (values[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        check(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        check(heads % kv_heads == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = hidden // heads
        check(values.get("head_dim", head_dim) == head_dim, f"head_dim is not hidden_size / heads = {head_dim}")
        check(values.get("hidden_act", "silu") == "silu", f"hidden_act is {values.get('hidden_act')!r}, not 'silu'")
        check(not values.get("use_sliding_window", False), "use_sliding_window is true; Lance attends to everything")
        for key in TOKENS:
            check(values[key] < values["vocab_size"], f"{key} {values[key]} lies outside vocab_size")

        rope, vision = values["rope_scaling"], values["vision_config"]
        check(isinstance(rope, dict) and isinstance(vision, dict), "rope_scaling and vision_config must be objects")
        unknown = sorted(rope.keys() - {"type", "rope_type", "mrope_section"})
        check(not unknown, f"unknown key 'rope_scaling.{', '.join(unknown)}'")
        for key in ("type", "rope_type"):
            kind = rope.get(key, "mrope")
            check(kind in ("mrope", "default"), f"rope_scaling.{key} is {kind!r}, not 'mrope'")
        section = rope.get("mrope_section")
        sound = isinstance(section, list) and len(section) == 3 and all(natural(n) for n in section)
        sound = sound and 2 * sum(section) == head_dim
        check(sound, f"rope_scaling.mrope_section {section} does not sum to half of head_dim {head_dim}")
        unknown = sorted(vision.keys() - VISION)
        check(not unknown, f"unknown key 'vision_config.{', '.join(unknown)}'")
        check(vision.get("out_hidden_size", hidden) == hidden, "vision_config.out_hidden_size is not hidden_size")
        check(vision.get("spatial_merge_size", 2) == 2, "vision_config.spatial_merge_size is not 2")
        check(natural(vision.get("tokens_per_second")), "vision_config.tokens_per_second is not a positive integer")
        return cls(
            **{key: values[key] for key in (*SIZES, *TOKENS, "rms_norm_eps", "rope_theta")},
            mrope_section=tuple(section),
            tokens_per_second=vision["tokens_per_second"],
        )


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; window_size in pixels."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]

    @classmethod
    def from_file(cls, path: Path) -> "VisionConfig":
        """Read and check the tower's config.json; an unknown, missing or contradictory key is a ReferenceError."""
        values, check = read_object(path), checker(path)
        unknown = sorted(values.keys() - VISION)
        check(not unknown, f"unknown key '{', '.join(unknown)}'; this model has no meaning for it")
        missing = sorted({*VISION_SIZES, "fullatt_block_indexes"} - values.keys())
        check(not missing, f"key '{', '.join(missing)}' is missing")
        for key in VISION_SIZES:
            check(natural(values[key]), f"{key} is {values[key]!r}, not a positive integer of some size")
        check(values["depth"] <= MOST_LAYERS, f"depth is {values['depth']}, more than {MOST_LAYERS}")
        hidden, heads = values["hidden_size"], values["num_heads"]
        # Rows and columns share the pairs of a head's features.
        check(hidden % (4 * heads) == 0, f"hidden_size {hidden} is not a multiple of four times num_heads {heads}")
        check(values.get("hidden_act", "silu") == "silu", f"hidden_act is {values.get('hidden_act')!r}, not 'silu'")
        for key in ("in_channels", "in_chans"):
            check(values.get(key, 3) == 3, f"{key} is {values.get(key)!r}, not 3")
        check(values["spatial_merge_size"] == 2, "spatial_merge_size is not 2")
        unit = values["patch_size"] * values["spatial_merge_size"]
        check(values["window_size"] % unit == 0, f"window_size is not a multiple of {unit} pixels")
        full = values["fullatt_block_indexes"]
        sound = isinstance(full, list) and all(is_integer(i) and 0 <= i < values["depth"] for i in full)
        check(sound, f"fullatt_block_indexes {full!r} are not blocks of {values['depth']}")
        return cls(**{key: values[key] for key in VISION_SIZES}, fullatt_block_indexes=tuple(full))
