"""Which taps and inputs a bundle holds."""

import re

from parity.lance.names import parse

INPUTS = (
    *("text_ids", "modality", "split_lens", "attn_modes", "video_grid_thw", "video_sizes", "vae_video_grid_thw"),
    *("vit_video_grid_thw", "packed_vae_token_indexes", "packed_vit_token_indexes", "mse_loss_indexes"),
    "ce_loss_indexes",
)
"""The integers of a layout that a bundle's inputs hold."""
CHUNKS = (0, 1)
_LAYER = r"language_model\.model\.layers\.\d+"
_EXPERT = "(_moe_gen)?"
_DETAIL = re.compile(
    rf"position_ids|hidden_in|hidden_out|llm2vae|{_LAYER}|{_LAYER}\.(input_layernorm|post_attention_layernorm|mlp)"
    rf"{_EXPERT}|{_LAYER}\.self_attn\.(q_rope|k_rope|sdpa|(q_norm|k_norm|o_proj){_EXPERT})"
)
_CODER_BLOCK = re.compile(r"(encoder|decoder)(\.conv1|\.(downsamples|middle|upsamples)\.\d+)?")
_WHOLE = re.compile(
    r"sampler\.(noise|x_t\d+|timestep\d+)|time_embedder|velocity_call\d+|latent|tokens|pixels|vit_model0"
)
_VISUAL = re.compile(r"vae\.encode\d+\.(mean|logvar|eps)|vae\.latent\d+")
_CACHED_ONLY = re.compile(r"sampler\.x_init|vit_model0\.(patch_embed|blocks\.\d+)")


class RecordedTaps:
    """The names of the taps that a bundle holds: those that upstream's bundles of the same kind hold.

    The full-sequence entry has no calls of its own; in the other the prefix, the first and the last step (of an answer
    the first token) are in detail, and of the VAE the first two chunks.
    """

    def __init__(self, entry: str, num_steps: int) -> None:
        self.cached, self.last = entry == "kv_cache", num_steps - 1

    def __contains__(self, name: str) -> bool:
        if _WHOLE.fullmatch(name) or _VISUAL.fullmatch(name):
            return True
        if not self.cached:
            return False
        call, _, path = name.partition("/")
        if not path:
            return bool(_CACHED_ONLY.fullmatch(name))
        numbers = parse(name).numbers
        if call.startswith("vae."):
            return numbers["chunk"] in CHUNKS and bool(_CODER_BLOCK.fullmatch(path))
        if ".decode" in call:
            return numbers["step"] == 0 and bool(_DETAIL.fullmatch(path))
        if ".step" in call and numbers["step"] not in (0, self.last):
            return path == "llm2vae"
        return bool(_DETAIL.fullmatch(path))
