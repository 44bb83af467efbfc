"""The clone's modules, and what has to change about them without a GPU or for another dtype or size."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from parity.errors import ParityError
from parity.lance.upstream import stand_ins
from parity.lance.upstream.namespace import Overlaid
from parity.tensors.recording import Recording, to_tap

ATTN_MODES = {"causal": 0, "full": 1, "full_noise": 2, "noise": 3}


@dataclass(frozen=True)
class Upstream:
    """The modules of a clone that are watched or changed, and the packages that had to be stood in for."""

    launcher: ModuleType
    config: ModuleType
    dataset: ModuleType
    lance: ModuleType
    navit: ModuleType
    vae: ModuleType
    wan: ModuleType
    stood_in: list[str]

    def before_sampling(self, watch: Callable[[Mapping[str, Any]], None]) -> None:
        """Let `watch` see what the launcher samples with, the model and its batch among it, once all is loaded."""
        validate = self.launcher.validate_on_fixed_batch

        def watched(**values: Any) -> None:
            watch(values)
            validate(**values)

        self.launcher.validate_on_fixed_batch = watched


def load(clone: Path) -> Upstream:
    """Import a clone's modules, with stand-ins for what they need and this Python lacks.

    Raises ParityError where something else is missing, or there in a version that upstream cannot use.
    """
    sys.path.insert(0, str(clone))
    stood_in = stand_ins.install()
    names = (
        *("inference_lance", "config.config_factory", "data.datasets_custom.validation_dataset"),
        *("modeling.lance.lance", "modeling.lance.qwen2_navit", "modeling.vae.wan.model", "modeling.vae.wan.vae2_2"),
    )
    try:
        return Upstream(*map(import_module, names), stood_in)
    except ImportError as error:
        raise ParityError(
            f"{sys.executable} cannot import the clone ({error}): name the Python of the clone's own environment with "
            "--upstream-python, or install what the clone's requirements.txt lists"
        ) from error


def adapt(upstream: Upstream, clone: Path, dtype: str, on_gpu: bool) -> None:
    """Let the launcher run in a dtype, and without a GPU where there is none."""
    if dtype == "float32":
        _in_float32(clone.resolve())
    if dtype == "float32" or not on_gpu:
        # flash_attn has no float32.
        upstream.navit.flash_attn_varlen_func = stand_ins.attention
    if not on_gpu:
        _on_cpu(upstream)
    # Sums of bfloat16 are rounded once, as where they are compared: cuBLAS may round parts of them.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class _Cpu:
    """What the launcher takes for the number of GPUs: the rest of dividing a rank by it is the CPU."""

    def __rmod__(self, rank: int) -> torch.device:
        return torch.device("cpu")


def _nothing(*args: Any) -> None:
    """Do nothing."""


def _autocast(device_type: str, dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
    """What upstream asks of the GPU's mixed precision, of the CPU's."""
    return torch.autocast("cpu", dtype=dtype, enabled=enabled and dtype != torch.float32)


def _in_float32(clone: Path) -> None:
    """Let every file of the clone find float32 under the name bfloat16, which it has no option for."""
    torch.backends.cudnn.allow_tf32 = False
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and vars(module).get("torch") is torch and Path(file).resolve().is_relative_to(clone):
            module.torch = Overlaid(torch, bfloat16=torch.float32)


def _on_cpu(upstream: Upstream) -> None:
    """Let the launcher run where there is no GPU: what it asks of one is answered by the CPU."""
    cuda = Overlaid(torch.cuda, is_available=lambda: True, device_count=_Cpu)
    cuda.set_device = cuda.empty_cache = cuda.ipc_collect = _nothing
    amp = Overlaid(torch.amp, autocast=_autocast)
    upstream.launcher.torch = Overlaid(upstream.launcher.torch, cuda=cuda, amp=amp)
    upstream.vae.torch = Overlaid(upstream.vae.torch, autocast=_autocast)
    upstream.vae.get_device = lambda: torch.device("cpu")
    upstream.navit.flex_attention = stand_ins.masked_attention


def any_width(upstream: Upstream) -> None:
    """Build the VAE at the widths of its checkpoint; upstream writes the official ones down."""
    build = upstream.wan._video_vae

    def built(pretrained_path: str, **values: Any) -> torch.nn.Module:
        shapes = torch.load(pretrained_path, map_location="meta", weights_only=True)
        widths = {
            "dim": shapes["encoder.conv1.weight"].shape[0],
            "dec_dim": shapes["decoder.conv1.weight"].shape[0] // values["dim_mult"][-1],
        }
        return build(pretrained_path, **values | widths)

    upstream.wan._video_vae = built


def any_resolution(upstream: Upstream, request: Mapping[str, Any]) -> None:
    """Let visuals be resized to the request's own sizes where it names them; upstream knows named pairs alone."""
    sizes = {16: request.get("vae_resolution"), 28: request.get("vit_resolution")}
    transform = upstream.dataset.VideoTransform

    def sized(resolution: int, divisible_crop_size: int, **values: Any) -> object:
        wanted = sizes[divisible_crop_size] or resolution
        return transform(resolution=wanted, divisible_crop_size=divisible_crop_size, **values)

    upstream.dataset.VideoTransform = sized


def any_task(upstream: Upstream, task: str) -> None:
    """Let the launcher run the subject-driven path too, which its list of tasks leaves out."""
    if task not in upstream.launcher.TASK_DEFAULT_CONFIGS:
        upstream.launcher.TASK_DEFAULT_CONFIGS[task] = {}
        upstream.launcher.GENERATION_TASKS.add(task)


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
