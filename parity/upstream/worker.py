"""Runs a clone's launcher in this process and writes what it was given and computed.

    python -m parity.upstream.worker JOB.json

It needs what upstream needs, and of this project parity.recording and what lies beside this file. What it has to say goes
as lines of JSON to the descriptor that the job names: {"call": ...} for progress, {"error": ...} before it ends with 1.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from parity.errors import ParityError
from parity.recorded_taps import RecordedTaps
from parity.recording import Recording, Tap, read_tensors, to_tap, write_tensors
from parity.upstream import stand_ins
from parity.upstream.capture import Capture
from parity.upstream.namespace import Overlaid

ATTN_MODES = {"causal": 0, "full": 1, "full_noise": 2, "noise": 3}
# Options of the launcher that the shell script sets and no request changes (bytedance/Lance inference_lance.sh).
SCRIPT = (
    *("--vit_type", "qwen_2_5_vl_original", "--llm_qk_norm", "true", "--llm_qk_norm_und", "true"),
    *("--llm_qk_norm_gen", "true", "--tie_word_embeddings", "false", "--copy_init_moe", "true"),
    *("--max_num_frames", "121", "--max_latent_size", "64", "--latent_patch_size", "1", "1", "1"),
    *("--visual_und", "true", "--visual_gen", "true", "--vae_model_type", "wan", "--apply_chat_template", "false"),
    *("--apply_qwen_2_5_vl_pos_emb", "true", "--cfg_type", "0", "--enhance_prompt", "false"),
)
# The request's keys and the launcher's options that they are.
OPTIONS = {
    "task": "task",
    "height": "video_height",
    "width": "video_width",
    "num_frames": "num_frames",
    "text_template": "text_template",
    "num_steps": "validation_num_timesteps",
    "timestep_shift": "validation_timestep_shift",
    "cfg_text_scale": "cfg_text_scale",
    "cfg_interval": "cfg_interval",
    "cfg_renorm_type": "cfg_renorm_type",
    "cfg_renorm_min": "cfg_renorm_min",
    "seed": "validation_data_seed",
}
PACKAGES = ("torch", "transformers", "flash_attn", "torchvision", "decord")


class Cpu:
    """What the launcher takes for the number of GPUs: the rest of dividing a rank by it is the CPU."""

    def __rmod__(self, rank: int) -> torch.device:
        return torch.device("cpu")


def nothing(*args: Any) -> None:
    """Do nothing."""


def main(path: str) -> int:
    """Run a job; return the exit status."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    report = os.fdopen(job["report"], "w", buffering=1)

    def say(**what: object) -> None:
        print(json.dumps(what), file=report)

    try:
        run(job, lambda call: say(call=call))
    except Exception as error:
        text = " ".join(str(error).split())
        say(error=text if isinstance(error, ParityError) else f"{type(error).__name__}: {text}")
        raise
    return 0


def run(job: Mapping[str, Any], progress: Callable[[str], None]) -> None:
    """Run the launcher on a job's request; write inputs.safetensors, taps.safetensors and versions.json to its folder."""
    request, out = job["request"], Path(job["out"])
    progress("importing")
    sys.path.insert(0, job["clone"])
    stood_in = stand_ins.install()
    launcher, lance, navit, vae, dataset = (
        import_module(name)
        for name in (
            "inference_lance",
            "modeling.lance.lance",
            "modeling.lance.qwen2_navit",
            "modeling.vae.wan.model",
            "data.datasets_custom.validation_dataset",
        )
    )
    float32 = job["dtype"] == "float32"
    if float32:
        in_float32(Path(job["clone"]).resolve())
    if float32 or not torch.cuda.is_available():
        navit.flash_attn_varlen_func = stand_ins.attention
    if not torch.cuda.is_available():
        on_cpu(launcher, navit, vae)
    given = {} if job["given"] is None else read_tensors(Path(job["given"]))
    drawn = {name: tap.array for name, tap in given.items() if name.startswith(("sampler.", "vae."))}
    cached = job["entry"] == "kv_cache"
    capture = Capture(RecordedTaps(job["entry"], request.get("num_steps", 0)), cached, drawn, progress)
    capture.watch_modules(lance, navit, vae)
    any_width(import_module("modeling.vae.wan.vae2_2"))
    resolve(request, dataset)
    checkpoint = Path(job["checkpoint"])
    import_module("config.config_factory").get_model_path = lambda key: str(checkpoint / "Wan2.2_VAE.pth")
    launcher.MAX_GENERATION_LENGTH = request.get("max_new_tokens", launcher.MAX_GENERATION_LENGTH)
    launcher.decode_video_tensor = lambda pixels, **values: pixels[0].permute(1, 2, 3, 0)
    inputs: Recording = {}
    validate = launcher.validate_on_fixed_batch

    def watched(**values: Any) -> None:
        batch = values["val_data_cpu"]
        give(batch, given)
        inputs.update(inputs_of(batch))
        answer = batch.ce_loss_indexes if request["task"].startswith("x2t") else None
        capture.watch(values["fsdp_model"], values["vae_model"], None if answer is None else int(answer[0]))
        validate(**values)

    launcher.validate_on_fixed_batch = watched
    if request["task"] not in launcher.TASK_DEFAULT_CONFIGS:
        # The subject-driven path, which the launcher's list of tasks leaves out.
        launcher.TASK_DEFAULT_CONFIGS[request["task"]] = {}
        launcher.GENERATION_TASKS.add(request["task"])
    sys.argv = ["inference_lance.py", *arguments(request, job, out)]
    progress("loading")
    launcher.main()
    write_tensors(out / "inputs.safetensors", inputs)
    write_tensors(out / "taps.safetensors", capture.recording)
    versions = {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules and name not in stood_in}
    (out / "versions.json").write_text(json.dumps({"versions": versions, "stood_in": stood_in}), encoding="utf-8")


