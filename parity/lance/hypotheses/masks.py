"""Who sees whom: hypotheses about the attention mask of the language model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from parity.hypotheses.base import Hypothesis
from parity.lance.hypotheses.tokens import LATENTS, Tokens, pass_tokens
from parity.lance.hypotheses.tools import forward
from reference.layout import Mode, Role

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

SDPA = ("layers.*.self_attn.sdpa",)
Seen = Callable[[Tokens, np.ndarray], np.ndarray]
"""Mask bool [m, m] of a whole sequence, True where a query sees a key, from upstream's own."""


def seen(name: str, change: Seen) -> Hypothesis:
    """A hypothesis that the mask is another one."""

    def attended(site: "TapProbe", module: object, original: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor):
        n, m = len(q), len(k)
        tokens = pass_tokens(site)
        if (tokens.queries, len(tokens.split)) != (n, m):
            return original(q, k, v, mask)  # a pass before the site's
        whole = np.zeros((m, m), bool)
        whole[m - n :] = True if mask is None else mask.numpy()
        # A query that sees nothing has no attention: it keeps itself.
        changed = change(tokens, whole)[m - n :]
        changed[~changed.any(1), -1] = True
        return original(q, k, v, torch.from_numpy(changed))

    return Hypothesis(name, SDPA, forward(attended))


def past(tokens: Tokens, ahead: int = 0) -> np.ndarray:
    """Whether a key comes before a query, or is the query itself, or up to `ahead` tokens after it."""
    m = len(tokens.split)
    return np.tri(m, m, ahead, dtype=bool)


def own(tokens: Tokens) -> np.ndarray:
    """Whether a key is in the query's own split."""
    return tokens.split[:, None] == tokens.split[None]


def both(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    return query[:, None] & key[None]


def ends(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token is an opening bracket of a block, and whether it is a closing one."""
    block = tokens.mode != Mode.CAUSAL
    change = np.flatnonzero(np.diff(tokens.split, prepend=-1))
    first, last = np.zeros(len(block), bool), np.zeros(len(block), bool)
    first[change] = True
    last[np.append(change[1:], len(block)) - 1] = True
    return first & block, last & block


def brackets_apart(opening: bool, closing: bool) -> Seen:
    """Latents do not see the closing bracket, the opening bracket sees nothing of the block."""

    def change(tokens: Tokens, mask: np.ndarray) -> np.ndarray:
        first, last = ends(tokens)
        latents = tokens.gen
        changed = mask.copy()
        if closing:
            changed &= ~(own(tokens) & both(latents, last))
        if opening:
            changed &= ~(own(tokens) & both(first, latents | last) & np.isin(tokens.mode, LATENTS)[:, None])
        return changed

    return change


def hidden(query: Callable[[Tokens], np.ndarray], key: Callable[[Tokens], np.ndarray]) -> Seen:
    """Some queries do not see some keys outside their own split."""
    return lambda tokens, mask: mask & ~(both(query(tokens), key(tokens)) & ~own(tokens))


def of(*roles: Role) -> Callable[[Tokens], np.ndarray]:
    return lambda tokens: np.isin(tokens.role, roles)


def anyone(tokens: Tokens) -> np.ndarray:
    return np.ones(len(tokens.split), bool)


def latents(tokens: Tokens) -> np.ndarray:
    return tokens.gen


def first_token(tokens: Tokens) -> np.ndarray:
    return np.arange(len(tokens.split)) == 0


def text_both_ways(tokens: Tokens, mask: np.ndarray) -> np.ndarray:
    return mask | (own(tokens) & (tokens.mode == Mode.CAUSAL)[:, None])


def at_first_key(tokens: Tokens, mask: np.ndarray) -> np.ndarray:
    """Token number i of a call sees the keys up to number i of all."""
    text = tokens.mode == Mode.CAUSAL
    early = np.arange(len(mask))[None] <= tokens.index[:, None]
    return np.where(text[:, None], early, mask)


def one_ahead(tokens: Tokens, mask: np.ndarray) -> np.ndarray:
    return mask | (own(tokens) & past(tokens, 1) & (tokens.mode == Mode.CAUSAL)[:, None])


def never_itself(tokens: Tokens, mask: np.ndarray) -> np.ndarray:
    return mask & (past(tokens, -1) | ~(tokens.mode == Mode.CAUSAL)[:, None])


HYPOTHESES = [
    seen("text attends in both directions", text_both_ways),
    seen("latents and brackets do not see each other as they should", brackets_apart(True, True)),
    seen("latents do not see their closing bracket", brackets_apart(False, True)),
    seen("the opening bracket does not see its block", brackets_apart(True, False)),
    seen("the causal mask lets tokens see the next one", one_ahead),
    seen("the causal mask hides tokens from themselves", never_itself),
    seen("the causal mask is aligned to the first key", at_first_key),
    seen("latents do not see the text", hidden(latents, of(Role.TEXT))),
    seen("latents do not see the template", hidden(latents, of(Role.TEMPLATE))),
    seen("latents do not see the ViT's tokens", hidden(latents, of(Role.VIT))),
    seen("nothing sees the ViT's tokens", hidden(anyone, of(Role.VIT))),
    seen("latents do not see the clean latents", hidden(latents, of(Role.SOURCE, Role.SUBJECT))),
    seen("text does not see visual blocks", hidden(
        of(Role.TEXT, Role.TEMPLATE), of(Role.VIT, Role.SOURCE, Role.SUBJECT))),
    seen("the sequence's first token is hidden", hidden(anyone, first_token)),
]  # fmt: skip
