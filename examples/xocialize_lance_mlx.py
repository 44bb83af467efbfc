"""The public MLX port of Lance under the harness: an adapter for a clone of xocialize/lance-mlx.

LANCE_PEER names the clone, LANCE_PEER_BITS to how many bits its own script quantizes it; --python its interpreter, with
PyTorch for its converter. Nothing of it is changed: modules, functions and variables are attached to from outside while
a run lasts. Written against d39a981.
"""

import importlib
import inspect
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np

CLONE, BITS = Path(os.environ.get("LANCE_PEER", "")), os.environ.get("LANCE_PEER_BITS", "")
if not (CLONE / "src/lance_mlx").is_dir():
    raise SystemExit("LANCE_PEER names no clone of xocialize/lance-mlx")
sys.path.insert(0, str(CLONE / "src"))  # its package is called lance_mlx too

from mlx_video.models.wan_2 import vae22  # noqa: E402
from mlx_vlm.models.qwen2_5_vl import vision  # noqa: E402
from transformers import AutoProcessor, Qwen2TokenizerFast  # noqa: E402

from lance_mlx.model import LanceModel, lance_llm  # noqa: E402

TEXT, VIT, CLEAN, NOISE = 0, 4, 2, 3
"""A text split's role, a ViT split's, and the attention of a source's latents and of the target's, as in bundles."""
PIPELINES = {"t2i": "TextToImagePipeline", "t2v": "TextToVideoPipeline", "image_edit": "ImageEditPipeline",
             "x2t_image": "UnderstandingPipeline", "x2t_video": "UnderstandingPipeline"}  # fmt: skip
OPTIONS = {"cfg_text_scale": "cfg_scale"} | {name: name for name in (
    "num_steps", "timestep_shift", "cfg_renorm_min", "height", "width", "num_frames", "max_new_tokens")}  # fmt: skip
TABLE, SIDE, FRAMES = "latent_pos_embed.pos_embed", 64, 31
LAYERS = "language_model.model."
RENAMED = {"vae_in_proj.vae2llm": "vae2llm", "time_embedder.proj_in": "time_embedder.mlp.0", "llm2vae": "llm2vae",
           "time_embedder.proj_out": "time_embedder.mlp.2", "time_embedder": "time_embedder",
           "latent_pos_embed": "latent_pos_embed", "lm_head": "language_model.lm_head"}  # fmt: skip
# Of all else both experts compute every token, and each tap holds those of one.
OF_BOTH = re.compile(rf"{re.escape(LAYERS)}layers\.\d+(\.self_attn)?")


def whole_table(table: mx.array) -> mx.array:
    """The fixed table of places for all frames, as checkpoints made for tests hold one: t is told as h is."""
    part = table.shape[1] // 3 // 2 * 2
    cells = mx.tile(table[: SIDE * SIDE].reshape(SIDE, SIDE, -1), (FRAMES, 1, 1, 1))
    cells[..., :part] = cells[0, :FRAMES, :1, None, part : 2 * part]
    return cells.reshape(-1, table.shape[1])


