"""The training forward: several samples in one sequence, flow matching of latents, cross entropy of answers, and one
step of the optimizer (bytedance/Lance data/dataset_base_train.py, modeling/lance/lance.py:forward,
train/train_utils.py)."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.arms import Inputs
from reference.errors import ReferenceError
from reference.layout import Layout, Mode, Role, VisualSize
from reference.mot import KVCache, visible
from reference.prompt import PROMPTS, Tokenizer, template
from reference.request import Request
from reference.sequence import Piece, latent_grid, lay_out, sequence_pieces, visual_piece
from reference.transformer import Lance


@dataclass(frozen=True)
class Sample:
    """One sample: its layout, the vision tower's tokens [n, hidden], and clean latents float32 [t, h, w, 48] of each
    of its latent splits."""

    layout: Layout
    vit: Tensor | None = None
    latents: list[Tensor] = field(default_factory=list)

    @property
    def learned(self) -> np.ndarray:
        """Which of its latents are noised and learned, bool [latents]."""
        if not self.latents:
            return np.zeros(0, bool)
        return np.isin(self.layout.latent_rows, self.layout.made_rows)


@dataclass(frozen=True)
class Recipe:
    """How the loss is put together: upstream's scripts by default."""

    timestep_shift: float = 4.0
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    ce_loss_reweighting: bool = False


@dataclass(frozen=True)
class Computed:
    """A pack's forward: squared errors [latents that are learned, 48], cross entropies [labels], and losses, 0-dim;
    x_t, timesteps of all latents; L rows of embeddings and final hidden states."""

    loss: Tensor
    loss_mse: Tensor
    loss_ce: Tensor
    mse: Tensor
    ce: Tensor
    timesteps: Tensor
    x_t: Tensor
    hidden_in: Tensor
    last_hidden_state: Tensor


def training_layout(
    request: Request,
    tokenizer: Tokenizer,
    visuals: list[VisualSize],
    target: tuple[int, int, int] | None,
    tokens_per_second: int,
    dropped: Collection[Role] = (),
    as_upstream: bool = False,
) -> Layout:
    """A sample's layout: that of inference, with a target of its own size (frames, height, width in pixels), and
    without the splits of dropped roles.

    `as_upstream` has images under the instruction for videos, questions with anchored positions and labels behind the
    first line that ends in "assistant", as upstream's shipped settings train them.
    """
    pieces, answered = sequence_pieces(request, tokenizer, visuals)
    if as_upstream and request.task == "t2i":
        videos = json.loads(PROMPTS.read_text(encoding="utf-8"))["instructions"]["t2v"]
        before, _, _ = template(request, videos.replace("video", "image"))
        pieces[0] = Piece(tokenizer.encode(before), Role.TEMPLATE)
    pieces = [piece for piece in pieces if piece.role not in dropped]
    if request.understanding:
        if as_upstream:
            tokens = [token for piece in pieces for token in piece.tokens]
            line = tokenizer.encode("assistant\n")
            first = next(i for i in range(len(tokens)) if tokens[i : i + len(line)] == line)
            answered = len(tokens) - first - len(line)
        return lay_out(pieces, answered, 0, tokens_per_second, anchors=as_upstream)
    made = visual_piece(tokenizer, Role.NOISE, Mode.NOISE, latent_grid(target), target)
    pieces = [made if piece.mode is Mode.NOISE else piece for piece in pieces]
    return lay_out(pieces, None, 1 if request.task == "i2v" else 0, tokens_per_second)


