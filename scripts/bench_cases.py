"""The cases of bench.py: each builds a model with random weights and returns what is to be timed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from bench_media import vae_decode, vae_encode, vit
from bench_work import Work, randomized

import lance_mlx.model.mot as mot
from lance_mlx.backend.numerics import policy, runs_on_cpu
from lance_mlx.checkpoint.recipe import RECIPES, plan
from lance_mlx.config import LanceConfig
from lance_mlx.estimate.cost import pass_operations, step_operations
from lance_mlx.model.attention import attention
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ExpertRows
from lance_mlx.model.quantized import make_quantized, quantizable
from lance_mlx.requests.request import Question, Request, Task, Visual, VisualKind
from lance_mlx.requests.visuals import PreparedVisual
from lance_mlx.sampling.conditions import Conditions
from lance_mlx.sampling.flow import State, make_arms, velocities
from lance_mlx.sampling.text import AnswerDecoder, answer_tokens
from lance_mlx.sequence.prompt import build_sequence
from lance_mlx.sequence.segments import AttentionMode, Role, Segment, Sequence
from lance_mlx.sequence.tokenizer import LanceTokenizer

CHECKPOINT = Path(__file__).parents[1] / "oracles" / "checkpoint-a" / "Lance_3B"
PROMPT = "a small red bird flies over the river"
# Heads and feed-forward width by hidden size: the official ratios.
WIDTHS = {64: (4, 2, 160), 512: (4, 2, 2752), 2048: (16, 2, 11008)}
# Videos by their latents: width, height, frames.
VIDEOS = {
    2304: (768, 768, 1),
    9216: (768, 768, 13),
    29952: (768, 768, 49),
    49290: (848, 480, 121),
    71424: (768, 768, 121),
}


def config_of(hidden: int, layers: int) -> LanceConfig:
    """The official configuration at another width and depth, with the vocabulary of the tokenizer at hand."""
    config = LanceConfig.from_file(CHECKPOINT / "llm_config.json")
    heads, kv_heads, intermediate = WIDTHS[hidden]
    head_dim = hidden // heads
    section = (head_dim // 8, head_dim * 3 // 16, head_dim // 2 - head_dim // 8 - head_dim * 3 // 16)
    return replace(
        config,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        head_dim=head_dim,
        mrope_section=section,
    )


def _model(hidden: int, layers: int, dtype: str, recipe: str = "") -> Lance:
    numerics = policy(dtype)
    model = randomized(Lance(config_of(hidden, layers), numerics), numerics.dtype)
    if not recipe:
        return model
    schemes, modules = plan(RECIPES[recipe], model), quantizable(model)
    arrays = [(f"{path}.{name}", array) for path, scheme in schemes.items()
              for name, array in (dict(modules[path]) | scheme.quantize(modules[path].weight)).items()]  # fmt: skip
    make_quantized(model, schemes, numerics.dtype)
    mx.eval(arrays)
    return model.load_weights(arrays, strict=False)


def _request(task: str, latents: int) -> tuple[Request, list[PreparedVisual]]:
    side = 16 * round(latents**0.5)
    if task == "t2i":
        return Request(Task.T2I, PROMPT, side, side), []
    if task == "t2v":
        width, height, frames = VIDEOS[latents]
        return Request(Task.T2V, PROMPT, height, width, frames), []
    # The ViT looks at 28 pixels a token where the VAE has 16 a cell: 672 for 768.
    patches = 2 * max(1, round(latents**0.5 * 7 / 8 * 16 / 28))
    visual = PreparedVisual(vit_grid=(1, patches, patches), pixels=np.zeros((1, side, side, 3), np.float32))
    return Request(Task.IMAGE_EDIT, PROMPT, side, side, visuals=(Visual("x", VisualKind.IMAGE),)), [visual]


def _conditions(model: Lance, request: Request, sequence: Sequence) -> Conditions:
    dtype = model.numerics.dtype
    vit = [s for s in sequence.prefix if s.role is Role.VIT]
    clean = [s for s in sequence.prefix if s.is_latent]
    return Conditions(
        tuple(mx.random.normal((len(s) - 2, model.config.hidden_size)).astype(dtype) for s in vit),
        tuple(mx.random.normal((len(s) - 2, 48)).astype(dtype) for s in clean),
    )


def state_of(model: Lance, sequence: Sequence, pictures: int = 1) -> State:
    """A state of the sampler in the middle of its way, with random latents; of a batch with several pictures."""
    count = pictures * (len(sequence.target) - 2)
    x_t = mx.random.normal((count, 48)).astype(model.numerics.dtype)
    timestep = np.full(count, 0.5, np.float32)
    brackets = model.language_model.model.embed_tokens(mx.array(np.tile(sequence.target.ids[[0, -1]], pictures)))
    positions = mx.concatenate([model.latent_pos_embed(sequence.target.grid)] * pictures)
    embeds = model.embed_latents(x_t, timestep, positions)
    mx.eval(embeds, brackets)
    return State(1, 0.5, timestep, x_t, ExpertRows(brackets, embeds))


def _sampling(task: str, latents: int, hidden: int, layers: int, dtype: str, recipe: str = ""):
    model = _model(hidden, layers, dtype, recipe)
    request, visuals = _request(task, latents)
    sequence = build_sequence(request, LanceTokenizer(CHECKPOINT), visuals)
    arms = make_arms(model, request, sequence, _conditions(model, request, sequence))
    for arm in arms.values():
        mx.eval([[rows.und, *([] if rows.gen is None else [rows.gen])] for rows in arm.prefix])
    state = state_of(model, sequence)
    positions = model.latent_pos_embed(sequence.target.grid)

    def step() -> None:
        # The latents are embedded once for both arms, as the sampler does.
        latents = model.embed_latents(state.x_t, state.timestep, positions)
        rows = ExpertRows(state.inputs_embeds.und, latents)
        mx.eval(velocities(model, list(arms.values()), replace(state, inputs_embeds=rows)))

    def prefix() -> None:
        for arm in arms.values():
            arm._cache = ()
            for index in range(len(arm.prefix)):
                arm.prefill(index)

    return model, arms, step, prefix


def step(task: str, latents: int, hidden: int, layers: int, dtype: str, recipe: str = "") -> Work:
    """A guided denoising step behind a cached prefix."""
    model, arms, run, prefix = _sampling(task, latents, hidden, layers, dtype, recipe)
    prefix()
    plain = step(task, latents, hidden, layers, dtype).run if recipe else None
    return Work(run, step_operations(model.config, [arm.sequence for arm in arms.values()]), plain=plain)


def attention_alone(latents: int, dtype: str) -> Work:
    """Attention of the official heads over so many latents, which see each other."""
    queries, keys, values = (mx.array(each).astype(policy(dtype).dtype) for each in _heads(latents))
    return Work(lambda: mx.eval(attention(queries, keys, values, causal=False)), 4 * queries.size * latents)


def torch_attention(latents: int, dtype: str) -> Work:
    """The same by PyTorch."""
    import torch

    given = [torch.from_numpy(each).to(getattr(torch, dtype)) for each in _heads(latents)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return Work(lambda: attend(*given, enable_gqa=True), 4 * given[0].numel() * latents)


def _heads(latents: int) -> list[np.ndarray]:
    rng, config = np.random.default_rng(0), config_of(2048, 1)
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    return [rng.standard_normal((1, heads, latents, config.head_dim), np.float32) for heads in counts]


def batch(pictures: int, latents: int, hidden: int, layers: int, dtype: str) -> Work:
    """A guided step of several pictures of one prompt in one pass; its items are pictures."""
    model, arms, _, prefix = _sampling("t2i", latents, hidden, layers, dtype)
    prefix()
    arms = list(arms.values())
    state = state_of(model, arms[0].sequence, pictures)
    operations = pictures * step_operations(model.config, [arm.sequence for arm in arms])
    return Work(lambda: mx.eval(velocities(model, arms * pictures, state)), operations, pictures)


def prefix(task: str, latents: int, hidden: int, layers: int, dtype: str) -> Work:
    """Reading the prefix of both arms into their caches."""
    model, arms, _, run = _sampling(task, latents, hidden, layers, dtype)
    operations = sum(
        pass_operations(model.config, len(segment), start + len(segment))
        for arm in arms.values()
        for segment, start in zip(arm.sequence.prefix, arm.sequence.starts, strict=False)
    )
    return Work(run, operations)


def step_uncached(task: str, latents: int, hidden: int, layers: int, dtype: str) -> Work:
    """The same step where the prefix is computed anew, as ports without a prefix cache do."""
    _, _, run, prefix = _sampling(task, latents, hidden, layers, dtype)

    def both() -> None:
        prefix()
        run()

    return Work(both)


def step_both_experts(task: str, latents: int, hidden: int, layers: int, dtype: str) -> Work:
    """The same step where both experts compute every token and half of it is thrown away."""
    _, _, run, prefix = _sampling(task, latents, hidden, layers, dtype)
    prefix()

    def wasteful() -> None:
        with both_experts():
            run()

    return Work(wasteful)


@contextmanager
def both_experts() -> Iterator[None]:
    """Let both experts' norms, feed-forward networks and q/k/v projections compute all rows of a pass."""

    def apart(x: ExpertRows, und: mx.array, gen: mx.array) -> ExpertRows:
        return ExpertRows(und[: len(x.und)], gen[len(x.und) :])

    def by_expert(module: nn.Module, name: str, x: ExpertRows) -> ExpertRows:
        rows = mx.concatenate(x)
        return apart(x, module[name](rows), module[f"{name}_moe_gen"](rows))

    def heads(self: mot.SelfAttention, x: ExpertRows) -> list[ExpertRows]:
        rows, found = mx.concatenate(x), []
        for kind in "qkv":
            both = (self[f"{kind}_proj{suffix}"](rows) for suffix in ("", "_moe_gen"))
            found.append(apart(x, *(y.reshape(len(rows), -1, self.head_dim) for y in both)))
        return found

    with patch.object(mot, "_by_expert", by_expert), patch.object(mot.SelfAttention, "_heads", heads):
        yield


