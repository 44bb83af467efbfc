"""A port of Lance's text to image and video as somebody might write it, in NumPy: to keep the seam for ports honest.

It has a batch axis, computes both experts for every token and the whole sequence anew in each step, has no token
behind the target, no VAE, and its own names. `Wrong` departs from upstream in five ways.
"""

import json
import math

import numpy as np
from safetensors.numpy import load_file


class Right:
    name = "made up"
    origin, renorm_axis, sees_bracket, swapped = "text", None, True, False

    def __init__(self, bundle):
        self.bundle = bundle
        folder = bundle.checkpoint / bundle.variant
        self.w = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "llm_config.json").read_text())
        lengths = bundle.inputs["split_lens"].array
        self.ids = bundle.inputs["text_ids"].array[: -lengths[-1]]
        self.text, self.starts = bundle.inputs["modality"].array[: len(self.ids)] == 0, np.cumsum([0, *lengths[:-1]])
        t, h, w = bundle.inputs["vae_video_grid_thw"].array[0].tolist()
        self.grid = (t, h // 2, w // 2)

    def weights(self):
        for name, value in self.w.items():
            if not name.startswith(("language_model.lm_head", "latent_pos_embed", "vit_model")):
                yield name, value.astype(np.float32)

    def load_weights(self, given):
        self.w = self.w | given

    def run(self, probe):
        asked, noise = self.bundle.request, self.bundle.taps["sampler.noise"].array
        u = np.linspace(1, 0, asked["num_steps"] + 1, dtype=np.float32)
        s = np.float32(asked["timestep_shift"])
        # PyTorch's own grid differs in the last bit.
        times = s * u / (1 + (s - 1) * u)
        times = probe.integers("timesteps", times) if probe.given else times
        probe.value("sampler.noise", noise)
        x = probe.value("sampler.x_t0", probe.value("sampler.x_init", noise))
        for step in range(asked["num_steps"]):
            cond, uncond = (self.velocity(probe, arm, step, x, times[step]) for arm in ("cond", "uncond"))
            guided = uncond + asked["cfg_text_scale"] * (cond - uncond)
            long, longer = (np.sqrt((v * v).sum(self.renorm_axis, keepdims=True)) for v in (cond, guided))
            guided = probe.value(f"sampler.velocity{step}", guided * np.clip(long / (longer + 1e-8), 0, 1))
            x = x - guided * (times[step] - times[step + 1])
            if step + 1 < asked["num_steps"]:
                x = probe.value(f"sampler.x_t{step + 1}", x)
        probe.value("latent", x.reshape(*self.grid, 48))

    def positions(self, ids, cells):
        first = int(np.argmax(cells))
        grid = np.indices(self.grid).reshape(3, -1) * [[2], [1], [1]] + (first if self.origin == "text" else 0)
        after = np.full((3, 1), grid.max() + 1)
        return np.concatenate([np.tile(np.arange(first), (3, 1)), grid, after], 1).astype(np.int32)

    def velocity(self, probe, arm, step, x, t):
        kept = np.ones(len(self.ids), bool) if arm == "cond" else ~self.text
        ids = self.ids[kept]
        shared = np.append(np.ones(len(ids), bool), False)
        probe.integers("text_ids" if arm == "cond" else "text_ids.uncond", ids)
        split = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))[kept]
        parts = [np.flatnonzero(split == number) for number in np.unique(split)]
        self.probe, block = probe, parts[-1]
        gen = np.zeros(len(ids), bool)
        gen[block[1:-1]] = True
        whole = {f"{arm}.prefix{i}": part for i, part in enumerate(parts[:-1])} | {f"{arm}.step{step}": block}
        latents = {f"{arm}.step{step}": np.arange(gen.sum())}
        own = self.positions(ids, gen)
        if arm == "uncond" and self.bundle.entry == "kv_cache":
            cells = np.isin(np.arange(len(self.ids)), np.flatnonzero(kept)[gen])
            own[:, : block[0]] = self.positions(self.ids, cells)[:, kept][:, : block[0]]
        places = probe.integers(f"position_ids.{arm}", own, shared)
        probe.call(latents)
        time = self.linear("time_embedder.mlp.2", silu(self.linear("time_embedder.mlp.0", self.waves(t))))
        row = np.indices(self.grid).reshape(3, -1).T @ [4096, 64, 1]
        table = probe.rows("latent_pos_embed", self.table(row))
        cells = probe.rows("vae2llm", self.linear("vae2llm", x)) + time + table
        probe.call(whole)
        h = self.w["language_model.model.embed_tokens.weight"][ids].astype(np.float32)
        h[gen] = cells
        probe.rows("position_ids", places, axis=1)
        h = probe.rows("hidden_in", h)[None]
        mask = np.tri(len(ids), dtype=bool)
        mask[np.ix_(block, block)] = True
        if not self.sees_bracket:
            mask[np.ix_(block[1:-1], block[-1:])] = False
        for layer in range(self.config["num_hidden_layers"]):
            h = self.layer(f"language_model.model.layers.{layer}", h, gen, mask, places)
        out = probe.rows("hidden_out", self.experts("language_model.model.norm", self.norm, h, gen)[0])
        probe.call({f"{arm}.step{step}": np.concatenate([[-1], np.arange(gen.sum()), [-1]])})
        return probe.rows("llm2vae", self.linear("llm2vae", out[gen]))

    def layer(self, path, h, gen, mask, places):
        c, rows = self.config, self.probe.rows
        heads, d = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"]
        x = self.experts(f"{path}.input_layernorm", self.norm, h, gen)
        at = f"{path}.self_attn"
        q, k, v = (self.experts(f"{at}.{n}_proj", self.linear, x, gen)[0].reshape(len(gen), -1, d) for n in "qkv")
        q, k = (self.experts(f"{at}.{n}_norm", self.norm, y[None], gen)[0] for n, y in (("q", q), ("k", k)))
        q, k = (rows(f"{at}.{n}_rope", self.turned(y, places)) for n, y in (("q", q), ("k", k)))
        k, v = (np.repeat(each, heads // each.shape[1], 1) for each in (k, v))
        scores = np.where(mask, np.einsum("qhd,khd->hqk", q, k) / math.sqrt(d), -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        seen = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        seen = rows(f"{at}.sdpa", seen.astype(np.float32)).reshape(1, len(gen), -1)
        h = h + rows(at, self.experts(f"{at}.o_proj", self.linear, seen, gen)[0])[None]
        x, mlp = self.experts(f"{path}.post_attention_layernorm", self.norm, h, gen), np.zeros_like(h)
        for suffix, of in (("", ~gen), ("_moe_gen", gen)):
            at = f"{path}.mlp{suffix}"
            gate, up = (rows(f"{at}.{n}_proj", self.linear(f"{at}.{n}_proj", x)[0], of) for n in ("gate", "up"))
            gate, up = (up, gate) if self.swapped else (gate, up)
            out = rows(f"{at}.down_proj", self.linear(f"{at}.down_proj", silu(gate) * up), of)
            mlp[0, of] = rows(at, out, of)[of]
        return rows(path, (h + mlp)[0])[None]

    def experts(self, path, function, x, gen):
        """Both experts compute everything; each tap holds the rows of one."""
        names = (path, f"{path}_moe_gen")
        und, made = (self.probe.rows(n, function(n, x)[0], of)[None] for n, of in zip(names, (~gen, gen), strict=True))
        return np.where(gen.reshape(1, -1, *[1] * (und.ndim - 2)), made, und)

    def linear(self, path, x):
        y = x @ self.w[f"{path}.weight"].astype(np.float32).T
        return y + self.w[f"{path}.bias"] if f"{path}.bias" in self.w else y

    def norm(self, path, x):
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config["rms_norm_eps"]))
        return (x * scale * self.w[f"{path}.weight"]).astype(np.float32)

    def turned(self, x, places):
        half = x.shape[-1] // 2
        sections = np.repeat(range(3), self.config["rope_scaling"]["mrope_section"])
        frequencies = 1 / self.config["rope_theta"] ** (np.arange(half, dtype=np.float32) / half)
        angles = (places[sections].T * frequencies.astype(np.float32))[:, None]
        a, b = x[..., :half], x[..., half:]
        turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
        return np.concatenate(turned, -1).astype(np.float32)

    def waves(self, t):
        angles = t * np.exp(-math.log(10000) * np.arange(128, dtype=np.float32) / 128)
        return np.concatenate([np.cos(angles), np.sin(angles)])[None].astype(np.float32)

    def table(self, cells):
        hidden = self.config["hidden_size"]
        width, parts = hidden // 3 // 2 * 2, []
        sizes = (width, width, hidden - 2 * width)
        for places, size in zip((cells // 4096, cells // 64 % 64, cells % 64), sizes, strict=True):
            angles = places[:, None] / 10000 ** (np.arange(size // 2) / (size / 2))
            parts += [np.sin(angles), np.cos(angles)]
        return np.concatenate(parts, 1).astype(np.float32)


class Wrong(Right):
    name = "made up, wrongly"
    origin, renorm_axis, sees_bracket, swapped = "zero", -1, False, True


def silu(x):
    return x / (1 + np.exp(-x))