def forward(
    model: Lance,
    samples: Sequence[Sample],
    times: Sequence[float],
    noise: Tensor | None,
    vocabulary: int,
    recipe: Recipe = Recipe(),
) -> Computed:
    """Run a pack, the samples behind each other in one sequence, each seeing itself alone.

    times: one standard normal number a sample, before the sigmoid; noise [latents, 48] of all latents of the pack, also
    the clean ones; vocabulary: ids that may be answered. Parameters with `requires_grad` can be differentiated by.
    Raises ReferenceError for noise that does not fit.
    """
    dtype, device = model.numerics.torch_dtype, next(model.parameters()).device
    clean = [latent.reshape(-1, latent.shape[-1]) for sample in samples for latent in sample.latents]
    timesteps = x_t = velocity = torch.zeros(0, dtype=dtype, device=device)
    if clean:
        x = torch.cat(clean).to(dtype)
        if noise is None or noise.shape != x.shape:
            raise ReferenceError(f"the noise must have the shape of the pack's latents, {tuple(x.shape)}")
        noise = noise.to(dtype)
        timesteps = flow_times(samples, times, recipe.timestep_shift, dtype).to(device)
        x_t = (1 - timesteps[:, None]) * x + timesteps[:, None] * noise
        velocity = noise - x
    hidden_in, position_ids, gen = embed(model, samples, x_t, timesteps.float())
    last = model.language_model(
        inputs_embeds=hidden_in,
        position_ids=position_ids,
        gen=gen,
        mask=pack_mask([sample.layout for sample in samples]).to(device),
        cache=KVCache(),
        keep=False,
        raise_qk=False,
    )
    mse = squared_errors(model, samples, last, velocity)
    ce, weights = cross_entropies(model, samples, last, vocabulary, recipe)
    loss_mse = mse.mean(-1).sum() / max(len(mse), 1)
    loss_ce = (ce * weights).sum() / weights.sum() if len(ce) else ce.sum()
    loss = recipe.mse_weight * loss_mse + recipe.ce_weight * loss_ce
    return Computed(loss, loss_mse, loss_ce, mse, ce, timesteps, x_t, hidden_in, last)


def flow_times(samples: Sequence[Sample], times: Sequence[float], shift: float, dtype: torch.dtype) -> Tensor:
    """t of every latent of a pack: 0 for those that are given, else the sigmoid of its sample's number, moved towards
    noise; every operation rounds to `dtype`, the number itself before the first."""
    raw = [np.where(sample.learned, time, -np.inf) for sample, time in zip(samples, times, strict=True)]
    t = torch.sigmoid(torch.from_numpy(np.concatenate(raw).astype(np.float32)).to(dtype))
    return shift * t / (1 + (shift - 1) * t)