def text(tokens: int, hidden: int, layers: int, dtype: str, recipe: str = "") -> Work:
    """Decoding so many tokens of an answer, one by one, behind a prefix of 256."""
    model = _model(hidden, layers, dtype, recipe)
    mot.join_projections(model.language_model.model)
    ids = np.arange(256, dtype=np.int32) % 300
    sequence = Sequence((Segment(Role.TEMPLATE, AttentionMode.CAUSAL, ids),))
    positions = np.tile(np.arange(256 + tokens, dtype=np.int32), (3, 1))
    rows = ExpertRows(model.language_model.model.embed_tokens(mx.array(ids)), None)
    reader = AnswerDecoder("cond", model, sequence, positions, [rows], qk_float32=False)
    reader.read()
    cache, question = reader._cache, Question(Task.X2T_IMAGE, "", (Visual("x", VisualKind.IMAGE),))

    def run() -> None:
        reader._cache = cache
        # As Pipeline.answer does, which stops at a token that never comes here.
        for _ in answer_tokens(reader, question, 1, tokens, model.config.vocab_size, stop=-1):
            pass

    head = 2 * hidden * model.config.vocab_size
    operations = sum(pass_operations(model.config, 1, 257 + index) + head for index in range(tokens))
    plain = text(tokens, hidden, layers, dtype).run if recipe else None
    return Work(run, operations, tokens, plain=plain)