def cpu_autocast(device_type: str, dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
    """What upstream asks of the GPU's mixed precision, of the CPU's."""
    return torch.autocast("cpu", dtype=dtype, enabled=enabled and dtype != torch.float32)


def in_float32(clone: Path) -> None:
    """Let every file of the clone find float32 under the name bfloat16, which it has no option for."""
    torch.backends.cudnn.allow_tf32 = False
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and vars(module).get("torch") is torch and Path(file).resolve().is_relative_to(clone):
            module.torch = Overlaid(torch, bfloat16=torch.float32)


def on_cpu(launcher: ModuleType, navit: ModuleType, vae: ModuleType) -> None:
    """Let the launcher run where there is no GPU: what it asks of one is answered by the CPU."""
    cuda = Overlaid(torch.cuda, is_available=lambda: True, device_count=Cpu)
    cuda.set_device = cuda.empty_cache = cuda.ipc_collect = nothing
    amp = Overlaid(torch.amp, autocast=cpu_autocast)
    launcher.torch = Overlaid(launcher.torch, cuda=cuda, amp=amp)
    vae.torch = Overlaid(vae.torch, autocast=cpu_autocast)
    vae.get_device = lambda: torch.device("cpu")
    navit.flex_attention = stand_ins.masked_attention


def any_width(wan: ModuleType) -> None:
    """Build the VAE at the widths of its checkpoint; upstream writes the official ones down."""
    build = wan._video_vae

    def built(pretrained_path: str, **values: Any) -> torch.nn.Module:
        shapes = torch.load(pretrained_path, map_location="meta", weights_only=True)
        widths = {
            "dim": shapes["encoder.conv1.weight"].shape[0],
            "dec_dim": shapes["decoder.conv1.weight"].shape[0] // values["dim_mult"][-1],
        }
        return build(pretrained_path, **values | widths)

    wan._video_vae = built


def resolve(request: Mapping[str, Any], dataset: ModuleType) -> None:
    """Let visuals be resized to the request's own sizes where it names them; upstream knows named pairs alone."""
    sizes = {16: request.get("vae_resolution"), 28: request.get("vit_resolution")}
    transform = dataset.VideoTransform

    def sized(resolution: int, divisible_crop_size: int, **values: Any) -> object:
        wanted = sizes[divisible_crop_size] or resolution
        return transform(resolution=wanted, divisible_crop_size=divisible_crop_size, **values)

    dataset.VideoTransform = sized


def arguments(request: Mapping[str, Any], job: Mapping[str, Any], out: Path) -> list[str]:
    """The launcher's command line for a request, whose sample is written to a file in `out`."""
    checkpoint, sample = Path(job["checkpoint"]), out / "sample.json"
    # Indented: of a file of one line upstream takes the line for a sample.
    sample.write_text(json.dumps({"0": request["spec"]}, indent=1), encoding="utf-8")
    values: dict[str, Any] = {option: request[key] for key, option in OPTIONS.items() if key in request}
    values |= {
        "model_path": checkpoint / job["variant"],
        "vit_path": checkpoint / "Qwen2.5-VL-ViT",
        "val_dataset_config_file": sample,
        "save_path_gen": out / "results",
        "resolution": request.get("resolution", "image_768res"),
        "use_KVcache": job["entry"] == "kv_cache",
    }
    line = list(SCRIPT)
    for option, value in values.items():
        line += [f"--{option}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return line


def give(batch: Any, given: Mapping[str, Tap]) -> None:
    """Put given preprocessed visuals into a batch in place of its own; raises ParityError where they do not fit."""
    for kind, attribute in (("vae_pixels", "padded_videos"), ("vit_patches", "packed_vit_tokens")):
        own = getattr(batch, attribute, None) or []
        for index in range(len(own)):
            name = f"{kind}{index}"
            if name not in given:
                continue
            array = given[name].array
            if array.shape != tuple(own[index].shape):
                raise ParityError(f"{name} has shape {list(array.shape)}, upstream makes {list(own[index].shape)}")
            own[index] = torch.from_numpy(array)


def inputs_of(batch: Any) -> Recording:
    """What a batch holds, under the names of a bundle's inputs."""
    values = {
        "text_ids": batch.packed_text_ids,
        "modality": batch.sample_modality,
        "split_lens": torch.tensor(batch.split_lens),
        "attn_modes": torch.tensor([ATTN_MODES[mode] for mode in batch.attn_modes]),
    }
    same = ("video_grid_thw", "video_sizes", "vae_video_grid_thw", "vit_video_grid_thw", "packed_vae_token_indexes")
    for name in (*same, "packed_vit_token_indexes", "mse_loss_indexes", "ce_loss_indexes"):
        values[name] = getattr(batch, name, None)
    for kind, attribute in (("vae_pixels", "padded_videos"), ("vit_patches", "packed_vit_tokens")):
        values |= {f"{kind}{index}": value for index, value in enumerate(getattr(batch, attribute, None) or [])}
    return {name: to_tap(value) for name, value in values.items() if isinstance(value, Tensor) and value.numel()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