def embed(model: Lance, samples: Sequence[Sample], x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [L, hidden] of a pack, position ids [3, L], and which rows are the generation expert's."""
    device, start, parts = next(model.parameters()).device, 0, []
    for sample in samples:
        inputs = Inputs(model, sample.layout, sample.vit, device)
        own = slice(start, start + len(sample.learned))
        rows = torch.arange(len(sample.layout.text_ids), device=device)
        parts.append((*inputs.embed(rows, x_t[own], timesteps[own]), inputs.position_ids))
        start = own.stop
    embeds, gen, ids = zip(*parts, strict=True)
    return torch.cat(embeds), torch.cat(ids, 1), torch.cat(gen)


def pack_mask(layouts: Sequence[Layout]) -> Tensor:
    """Mask bool [L, L] of a pack: within each sample that of its splits, nothing between samples."""
    own = [visible([split.length for split in x.splits], [split.mode for split in x.splits]) for x in layouts]
    return torch.block_diag(*own).bool()


def squared_errors(model: Lance, samples: Sequence[Sample], last: Tensor, velocity: Tensor) -> Tensor:
    """Squared error of the predicted velocity of every latent that is learned, float32 [n, 48]."""
    rows, learned, start = [], [], 0
    for sample in samples:
        if sample.latents:
            rows.append(sample.layout.made_rows + start)
        learned.append(sample.learned)
        start += len(sample.layout.text_ids)
    if not rows:
        return last.new_zeros(0, 1, dtype=torch.float32)
    found = model.llm2vae(last[torch.from_numpy(np.concatenate(rows)).long().to(last.device)])
    return widened_error(found - velocity[torch.from_numpy(np.concatenate(learned)).to(last.device)]) ** 2


def widened_error(error: Tensor) -> Tensor:
    """Errors are squared and averaged in float32, whatever the policy; in float64 under that."""
    return error if error.dtype is torch.float64 else error.float()


def cross_entropies(
    model: Lance, samples: Sequence[Sample], last: Tensor, vocabulary: int, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Cross entropy of every label of a pack, float32 [labels], 0 for one beyond the vocabulary; and its weight."""
    rows, labels, weights, start = [], [], [], 0
    for sample in samples:
        ids, first = sample.layout.text_ids, sample.layout.answer
        if first is not None:
            labels.append(ids[first:])
            rows.append(np.arange(first - 1, len(ids) - 1) + start)
            length = len(ids) - first
            weights.append(np.full(length, length**-0.5 if recipe.ce_loss_reweighting else 1.0, np.float32))
        start += len(ids)
    if not rows:
        return (last.new_zeros(0, dtype=torch.float32),) * 2
    given = (torch.from_numpy(np.concatenate(parts)).to(last.device) for parts in (rows, labels, weights))
    places, targets, weights = given
    logits = model.language_model.lm_head(last[places.long()])[:, :vocabulary]
    targets = torch.where(targets < vocabulary, targets.long(), -100)
    return F.cross_entropy(widened_error(logits), targets, reduction="none", ignore_index=-100), weights


def train_parameters(model: Lance, embeddings: bool = False, understanding: bool = True, drawing: bool = True) -> None:
    """Choose what is learned: token embeddings and lm_head only where asked (train_utils.py:freeze_model_components);
    without `understanding` the language model's generation expert alone; without `drawing` nothing that only latents
    pass outside of it."""
    for name, parameter in model.named_parameters():
        chosen = name.startswith("language_model.") or drawing
        if name.startswith(("language_model.model.embed_tokens", "language_model.lm_head")):
            chosen = embeddings
        elif name.startswith("language_model.") and "_moe_gen" not in name:
            chosen = understanding
        parameter.requires_grad_(chosen)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a linear warmup from 0 and a bound on the gradient's norm: upstream's scripts by default; ema is the
    share of the averaged parameters that a step keeps, None for no average."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    warmup_steps: int = 500
    max_grad_norm: float = 1.0
    ema: float | None = None


class Optimizer:
    """Steps float32 masters of the parameters that are learned, and rounds them into the model after each.

    `unrounded` are the parameters before they were rounded to the model's dtype, by name; the model's own by default.
    masters: by name; average: their moving average, empty without one.
    """

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, unrounded: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.settings = model, settings
        learned = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if unrounded is not None:
            learned = {name: unrounded[name] for name in learned}
        self.masters = {name: each.detach().float().clone().requires_grad_() for name, each in learned.items()}
        self.average = {} if settings.ema is None else {n: each.detach().clone() for n, each in self.masters.items()}
        self.adamw = torch.optim.AdamW(
            self.masters.values(), settings.lr, settings.betas, settings.eps, settings.weight_decay
        )
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
        )

    def step(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Make a step; returns the norm of all gradients before they are clipped, 0-dim float32."""
        for name, master in self.masters.items():
            master.grad = gradients[name].float().clone()
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.settings.max_grad_norm)
        self.adamw.step()
        self.warmup.step()
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, master in self.masters.items():
                parameters[name].copy_(master)
                if self.average:
                    self.average[name].mul_(self.settings.ema).add_(master, alpha=1 - self.settings.ema)
        return norm


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter of all that is learned, in its dtype; zeros where the loss does not depend on it."""
    learned = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(loss, list(learned.values()), retain_graph=True, allow_unused=True)
    pairs = zip(learned.items(), found, strict=True)
    return {name: torch.zeros_like(each) if gradient is None else gradient for (name, each), gradient in pairs}