def mlx_lm_text(tokens: int, hidden: int, layers: int, dtype: str, bits: int) -> Work:
    """The same of mlx-lm's Qwen2, whose layers are one of the two towers, quantized by MLX."""
    from mlx_lm.models import qwen2
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    config = config_of(hidden, layers)
    names = "hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads rms_norm_eps"
    sizes = {name: getattr(config, name) for name in f"{names} vocab_size".split()}
    model = randomized(qwen2.Model(qwen2.ModelArgs("qwen2", **sizes, tie_word_embeddings=False)), policy(dtype).dtype)
    # As the recipes do: neither embeddings nor head, nor what does not part into groups.
    fits = {path for path, each in model.named_modules() if "layers." in path and "weight" in each
            and each.weight.ndim == 2 and each.weight.shape[1] % 64 == 0}  # fmt: skip
    nn.quantize(model, 64, bits, class_predicate=lambda path, each: path in fits)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.arange(256)[None] % 300, cache), model.parameters())

    def run() -> None:
        token = mx.array([[1]])
        for _ in range(tokens):
            token = model(token, cache).argmax(-1)
            mx.eval(token)
        trim_prompt_cache(cache, tokens)

    return Work(run, items=tokens)


def conversion(hidden: int, layers: int, dtype: str) -> Work:
    """Converting a float32 checkpoint of the official layout; its items are megabytes that are read."""
    from bench_convert import Converting

    heads, kv_heads, intermediate = WIDTHS[hidden]
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv-heads": kv_heads, "intermediate": intermediate}
    converting = Converting(sizes, dtype)
    return Work(converting.run, items=converting.megabytes, whole=True, remove=converting.remove)


def torch_step(task: str, latents: int, hidden: int, layers: int, dtype: str) -> Work:
    """The guided step of the PyTorch reference, behind cached prefixes too."""
    import torch
    from bench_torch import drawing

    names = "hidden_size intermediate_size num_attention_heads num_key_value_heads num_hidden_layers mrope_section"
    config = config_of(hidden, layers)
    sizes = {name: getattr(config, name) for name in names.split()}
    # A GPU where both have one.
    device = "cuda" if not runs_on_cpu() and torch.cuda.is_available() else "cpu"
    return Work(drawing(sizes, PROMPT, latents, dtype, guidance=4.0, device=device).step)


CASES: dict[str, Callable[..., Work]] = {
    "step": step,
    "attention": attention_alone,
    "attention, PyTorch": torch_attention,
    "step, quantized": step,
    "batch": batch,
    "step, no prefix cache": step_uncached,
    "step, both experts": step_both_experts,
    "step, PyTorch": torch_step,
    "prefix": prefix,
    "text": text,
    "text, quantized": text,
    "text, quantized by mlx-lm": mlx_lm_text,
    "ViT, 4 blocks": vit,
    "VAE decode": vae_decode,
    "VAE encode": vae_encode,
    "conversion": conversion,
}