class Port:
    """xocialize/lance-mlx, loaded for a bundle by its own converters and loaders; itself their processor."""

    name = "xocialize/lance-mlx"

    def __init__(self, bundle: Any) -> None:
        self.bundle, self.task, self.answers = bundle, bundle.task, bundle.task.startswith("x2t")
        if self.task not in PIPELINES:
            raise ValueError(f"{'the adapter' if self.task == 'video_edit' else self.name} has no {self.task}")
        self.module = importlib.import_module(f"lance_mlx.pipeline.{'understanding' if self.answers else self.task}")
        source, dtype = bundle.checkpoint / bundle.variant, {"float32": "fp32", "bfloat16": "bf16"}[bundle.dtype]
        self.tokenizer = Qwen2TokenizerFast.from_pretrained(source)
        with tempfile.TemporaryDirectory() as name:
            folder, halves, scripts = Path(name), {}, CLONE / "scripts"
            runpy.run_path(str(scripts / "02_convert.py"))["convert"](source, folder, dtype, "lance_3b_video")
            self.saved = mx.load(f"{folder}/model.safetensors")
            self.saved[TABLE] = whole_table(self.saved[TABLE])
            mx.eval(self.saved)
            mx.save_safetensors(f"{folder}/model.safetensors", self.saved)
            if BITS:
                with patch.object(sys, "argv", f"_ --lance-weights {name} --out-dir {name} --bits {BITS}".split()):
                    runpy.run_path(str(scripts / "16_quantize.py"))["main"]()
            part = folder / ("vit.safetensors" if self.answers else "vae.safetensors")
            if not self.answers:
                convert = runpy.run_path(str(scripts / "06_convert_wan_vae.py"))["convert"]
                convert(bundle.checkpoint / "Wan2.2_VAE.pth", folder, dtype)
                width = {name: len(value) for name, value in mx.load(str(part)).items()}
                # Its loaders ask for one width, which checkpoints made for tests have not.
                encoder, decoder = width["encoder.conv1.weight"], width["decoder.conv1.weight"] // 4
                halves["Wan22VAEEncoder"] = lambda z_dim, dim: vae22.Wan22VAEEncoder(z_dim, encoder)
                halves["Wan22VAEDecoder"] = lambda z_dim, dim, dec_dim: vae22.Wan22VAEDecoder(z_dim, dim, decoder)
            elif not part.exists():
                part = bundle.checkpoint / "Qwen2.5-VL-ViT/vit.safetensors"
            with patch.dict(vars(self.module), halves), patch.object(AutoProcessor, "from_pretrained", lambda _: self):
                self.pipeline = getattr(self.module, PIPELINES[self.task]).from_pretrained(folder, part)
        self.model = self.pipeline.lance_model
        self.pads = self.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        # Under the checkpoint's names what it loaded of the transformer; what draws never reads the head.
        self.names = {f"{RENAMED.get(path, LAYERS + path)}.{kind}": name for name in self.saved
                      for path, _, kind in [name.rpartition(".")] if path != "lm_head" or self.answers}  # fmt: skip

    def __call__(self, text: str, return_tensors: str, images: Any = None, videos: Any = None) -> dict[str, mx.array]:
        """Give the bundle's patches for any image or video."""
        grid, patches = (mx.array(self.bundle.inputs[name].array) for name in ("vit_video_grid_thw", "vit_patches0"))
        text = re.sub(r"<\|(image|video)_pad\|>", lambda pad: pad[0] * (grid[0].prod().item() // 4), text)
        ids = mx.array([self.tokenizer(text, add_special_tokens=False)["input_ids"]])
        kind, of = ("image", "") if videos is None else ("video", "_videos")
        return {"input_ids": ids, f"pixel_values{of}": patches, f"{kind}_grid_thw": grid}

    def run(self, probe: Any) -> None:
        """Run the request as the port's command does, from the bundle's noise and visuals."""
        asked, known = self.bundle.request, inspect.signature(self.pipeline.generate).parameters
        options = {ours: asked[theirs] for theirs, ours in OPTIONS.items() if theirs in asked and ours in known}
        given = [asked["spec"]]
        if self.answers:
            options["instruction"], question, _ = asked["spec"]["interleave_array"][1]
            given = [16 * [np.zeros((1, 1, 3), np.uint8)], question]  # any frames: the patches are the bundle's
        elif self.task == "image_edit":
            given = [None, next(text for text in asked["spec"]["interleave_array"] if not text.startswith("media/"))]
            # Upstream's output is as large as its source; here one says so.
            options["height"], options["width"] = self.bundle.inputs["vae_pixels0"].array.shape[2:]
        with probe.attached() as code:
            (Answering if self.answers else Drawing)(self, probe, code)
            getattr(self.pipeline, "generate_video" if self.task == "x2t_video" else "generate")(*given, **options)

    def paths(self) -> Iterator[tuple[str, nn.Module]]:
        """Its modules by their paths in the checkpoint, and its encoders and decoders by what they return."""
        for path, module in self.model.named_modules():
            if path in RENAMED or path.startswith(("layers.", "norm", "embed_tokens")):
                yield RENAMED.get(path, LAYERS + path), module
        for name, tap, start in (("vae_encoder", "vae.encode0.mean", "vae."), ("vae_decoder", "pixels", "vae."),
                                 ("vision_model", "vit_model0", "vit_model0.")):  # fmt: skip
            for path, module in getattr(self.pipeline, name, nn.Module()).named_modules():
                yield f"{start}{path}".replace("layer_", "") if path else tap, module

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from ((name, np.array(self.saved[own].astype(mx.float32))) for name, own in self.names.items())

    def load_weights(self, given: dict[str, np.ndarray]) -> None:
        """Take values of the transformer in the dtypes that it has them in."""
        own = {self.names[name]: mx.array(value) for name, value in given.items()}
        self.model.load_weights([(name, own[name].astype(self.saved[name].dtype)) for name in own], strict=False)

    def preprocessed(self, media: Path) -> dict[str, np.ndarray]:
        """The picture that an edit starts from, in the size asked for."""
        asked, load = self.bundle.request, getattr(self.pipeline, "_load_image_tensor", None)
        names = asked["spec"]["interleave_array"] if load else ()
        seen = [np.array(load(media / name, asked["height"], asked["width"])) for name in names if "media/" in name]
        return {f"vae_pixels{i}": pixels[0].transpose(3, 0, 1, 2) for i, pixels in enumerate(seen)}


class Run:
    """One run under a probe: which of its rows are whose, and the modules of the language model."""

    def __init__(self, port: Port, probe: Any, code: Any) -> None:
        self.port, self.probe, self.code, self.bundle = port, probe, code, port.bundle
        self.arm, self.gen, inputs = "cond", None, port.bundle.inputs
        self.lengths, self.modes = inputs["split_lens"].array, inputs["attn_modes"].array
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.roles = inputs["modality"].array[self.starts[:-1]]
        code.returned(type(port.tokenizer), "__call__", lambda found: {"input_ids": self.ids(found["input_ids"])})
        code.returned(lance_llm, "apply_multimodal_rotary_pos_emb", lambda found: tuple(
            self.rows(f"{code.path}.{name}_rope", value) for name, value in zip("qk", found, strict=True)))  # fmt: skip
        code.returned(lance_llm, "scaled_dot_product_attention", lambda out: self.rows(f"{code.path}.sdpa", out))
        code.wrap(LanceModel, "__call__", self.whole)
        code.modules(port.paths(), self.module)

    def recorded(self, name: str, ids: list[int], seen: np.ndarray) -> list[int]:
        """Token ids; of the oracle's, where the run is steered, those that the port has a place for."""
        used = self.probe.integers(name, np.array(ids, np.int32))
        ids = used[seen].tolist() if len(used) == len(seen) else ids
        self.gen = np.array(ids) == self.port.pads[1]
        return ids

    def rows(self, path: str, value: mx.array, of: np.ndarray | None = None) -> mx.array:
        """A [rows, channels] value, a [1, rows, channels] one, or a [1, heads, rows, channels] one."""
        return self.probe.rows(path, value, of, axes={2: (0, 1), 3: (1, 2), 4: (2, 1, 3)}[value.ndim])

    def whole(self, original: Callable, model: Any, **values: Any) -> mx.array:
        self.gen = np.array(values["position_group"]) >= 2
        self.calls()
        values["position_ids"] = self.probe.rows("position_ids", values["position_ids"], axis=1, axes=(0, 2))
        values["inputs_embeds"] = self.rows("hidden_in", values["inputs_embeds"])
        return self.rows("hidden_out", original(model, **values))

    def module(self, path: str, out: mx.array) -> mx.array:
        if not path.startswith(LAYERS):
            return self.outside(path, out)
        if path == f"{LAYERS}embed_tokens":
            self.gen = self.gen if len(self.gen) == out.shape[1] else np.zeros(out.shape[1], bool)
            self.calls(embedding=True)
        return self.rows(path, out, None if OF_BOTH.fullmatch(path) else self.gen ^ ("_moe_gen" not in path))


class Drawing(Run):
    """t2i, t2v and image_edit: two arms, a denoising loop whose guidance and Euler steps are inline, and the VAE."""

    def __init__(self, port: Port, probe: Any, code: Any) -> None:
        super().__init__(port, probe, code)
        self.target, self.steps = int(np.flatnonzero(self.modes == NOISE)[-1]), port.bundle.request["num_steps"]
        self.plans = {arm: self.plan_of(arm) for arm in ("cond", "uncond")}
        self.step, self.states, self.guided, self.blocks = 0, [], [], []
        pipeline = type(port.pipeline)
        code.wrap(pipeline, "_step_velocity", self.velocity)
        code.returned(pipeline, "_build_position_ids", self.positions)
        code.returned(port.module, "timestep_schedule", lambda t: mx.array(probe.integers("timesteps", np.array(t))))
        noise = mx.array(self.bundle.taps["sampler.noise"].array)
        probe.value("sampler.noise", 1.0 * noise.astype(port.model.embed_tokens.weight.dtype))
        code.returned(mx.random, "normal", lambda drawn: noise[-(drawn.size // 48) :].reshape(drawn.shape))
        if port.task == "image_edit":
            pixels = mx.array(self.bundle.inputs["vae_pixels0"].array.transpose(1, 2, 3, 0))[None]
            code.wrap(pipeline, "_load_image_tensor", lambda original, *args, **values: pixels)
        frames = lambda u8, around: probe.value("frames", u8.reshape(-1, *u8.shape[-3:]), axes=(3, 0, 1, 2))  # noqa: E731
        code.watch(pipeline.generate, {
            "cond_state": lambda state, around: self.states.append(state), "velocity": self.combined,
            "z_clean": lambda value, around: probe.value("vae.latent0", value[0]), "latents": self.state,
            "z_t": self.state, "img_u8": frames, "frames_u8": frames})  # fmt: skip

    def plan_of(self, arm: str) -> dict[str, Any]:
        """Which of the oracle's tokens an arm of the port has, and which of its own rows each call's are."""
        kept = [i for i, role in enumerate(self.roles) if not (arm == "uncond" and role == TEXT)]
        # Edits have no ViT tokens, and nothing closes the target.
        seen = np.concatenate([np.full(self.lengths[i], self.roles[i] != VIT and i <= self.target) for i in kept])
        parts = np.split(np.where(seen, np.cumsum(seen) - 1, -1), np.cumsum(self.lengths[kept])[:-1])
        names = ["step" if i == self.target else f"prefix{n}" for n, i in enumerate(kept) if i <= self.target]
        clean = [names[n] for n, i in enumerate(kept) if self.modes[i] == CLEAN]
        return {"seen": seen, "calls": dict(zip(names, parts, strict=False)), "clean": clean}

    def calls(self, rows: dict[str, Any] | None = None, embedding: bool = False) -> None:
        """Name the calls that what follows is about, or all; none where the run has other tokens than the oracle."""
        # An arm's tokens are embedded once, for its prefix and all steps.
        plan, steps = self.plans[self.arm], range(self.steps) if embedding else [self.step]
        fits = self.gen is not None and len(self.gen) == plan["seen"].sum()
        self.probe.call({f"{self.arm}.{name.replace('step', f'step{step}')}": places
                         for name, places in (rows or plan["calls"]).items() for step in steps if fits})  # fmt: skip

    def cells(self, blocks: list[str]) -> None:  # latents without their brackets
        self.calls({block: np.arange(len(self.plans[self.arm]["calls"][block]) - 2) for block in blocks})

    def ids(self, ids: list[int]) -> list[int]:
        self.arm = "uncond" if self.states else "cond"
        return self.recorded("text_ids" if self.arm == "cond" else "text_ids.uncond", ids, self.plans[self.arm]["seen"])

    def positions(self, found: mx.array) -> mx.array:
        seen = self.plans[self.arm]["seen"]
        if found.shape[2] != seen.sum():
            return found
        return mx.array(self.probe.integers(f"position_ids.{self.arm}", np.array(found)[:, 0], seen))[:, None]

    def velocity(self, original: Callable, pipeline: Any, *, state: dict, **values: Any) -> mx.array:
        self.arm = "cond" if state is self.states[0] else "uncond"
        self.guided += [0] * (self.arm == "cond")
        self.guided[-1], self.step = int(self.arm == "uncond"), len(self.guided) - 1
        self.gen = np.array(state["position_group"]) >= 2
        # The table's rows serve the source and the target; then each has its time and its latents, the source first.
        self.blocks = [*self.plans[self.arm]["clean"], "step"]
        self.cells(self.blocks)
        velocity = original(pipeline, state=state, **values)
        if self.bundle.entry == "full_sequence" and all(self.guided[:-1]):
            name = f"velocity_call{2 * self.step + (self.arm == 'uncond')}"
            velocity = self.probe.value(name, velocity.reshape(-1, 48)).reshape(velocity.shape)
        return velocity

    def outside(self, path: str, out: mx.array) -> mx.array:
        if path == "time_embedder":
            block = self.blocks.pop(0)
            if self.step == 0 and self.arm == "cond" and not self.blocks:
                self.probe.value(path, out[-1])
            self.calls({block: [0]})
            out = self.rows(path, out)
            self.cells([block])
        elif path == "llm2vae":
            # Of the brackets, which nothing needs, it computes no velocity.
            self.calls({"step": [-1, *range(out.shape[1]), -1]})
        elif path == "pixels":
            # Of one image it decodes more frames and takes the first.
            count = out.shape[1] if self.port.task == "t2v" else 1
            return mx.concatenate([self.probe.value(path, out[:, :count], axes=(4, 1, 2, 3)), out[:, count:]], axis=1)
        elif path == "vae.encode0.mean":
            return self.probe.value(path, out, axes=(0, 4, 1, 2, 3))
        elif path.startswith("vae.") and path != "vae.conv1" and out.ndim == 5:
            return self.chunks(path.removeprefix("vae."), out)
        return self.rows(path, out) if path in ("latent_pos_embed", "vae2llm", "llm2vae") else out

    def chunks(self, path: str, out: mx.array) -> mx.array:
        """A [1, frames, h, w, channels] value of the VAE; what one latent frame becomes is a chunk's."""
        latents = self.bundle.taps["latent"].array.shape[0]
        spans, first = {"vae.encode0.chunk0": np.array([0])}, int(path.endswith("time_conv"))
        if not path.startswith("encoder"):
            each = max((out.shape[1] + first - 1) // max(latents - 1, 1), 1)
            chunks = [np.array([0])] + [1 + each * k + np.arange(each) for k in range(latents - 1)]
            spans = {f"vae.decode.chunk{k}": span - first for k, span in enumerate(chunks) if k >= first}
        self.probe.call(spans)
        return self.probe.rows(path, out, axis=2, axes=(0, 4, 1, 2, 3))

    def combined(self, value: mx.array, around: dict[str, Any]) -> mx.array:
        guided = self.probe.given.get("inputs/guided")
        value = value if guided is None or guided[self.step] else around["v_cond"]
        return self.probe.value(f"sampler.velocity{self.step}", value.reshape(-1, 48))

    def state(self, value: mx.array, around: dict[str, Any]) -> mx.array:
        """The latents before the first step, after one, or after the last; those of the source stand before them."""
        if len(self.guided) == self.steps:
            self.probe.integers("guided", np.array(self.guided, np.int32))
            return self.probe.value("latent", value[0])
        source = [around["z_clean"].reshape(-1, 48).astype(value.dtype)] if "z_clean" in around else []
        rows = mx.concatenate([*source, 1.0 * value.reshape(-1, 48)])
        if not self.guided:
            rows = self.probe.value("sampler.x_init", rows)
        return self.probe.value(f"sampler.x_t{len(self.guided)}", rows)[-(value.size // 48) :]


class Answering(Run):
    """x2t_image: the ViT, one pass over the question, then a token at a time."""

    def __init__(self, port: Port, probe: Any, code: Any) -> None:
        super().__init__(port, probe, code)
        self.question = self.passes = self.turns = 0
        code.returned(port.module, "_compute_position_ids", self.positions)
        code.returned(vision, "apply_rotary_pos_emb_vision", self.turned)
        code.returned(mx, "argmax", lambda token: mx.array([probe.next("tokens", token.item())]))

    def calls(self, embedding: bool = False) -> None:
        """In the first pass the question's last token is the oracle's first single one."""
        calls, last = {f"cond.decode{self.passes}": [0]}, self.question - 1
        if not self.passes:
            spans = enumerate(zip(self.starts, self.starts[1:], strict=False))
            calls = {f"cond.prefill{i}": np.arange(start, min(stop, last)) for i, (start, stop) in spans}
            calls["cond.decode0"] = [last]
        self.probe.call(calls)

    def ids(self, ids: list[int]) -> list[int]:
        ids = [self.port.pads[1] if token in self.port.pads else token for token in ids]  # as the port does next
        self.question = int(self.probe.integers("answer", [len(ids)])[0])
        seen = np.arange(self.starts[-1]) < self.question
        ids = self.recorded("text_ids", ids + self.bundle.inputs["text_ids"].array[len(ids) :].tolist(), seen)
        self.gen = self.gen[: self.question]
        return ids[: self.question]

    def positions(self, found: tuple[mx.array, Any]) -> tuple[mx.array, Any]:
        return mx.array(self.probe.integers("position_ids.cond", np.array(found[0])[:, 0]))[:, None], found[1]

    def outside(self, path: str, out: mx.array) -> mx.array:
        if path == "language_model.lm_head":
            self.probe.call({f"cond.decode{self.passes}": [0]})
            self.passes += 1
            return self.rows(path, out)
        return out if path.endswith(("_embed.proj", "rotary_pos_emb")) else self.probe.value(path, out)

    def turned(self, out: mx.array) -> mx.array:
        """Queries, then keys, each with axes of length 1 before its rows, heads and channels."""
        self.turns, name = self.turns + 1, f"{self.code.path}.{'qk'[self.turns % 2]}_rope"
        return self.probe.value(name, out, axes=tuple(range(out.ndim))[-3:])
