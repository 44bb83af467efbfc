"""Runs a clone's launcher in this process and writes what it was given and computed.

    python -m parity.lance.upstream.worker JOB.json

It needs what upstream needs, and of this project little more than what lies beside this file. What it has to say goes
as lines of JSON to the descriptor that the job names: {"call": ...} for progress, {"error": ...} before it fails.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity.errors import ParityError
from parity.lance.recorded_taps import RecordedTaps
from parity.lance.retention import RetentionPolicy, keep_whole, parted
from parity.lance.rows import layout_of
from parity.lance.upstream.adapt import Upstream, adapt, any_resolution, any_task, any_width, inputs_of, load
from parity.lance.upstream.capture import Capture
from parity.lance.upstream.layout_only import record_layout
from parity.tensors.recording import Recording, Tap, read_tensors, write_tensors
from parity.tensors.sketch_file import FILE, SKETCH, listing, write_sketches

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
    """Run the launcher on a job's request and write what it gives to the job's folder, at last run.json.

    That is inputs.safetensors and taps.safetensors, at the level "sketch" sketches.safetensors and what lists them, or
    without weights layout.npz.
    """
    request, out, clone = job["request"], Path(job["out"]), Path(job["clone"])
    progress("importing")
    upstream = load(clone)
    on_gpu = torch.cuda.is_available() and job["weights"]
    adapt(upstream, clone, job["dtype"], on_gpu)
    any_resolution(upstream, request)
    any_task(upstream, request["task"])
    progress("loading")
    if job["weights"]:
        record_run(upstream, job, progress)
    else:
        layout = record_layout(upstream, job, lambda folders: launch(upstream, job, *folders))
        np.savez_compressed(out / "layout.npz", **layout)
    there = [name for name in PACKAGES if name in sys.modules and name not in upstream.stood_in]
    versions = {name: getattr(sys.modules[name], "__version__", "unknown") for name in there}
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    found = {"device": device, "versions": versions, "stood_in": upstream.stood_in}
    (out / "run.json").write_text(json.dumps(found), encoding="utf-8")


def record_run(upstream: Upstream, job: Mapping[str, Any], progress: Callable[[str], None]) -> None:
    """Run the launcher on the weights of a checkpoint, watched; see run."""
    request, out, checkpoint = job["request"], Path(job["out"]), Path(job["checkpoint"])
    given = {} if job["given"] is None else read_tensors(Path(job["given"]))
    drawn = {name: tap.array for name, tap in given.items() if name.startswith(("sampler.", "vae."))}
    kept = RecordedTaps(job["entry"], request.get("num_steps", 0))
    capture = Capture(kept, job["entry"] == "kv_cache", drawn, progress)
    capture.watch_modules(upstream.lance, upstream.navit, upstream.vae)
    any_width(upstream)
    inputs: Recording = {}

    def watch(values: Mapping[str, Any]) -> None:
        batch = values["val_data_cpu"]
        give(batch, given)
        inputs.update(inputs_of(batch))
        answer = int(batch.ce_loss_indexes[0]) if request["task"].startswith("x2t") else None
        hold = RetentionPolicy(layout_of(inputs), job["whole"]) if job["level"] == SKETCH else keep_whole
        capture.watch(values["fsdp_model"], values["vae_model"], answer, hold)

    upstream.before_sampling(watch)
    launch(upstream, job, checkpoint / job["variant"], checkpoint / "Qwen2.5-VL-ViT")
    write_tensors(out / "inputs.safetensors", inputs)
    taps, sketches = parted(capture.kept)
    write_tensors(out / "taps.safetensors", taps)
    if job["level"] == SKETCH:
        write_sketches(out / FILE, sketches)
        (out / "sketches.json").write_text(json.dumps(listing(sketches)), encoding="utf-8")


def launch(upstream: Upstream, job: Mapping[str, Any], model: Path, vit: Path) -> None:
    """Run the launcher as its script does, on the folders of a model and of a vision tower."""
    launcher, vae = upstream.launcher, Path(job["checkpoint"]) / "Wan2.2_VAE.pth"
    upstream.config.get_model_path = lambda key: str(vae)
    launcher.MAX_GENERATION_LENGTH = job["request"].get("max_new_tokens", launcher.MAX_GENERATION_LENGTH)
    # What is written are the pixels, not a picture.
    launcher.decode_video_tensor = lambda pixels, **values: pixels[0].permute(1, 2, 3, 0)
    sys.argv = ["inference_lance.py", *arguments(job, model, vit)]
    launcher.main()


def arguments(job: Mapping[str, Any], model: Path, vit: Path) -> list[str]:
    """The launcher's command line for a job's request, whose sample is written to a file in the job's folder."""
    request, out = job["request"], Path(job["out"])
    sample = out / "sample.json"
    # Indented: of a file of one line upstream takes the line for a sample.
    sample.write_text(json.dumps({"0": request["spec"]}, indent=1), encoding="utf-8")
    values: dict[str, Any] = {option: request[key] for key, option in OPTIONS.items() if key in request}
    values |= {
        "model_path": model,
        "vit_path": vit,
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
