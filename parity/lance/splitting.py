"""The full-sequence entry's passes cut into the calls of the cached entry.

Upstream's full-sequence entry runs all tokens in every pass. Nothing before the denoised block, or before an answer's
last token, sees what comes after it, so its rows are those that a cached run computes split by split.
"""

import numpy as np

from parity.lance.capture_torch import EMBED_TOKENS
from parity.lance.names import parse
from parity.tensors.recording import Recording, Tap
from reference.layout import Layout, Mode, Role, Split

_EXPERT_PARTS = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj", "input_layernorm", "norm")
_GEN_ALONE = ("vae2llm", "latent_pos_embed")


def split_passes(recording: Recording, layout: Layout) -> Recording:
    """Cut the taps of whole passes into those of prefixes and steps (or prefills and decodes); others stay."""
    pieces: Recording = {}
    for name, tap in recording.items():
        if "/" not in name or not name.startswith(("cond.", "uncond.")):
            pieces[name] = tap
            continue
        parsed = parse(name)
        step = parsed.numbers["step"]
        if layout.answer is None:
            pieces |= _cut_step(name, tap, parsed.arm, parsed.path, step, layout)
        else:
            pieces |= _cut_answer(name, tap, parsed.path, step, layout)
    return pieces


def _cut_step(name: str, tap: Tap, arm: str, path: str, step: int, layout: Layout) -> Recording:
    if path in ("llm2vae", "time_embedder"):
        return {}  # one has other rows than the cached entry's, the other has a row for each time of the sequence
    splits = [split for split in layout.splits if arm == "cond" or split.role is not Role.TEXT]
    target = next(i for i, split in enumerate(splits) if split.mode is Mode.NOISE)
    rows = [_rows(path, split) for split in splits]
    ends = np.cumsum(rows)
    axis = 1 if path == "position_ids" else 0
    if ends[-1] != tap.array.shape[axis]:
        return {}
    cut: Recording = {}
    for index in range(target + 1):
        if not rows[index] or (index < target and step):
            continue
        call = f"{arm}.step{step}" if index == target else f"{arm}.prefix{index}"
        piece = np.take(tap.array, range(ends[index] - rows[index], ends[index]), axis)
        cut[f"{call}/{path}"] = Tap(np.ascontiguousarray(piece), tap.dtype)
    return cut


def _cut_answer(name: str, tap: Tap, path: str, step: int, layout: Layout) -> Recording:
    axis = 1 if path == "position_ids" else 0
    context = layout.answer - 1
    if tap.array.shape[axis] == 1:
        return {name: tap}
    if tap.array.shape[axis] <= context + step or path == EMBED_TOKENS:
        return {}
    last = np.take(tap.array, [context + step], axis)
    cut = {name: Tap(np.ascontiguousarray(last), tap.dtype)}
    if step == 0:
        for index, split in enumerate(layout.prefix):
            piece = np.take(tap.array, range(split.start, split.stop), axis)
            cut[f"cond.prefill{index}/{path}"] = Tap(np.ascontiguousarray(piece), tap.dtype)
    return cut


def _rows(path: str, split: Split) -> int:
    """How many of a split's tokens a tap of a whole pass has rows for."""
    latents = split.length - 2 if split.mode in (Mode.FULL_NOISE, Mode.NOISE) else 0
    if path == EMBED_TOKENS:
        return 2 if split.grid else split.length
    if "_moe_gen" in path or path in _GEN_ALONE:
        return latents
    parts = path.split(".")
    of_expert = any(part in ("mlp", "post_attention_layernorm", *_EXPERT_PARTS) for part in parts)
    return split.length - latents if of_expert else split.length
