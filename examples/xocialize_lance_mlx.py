"""The public MLX port of Lance under the harness: an adapter for a clone of xocialize/lance-mlx.

LANCE_PEER names the clone; --python its interpreter, with PyTorch beside for its converter. Nothing of it is changed:
modules, functions and inline variables are attached to from outside while a run lasts. Written against d39a981.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

CLONE = Path(os.environ.get("LANCE_PEER", ""))
if not (CLONE / "src/lance_mlx").is_dir():
    raise SystemExit("LANCE_PEER names no clone of xocialize/lance-mlx")
# Its package is called lance_mlx too.
sys.path.insert(0, str(CLONE / "src"))

from lance_mlx.model._loader import build_text_config  # noqa: E402
from mlx_video.models.wan_2 import vae22  # noqa: E402
from mlx_vlm.models.qwen2_5_vl import vision  # noqa: E402
from mlx_vlm.models.qwen2_5_vl.config import VisionConfig  # noqa: E402
from transformers import Qwen2TokenizerFast  # noqa: E402

from lance_mlx.model import LanceModel, lance_llm  # noqa: E402

TEXT, VIT, CLEAN, NOISE = 0, 4, 2, 3
"""A text split's role, a ViT split's, and the attention of a source's latents and of the target's, as in bundles."""
PIPELINES = {"t2i": "TextToImagePipeline", "t2v": "TextToVideoPipeline", "image_edit": "ImageEditPipeline",
             "x2t_image": "UnderstandingPipeline"}  # fmt: skip
OPTIONS = {"num_steps": "num_steps", "timestep_shift": "timestep_shift", "cfg_text_scale": "cfg_scale",
           "cfg_renorm_min": "cfg_renorm_min", "height": "height", "width": "width"}  # fmt: skip
FRAMES, SIDE = 31, 64
LAYERS = "language_model.model."
RENAMED = {"vae_in_proj.vae2llm": "vae2llm", "time_embedder.proj_in": "time_embedder.mlp.0", "llm2vae": "llm2vae",
           "time_embedder.proj_out": "time_embedder.mlp.2", "time_embedder": "time_embedder",
           "latent_pos_embed": "latent_pos_embed", "lm_head": "language_model.lm_head"}  # fmt: skip


def script(name: str) -> ModuleType:
    """One of the clone's scripts, which are no package."""
    spec = importlib.util.spec_from_file_location(f"_peer_{name[:2]}", CLONE / "scripts" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def position_table(hidden: int) -> np.ndarray:
    """The checkpoint's fixed table, float32 [frames * side * side, hidden]: sines and cosines of t, h and w."""
    width, parts = hidden // 3 // 2 * 2, []
    cells, widths = np.indices((FRAMES, SIDE, SIDE)).reshape(3, -1), (width, width, hidden - 2 * width)
    for places, channels in zip(cells, widths, strict=True):
        angles = places[:, None] / 10000 ** (np.arange(channels // 2) / (channels / 2))
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, 1, dtype=np.float32, casting="same_kind")


def begin(state: dict[str, mx.array], *starts: str) -> list[tuple[str, mx.array]]:
    return [(name, value) for name, value in state.items() if name.startswith(starts)]


class Port:
    """xocialize/lance-mlx, loaded for a bundle by its own converters."""

    name = "xocialize/lance-mlx"

    def __init__(self, bundle: Any) -> None:
        self.bundle, self.task, self.now = bundle, bundle.task, None
        if self.task not in PIPELINES:
            raise ValueError(f"the adapter is for {', '.join(PIPELINES)}, not {self.task}")
        self.module = importlib.import_module(f"lance_mlx.pipeline.{self.task.replace('x2t_image', 'understanding')}")
        self.dtype = {"float32": "fp32", "bfloat16": "bf16"}[bundle.dtype]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            script("02_convert.py").convert(bundle.checkpoint / bundle.variant, out, self.dtype, "lance_3b_video")
            self.config = json.loads((out / "config.json").read_text())
            self.saved = mx.load(str(out / "model.safetensors"))
            # Checkpoints made for tests hold one frame of the table.
            table = self.saved["latent_pos_embed.pos_embed"]
            self.saved["latent_pos_embed.pos_embed"] = mx.array(position_table(table.shape[1])).astype(table.dtype)
            text = build_text_config(self.config)
            self.model = LanceModel(text, num_latent_positions=FRAMES * SIDE**2)
            self.model.load_weights(list(self.saved.items()))
            self.tokenizer = Qwen2TokenizerFast.from_pretrained(bundle.checkpoint / bundle.variant)
            given = self.looking(out) if self.task == "x2t_image" else self.drawing(out)
            mx.eval(self.model.parameters())
        self.pads = {kind: self.tokenizer.convert_tokens_to_ids(f"<|{kind}|>")
                     for kind in ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
        ids = {f"{kind}_token_id": value for kind, value in self.pads.items()}
        if self.task == "x2t_image":
            ends = [self.tokenizer.convert_tokens_to_ids(f"<|{kind}|>") for kind in ("im_end", "endoftext")]
            ids = {"image_token_id": self.pads["image_pad"], "video_token_id": self.pads["video_pad"],
                   "vision_start_token_id": self.pads["vision_start"], "eos_token_ids": ends,
                   "endoftext_token_id": ends[1]}  # fmt: skip
        kind = getattr(self.module, PIPELINES[self.task])
        self.pipeline = kind(lance_model=self.model, text_config=text, **given, **ids)

    def drawing(self, out: Path) -> dict[str, Any]:
        """The VAE, and a processor whose tokenizer tells the run under way."""
        script("06_convert_wan_vae.py").convert(self.bundle.checkpoint / "Wan2.2_VAE.pth", out, self.dtype)
        vae = mx.load(str(out / "vae.safetensors"))
        mx.eval(vae)
        decoder = vae22.Wan22VAEDecoder(48, dec_dim=vae["decoder.conv1.weight"].shape[0] // 4)
        decoder.load_weights(begin(vae, "decoder.", "conv2."))

        def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": self.now.ids(self.tokenizer(text, add_special_tokens=False)["input_ids"])}

        given = {"vae_decoder": decoder, "processor": SimpleNamespace(tokenizer=tokenizer)}
        if self.task == "image_edit":
            given["vae_encoder"] = vae22.Wan22VAEEncoder(48, dim=vae["encoder.conv1.weight"].shape[0])
            given["vae_encoder"].load_weights(begin(vae, "encoder.", "conv1."))
        return given

    def looking(self, out: Path) -> dict[str, Any]:
        """The ViT, and a processor that gives the bundle's patches."""
        fields = {
            "in_channels" if key == "in_chans" else key: value for key, value in self.config["vision_config"].items()
        }
        known = VisionConfig.__dataclass_fields__.keys()
        config = VisionConfig(**{key: value for key, value in fields.items() if key in known})
        model = vision.VisionModel(config)
        own = out / "vit.safetensors"
        state = mx.load(str(own if own.exists() else self.bundle.checkpoint / "Qwen2.5-VL-ViT/vit.safetensors"))
        model.load_weights(list(model.sanitize(state).items()))

        class Processor:
            tokenizer = self.tokenizer

            def __call__(processor, images: Any, text: str, return_tensors: str) -> dict[str, mx.array]:  # noqa: N805
                grid = self.bundle.inputs["vit_video_grid_thw"].array
                text = text.replace("<|image_pad|>", "<|image_pad|>" * (int(grid[0].prod()) // 4))
                ids = self.now.ids(self.tokenizer(text, add_special_tokens=False)["input_ids"])
                patches = mx.array(self.bundle.inputs["vit_patches0"].array)
                return {"input_ids": mx.array([ids]), "pixel_values": patches, "image_grid_thw": mx.array(grid)}

        return {"vision_model": model, "vision_config": config, "processor": Processor()}

    def run(self, probe: Any) -> None:
        """Run the request as the port's command does, from the bundle's noise and visuals."""
        asked = self.bundle.request
        options = {ours: asked[theirs] for theirs, ours in OPTIONS.items() if theirs in asked}
        self.now = (Answering if self.task == "x2t_image" else Drawing)(self, probe)
        with self.now.attached():
            if self.task == "x2t_image":
                instruction, question, _ = asked["spec"]["interleave_array"][1]
                self.pipeline.generate(None, question, instruction=instruction, max_new_tokens=asked["max_new_tokens"])
                return
            if self.task == "t2v":
                options["num_frames"] = asked["num_frames"]
            given = [asked["spec"]]
            if self.task == "image_edit":
                given = [np.zeros(0), next(t for t in asked["spec"]["interleave_array"] if not t.startswith("media/"))]
                # Upstream's output is as large as its source; here one says so.
                options["height"], options["width"] = self.bundle.inputs["vae_pixels0"].array.shape[2:]
            self.pipeline.generate(*given, **options)
        probe.integers("guided", np.array(self.now.guided, np.int32))

    def paths(self) -> Iterator[tuple[str, nn.Module]]:
        """Its modules by their paths in the checkpoint."""
        for path, module in self.model.named_modules():
            yield RENAMED.get(path, f"{LAYERS}{path}"), module
        for start, name in (("vae.", "vae_decoder"), ("vae.", "vae_encoder"), ("vit_model0.", "vision_model")):
            for path, module in getattr(self.pipeline, name, nn.Module()).named_modules():
                yield f"{start}{path}".replace("layer_", "").rstrip("."), module

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """What it loaded of the transformer, under the checkpoint's names; what draws never reads the head."""
        for name, value in self.saved.items():
            path, _, parameter = name.rpartition(".")
            if path != "lm_head" or self.task == "x2t_image":
                yield f"{RENAMED.get(path, LAYERS + path)}.{parameter}", np.array(value.astype(mx.float32))

    @contextmanager
    def with_weights(self, given: dict[str, np.ndarray]) -> Iterator[None]:
        """Hold given values of the transformer for a while, in the dtypes that it has them in."""
        before, named = dict(self.saved), {}
        for name in before:
            path, _, parameter = name.rpartition(".")
            named[f"{RENAMED.get(path, LAYERS + path)}.{parameter}"] = name
        held = {named[name]: mx.array(value).astype(before[named[name]].dtype) for name, value in given.items()}
        self.model.load_weights(list(held.items()), strict=False)
        try:
            yield
        finally:
            self.model.load_weights([(name, before[name]) for name in held], strict=False)


class Run:
    """One run under a probe: which of its rows are whose, and the modules of the language model."""

    def __init__(self, port: Port, probe: Any) -> None:
        self.port, self.probe, self.bundle = port, probe, port.bundle
        self.paths = {id(module): path for path, module in port.paths()}
        self.arm, self.layer, self.gen = "cond", "", None
        inputs = self.bundle.inputs
        self.lengths, self.modes = inputs["split_lens"].array, inputs["attn_modes"].array
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.roles = [int(inputs["modality"].array[start]) for start in self.starts[:-1]]

    @contextmanager
    def attached(self) -> Iterator[None]:
        with self.probe.attached() as attached:
            wrap = attached.wrap
            wrap(lance_llm, "apply_multimodal_rotary_pos_emb", self.rotated)
            wrap(lance_llm, "scaled_dot_product_attention", self.attended)
            wrap(LanceModel, "__call__", self.whole)
            wrap(lance_llm.LanceMoTAttention, "__call__", self.attention)
            own = {LanceModel, lance_llm.LanceMoTAttention, vae22.Wan22VAEDecoder, vae22.Wan22VAEEncoder}
            for kind in {type(module) for _, module in self.port.paths()} - own:
                wrap(kind, "__call__", self.module)
            self.attach(attached)
            yield

    def recorded(self, name: str, ids: list[int], seen: np.ndarray) -> list[int]:
        """Token ids; of the oracle's, where the run is steered, those that the port has a place for."""
        used = self.probe.integers(name, np.array(ids, np.int32))
        ids = used[seen].tolist() if len(used) == len(seen) else ids
        self.gen = np.array(ids) == self.port.pads["video_pad"]
        return ids

    def rows(self, path: str, value: mx.array, of: np.ndarray | None = None) -> mx.array:
        """A [1, rows, channels] value, or a [1, heads, rows, channels] one."""
        if value.ndim == 3:
            return self.probe.rows(path, value[0], of)[None]
        return self.probe.rows(path, value[0].transpose(1, 0, 2), of).transpose(1, 0, 2)[None]

    def whole(self, original: Callable, model: Any, **values: Any) -> mx.array:
        self.gen = np.array(values["position_group"]) >= 2
        self.begin_pass()
        places = self.probe.rows("position_ids", np.array(values["position_ids"])[:, 0], axis=1)
        values |= {"inputs_embeds": self.rows("hidden_in", values["inputs_embeds"])}
        out = self.rows("hidden_out", original(model, **values | {"position_ids": mx.array(places)[:, None]}))
        self.end_pass()
        return out

    def end_pass(self) -> None:
        pass

    def rotated(self, original: Callable, *args: Any, **values: Any) -> tuple[mx.array, ...]:
        found = original(*args, **values)
        return tuple(self.rows(f"{self.layer}.{name}_rope", value) for name, value in zip("qk", found, strict=True))

    def attended(self, original: Callable, *args: Any, **values: Any) -> mx.array:
        return self.rows(f"{self.layer}.sdpa", original(*args, **values))

    def attention(self, original: Callable, module: nn.Module, *args: Any, **values: Any) -> mx.array:
        self.layer = self.paths[id(module)]
        return self.rows(self.layer, original(module, *args, **values))

    def module(self, original: Callable, module: nn.Module, *args: Any, **values: Any) -> mx.array:
        path, out = self.paths.get(id(module), ""), original(module, *args, **values)
        if not path.startswith(LAYERS) or self.gen is None or out.ndim < 3:
            return self.other(path, out)
        of = None
        if path == f"{LAYERS}embed_tokens":
            self.embedding(out.shape[1])
            of = ~self.gen
        elif "." in path.removeprefix(f"{LAYERS}layers.") or "norm" in path:
            # Both experts compute all tokens; each tap holds those of one.
            of = self.gen if "_moe_gen" in path else ~self.gen
        return self.rows(path, out, of)


class Drawing(Run):
    """t2i, t2v and image_edit: two arms, a denoising loop whose guidance and Euler steps are inline, and the VAE."""

    def __init__(self, port: Port, probe: Any) -> None:
        super().__init__(port, probe)
        self.target = int(np.flatnonzero(self.modes == NOISE)[-1])
        self.plans = {arm: self.plan(arm) for arm in ("cond", "uncond")}
        self.states, self.guided, self.blocks = [], [], []

    def plan(self, arm: str) -> SimpleNamespace:
        """Which of the oracle's tokens an arm of the port has, and which of its own rows each call's are."""
        kept = [i for i, role in enumerate(self.roles) if not (arm == "uncond" and role == TEXT)]
        # Edits have no ViT tokens, and nothing closes the target.
        seen = np.concatenate([np.full(self.lengths[i], self.roles[i] != VIT and i <= self.target) for i in kept])
        parts = np.split(np.where(seen, np.cumsum(seen) - 1, -1), np.cumsum(self.lengths[kept])[:-1])
        names = ["step" if i == self.target else f"prefix{n}" for n, i in enumerate(kept) if i <= self.target]
        clean = [names[n] for n, i in enumerate(kept) if self.modes[i] == CLEAN]
        return SimpleNamespace(seen=seen, calls=dict(zip(names, parts, strict=False)), rows=seen.sum(), clean=clean)

    def attach(self, attached: Any) -> None:
        pipeline = type(self.port.pipeline)
        attached.wrap(pipeline, "_prepare_state", self.prepare)
        attached.wrap(pipeline, "_build_position_ids", self.positions)
        attached.wrap(pipeline, "_step_velocity", self.velocity)
        attached.wrap(self.port.module, "timestep_schedule", self.schedule)
        attached.wrap(mx.random, "normal", self.noise)
        if self.port.task == "image_edit":
            attached.wrap(pipeline, "_load_image_tensor", self.source)
            attached.wrap(vae22.Wan22VAEEncoder, "__call__", self.encoded)
        frames = dict.fromkeys(("img_u8", "frames_u8"), self.frames)
        attached.watch(pipeline.generate, {"velocity": self.combined, "latents": self.state, "z_t": self.state,
                                           "z_clean": self.sampled, "decoded": self.pixels, **frames})  # fmt: skip

    @property
    def step(self) -> int:
        return max(len(self.guided) - 1, 0)

    def calls(self, names: dict[str, Any]) -> None:
        """Name the calls that what follows is about; none where the run has other tokens than the oracle."""
        fits = self.gen is not None and len(self.gen) == self.plans[self.arm].rows
        self.probe.call({f"{self.arm}.{name}": rows for name, rows in names.items()} if fits else {})

    def begin_pass(self, steps: Any = None) -> None:
        calls = dict(self.plans[self.arm].calls)
        target = calls.pop("step")
        self.calls(calls | {f"step{step}": target for step in steps or [self.step]})

    def embedding(self, count: int) -> None:
        """An arm's tokens are embedded once, for its prefix and all steps."""
        self.begin_pass(range(self.bundle.request["num_steps"]))

    # The sequence.

    def prepare(self, original: Callable, pipeline: Any, **values: Any) -> dict:
        self.arm, self.gen = ("cond", "uncond")[min(len(self.states), 1)], None
        self.states.append(original(pipeline, **values))
        return self.states[-1]

    def ids(self, ids: list[int]) -> list[int]:
        return self.recorded("text_ids" if self.arm == "cond" else "text_ids.uncond", ids, self.plans[self.arm].seen)

    def positions(self, original: Callable, pipeline: Any, **values: Any) -> mx.array:
        found = original(pipeline, **values)
        seen = self.plans[self.arm].seen
        if found.shape[2] != seen.sum():
            return found
        return mx.array(self.probe.integers(f"position_ids.{self.arm}", np.array(found)[:, 0], seen))[:, None]

    def schedule(self, original: Callable, *args: Any, **values: Any) -> mx.array:
        return mx.array(self.probe.integers("timesteps", np.array(original(*args, **values))))

    def noise(self, original: Callable, shape: tuple[int, ...]) -> mx.array:
        noise = self.bundle.taps["sampler.noise"].array
        self.probe.value("sampler.noise", mx.array(noise).astype(self.port.model.embed_tokens.weight.dtype))
        return mx.array(noise[-len(self.bundle.inputs["mse_loss_indexes"].array) :]).reshape(shape)

    # A step.

    def velocity(self, original: Callable, pipeline: Any, *, state: dict, **values: Any) -> mx.array:
        self.arm = "cond" if state is self.states[0] else "uncond"
        if self.arm == "cond":
            self.guided.append(0)
        self.guided[-1] = int(self.arm == "uncond")
        self.gen = np.array(state["position_group"]) >= 2
        # The table's rows serve the source and the target; then each has its time and its latents, the source first.
        self.blocks = [*self.plans[self.arm].clean, f"step{self.step}"]
        self.latents(self.blocks)
        velocity = original(pipeline, state=state, **values)
        if self.bundle.entry != "full_sequence" or not all(self.guided[:-1]):
            return velocity
        name = f"velocity_call{2 * self.step + (self.arm == 'uncond')}"
        return self.probe.value(name, velocity.reshape(-1, 48)).reshape(velocity.shape)

    def latents(self, blocks: list[str]) -> None:
        calls = self.plans[self.arm].calls
        self.calls({block: np.arange(len(calls[block.rstrip("0123456789") if "step" in block else block]) - 2)
                    for block in blocks})  # fmt: skip

    def other(self, path: str, out: mx.array) -> mx.array:
        """Modules outside the language model."""
        if path.startswith("vae."):
            return self.code(path.removeprefix("vae."), out)
        if path == "time_embedder":
            block = self.blocks.pop(0)
            if self.step == 0 and self.arm == "cond" and not self.blocks:
                self.probe.value(path, out[-1])
            self.calls({block: [0]})
            out = self.probe.rows(path, out)
            self.latents([block])
        elif path == "latent_pos_embed":
            out = self.probe.rows(path, out)
        elif path == "vae2llm":
            out = self.rows(path, out)
        elif path == "llm2vae":
            # Of the brackets, which nothing needs, it computes no velocity.
            self.calls({f"step{self.step}": [-1, *range(out.shape[1]), -1]})
            out = self.rows(path, out)
        return out

    def combined(self, value: mx.array, around: dict[str, Any]) -> None:
        guided = self.probe.contract.get("inputs/guided")
        if guided is not None and not guided[self.step]:
            value[...] = around["v_cond"]
        self.change(f"sampler.velocity{self.step}", value)

    def change(self, name: str, value: mx.array, before: mx.array | None = None) -> None:
        """Record rows of latents, those of the source before, and change them in place where they are to be others."""
        own = value.reshape(-1, 48)
        rows = own if before is None else mx.concatenate([before.reshape(-1, 48).astype(own.dtype), own])
        used = self.probe.value(name, rows)
        value[...] = used[len(rows) - len(own) :].reshape(value.shape)

    def state(self, value: mx.array, around: dict[str, Any]) -> None:
        """The latents before the first step, after one, or after the last."""
        if len(self.guided) == self.bundle.request["num_steps"]:
            value[...] = self.probe.value("latent", value[0])[None]
            return
        if not self.guided:
            self.change("sampler.x_init", value, around.get("z_clean"))
        self.change(f"sampler.x_t{len(self.guided)}", value, around.get("z_clean"))

    # Pixels.

    def source(self, original: Callable, *args: Any, **values: Any) -> mx.array:
        return mx.array(self.bundle.inputs["vae_pixels0"].array.transpose(1, 2, 3, 0))[None]

    def encoded(self, original: Callable, module: nn.Module, *args: Any) -> mx.array:
        mean = original(module, *args).transpose(0, 4, 1, 2, 3)
        return self.probe.value("vae.encode0.mean", mean).transpose(0, 2, 3, 4, 1)

    def sampled(self, value: mx.array, around: dict[str, Any]) -> None:
        value[...] = self.probe.value("vae.latent0", value[0])[None]

    def code(self, path: str, out: mx.array) -> mx.array:
        """A [1, frames, h, w, channels] value; what one latent frame becomes is a chunk's."""
        if out.ndim != 5 or path == "conv1":
            return out
        latents = self.bundle.taps["latent"].array.shape[0]
        spans, first = {"vae.encode0.chunk0": np.array([0])}, int(path.endswith("time_conv"))
        if not path.startswith("encoder"):
            each = max((out.shape[1] + first - 1) // max(latents - 1, 1), 1)
            chunks = [np.array([0])] + [1 + each * k + np.arange(each) for k in range(latents - 1)]
            spans = {f"vae.decode.chunk{k}": span - first for k, span in enumerate(chunks) if k >= first}
        self.probe.call(spans)
        return self.probe.rows(path, out.transpose(0, 4, 1, 2, 3), axis=2).transpose(0, 2, 3, 4, 1)

    def pixels(self, value: mx.array, around: dict[str, Any]) -> None:
        # Of one image it decodes more frames and takes the first.
        count = value.shape[1] if self.port.task == "t2v" else 1
        used = self.probe.value("pixels", value[0, :count].transpose(3, 0, 1, 2))
        value[0, :count] = used.transpose(1, 2, 3, 0)

    def frames(self, value: np.ndarray, around: dict[str, Any]) -> None:
        frames = np.array(value).reshape(-1, *value.shape[-3:])
        self.probe.value("frames", frames.transpose(3, 0, 1, 2).astype(np.int32))


class Answering(Run):
    """x2t_image: the ViT, one pass over the question, then a token at a time."""

    def __init__(self, port: Port, probe: Any) -> None:
        super().__init__(port, probe)
        self.question = self.passes = 0
        self.block, self.turns, self.answered = "", 0, []

    def attach(self, attached: Any) -> None:
        attached.wrap(self.port.module, "_compute_position_ids", self.positions)
        attached.wrap(vision, "apply_rotary_pos_emb_vision", self.turned)
        attached.wrap(vision.Attention, "__call__", self.seeing)
        attached.wrap(mx, "argmax", self.chosen)

    def begin_pass(self) -> None:
        """In the first pass the question's last token is the oracle's first single one."""
        calls = {f"cond.decode{self.passes}": [0]}
        if not self.passes:
            last = self.question - 1
            calls = {f"cond.prefill{i}": np.arange(start, min(stop, last))
                     for i, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False))}  # fmt: skip
            calls["cond.decode0"] = [last]
        self.probe.call(calls)

    def embedding(self, count: int) -> None:
        self.gen = np.zeros(1, bool) if count == 1 else self.gen
        self.begin_pass()

    def end_pass(self) -> None:
        self.passes += 1

    def ids(self, ids: list[int]) -> list[int]:
        pads = self.port.pads
        ids = [pads["video_pad"] if token == pads["image_pad"] else token for token in ids]  # as the port does next
        self.question = int(self.probe.integers("answer", [len(ids)])[0])
        seen = np.arange(self.starts[-1]) < self.question
        ids = self.recorded("text_ids", ids + self.bundle.inputs["text_ids"].array[len(ids) :].tolist(), seen)
        self.gen = self.gen[: self.question]
        return ids[: self.question]

    def positions(self, original: Callable, *args: Any, **values: Any) -> tuple[mx.array, Any]:
        found, deltas = original(*args, **values)
        return mx.array(self.probe.integers("position_ids.cond", np.array(found)[:, 0]))[:, None], deltas

    def other(self, path: str, out: mx.array) -> mx.array:
        if path == "language_model.lm_head":
            self.probe.call({f"cond.decode{self.passes - 1}": [0]})
            return self.rows(path, out)
        return self.probe.value(path, out) if path.startswith("vit_model0") else out

    def seeing(self, original: Callable, module: nn.Module, *args: Any, **values: Any) -> mx.array:
        self.block, self.turns = self.paths[id(module)], 0
        return self.probe.value(self.block, original(module, *args, **values))

    def turned(self, original: Callable, *args: Any) -> mx.array:
        out = original(*args)
        name = f"{self.block}.{'qk'[self.turns]}_rope"
        self.turns += 1
        return self.probe.value(name, out.reshape(out.shape[-3:])).reshape(out.shape)

    def chosen(self, original: Callable, *args: Any, **values: Any) -> mx.array:
        token = original(*args, **values)
        self.answered.append(token.item())
        given = self.probe.force.get("tokens")
        if given is not None and len(self.answered) <= len(given[0]):
            token = mx.array(given[0][len(self.answered) - 1 :][:1])
        self.probe.taps["tokens"] = np.array(self.answered, np.int32), "int32"
        return token
