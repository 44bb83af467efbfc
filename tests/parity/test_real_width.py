"""Both implementations at the width of the official checkpoint, with seeded random weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from parity import memory
from parity.lance.replay_mlx import load_for, replay_pipeline, request_from_bundle
from parity.lance.replay_torch import TorchReplay
from parity.tensors.metrics import compare
from parity.tensors.recording import Recording, Replay, read_tensors, write_tensors
from reference.config import LanguageConfig
from reference.model import Lance, Pipeline
from reference.numerics import Numerics
from reference.request import Request
from reference.vae import VAE, DecoderPlan

CHECKPOINT = Path(__file__).parents[2] / "oracles" / "checkpoint-a"
# Every official size but the depth and the vocabulary, which has 455 tokens here.
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
STAGES = [
    (1024, 1024, 3, True, True),
    (1024, 1024, 3, True, True),
    (1024, 512, 3, True, False),
    (512, 256, 3, False, False),
]
REQUEST = {
    "task": "t2v",
    "spec": "a small red bird flies over the river",
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_steps": 1,
    "timestep_shift": 3.5,
    "text_template": True,
    "cfg_text_scale": 4.0,
    "cfg_interval": [0.4, 1.0],
    "cfg_renorm_type": "global",
    "cfg_renorm_min": 0.0,
}


def random_weights(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size: scales around 1, everything else as wide as its inputs allow."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or "norm" in name:
            weights[name] = 1 + 0.1 * values
        elif parameter.ndim > 1:
            weights[name] = values * parameter[0].numel() ** -0.5
        else:
            weights[name] = 0.1 * values
    return weights


def make(folder: Path) -> None:
    """Write one layer of the transformer and the whole VAE decoder, in the official layout."""
    variant = folder / "Lance_3B_Video"
    shutil.copytree(CHECKPOINT / variant.name, variant, ignore=shutil.ignore_patterns("*.safetensors"))
    path = variant / "llm_config.json"
    config = json.loads(path.read_text()) | SIZES
    config["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    path.write_text(json.dumps(config))
    with torch.device("meta"):
        model = Lance(LanguageConfig.from_file(path), Numerics("float32"))
        vae = VAE(DecoderPlan(48, 1024, STAGES), Numerics("float32"))
    save_file(random_weights(model, 1), variant / "model.safetensors")
    torch.save(random_weights(vae, 2), folder / "Wan2.2_VAE.pth")


def record(folder: Path, side: str) -> None:
    """Record the request as lance_mlx does it, or as the reference does, also in another order of rounding."""
    torch.set_num_threads(1)
    noise = np.random.default_rng(3).normal(size=(2, 48)).astype(np.float32)
    if side == "ours":
        asked = request_from_bundle(REQUEST, "kv_cache")
        found = replay_pipeline(load_for(asked, folder / "Lance_3B_Video", "float32"), asked, Replay(noise))
        write_tensors(folder / "ours.safetensors", found.recording)
        return
    orders = {"theirs": Numerics("float32"), "reordered": Numerics("float32", "disturbed", "disturbed")}
    for kind, numerics in orders.items():
        pipeline = Pipeline.load(folder, "Lance_3B_Video", numerics)
        run = TorchReplay(pipeline, Request.from_dict(REQUEST), "kv_cache", Replay(noise))
        write_tensors(folder / f"{kind}.safetensors", run.record())
        # A model is part of a cycle, and the next one is as large.
        memory.give_back()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, Recording]:
    """What each computes. Every model takes 3 GB: each is in memory in a process of its own, and no longer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for step in ("make", *KINDS[:2]):
        subprocess.run([sys.executable, __file__, step, folder], check=True, cwd=Path(__file__).parents[2])
    yield {kind: read_tensors(folder / f"{kind}.safetensors") for kind in KINDS}
    shutil.rmtree(folder)


KINDS = ("ours", "theirs", "reordered")
# A norm's sum of so many squares is off by a quarter of a unit in the last place times the root of their number.
NORM = SIZES["hidden_size"] ** 0.5 * 2.0**-26
# Measured: lance_mlx is off by twice what one other order of summing does, and by less than NORM where sums alone are.
ALLOWED = 4


@pytest.mark.exhaustive
def test_both_agree_at_the_official_width(recorded):
    ours, theirs, reordered = (recorded[kind] for kind in KINDS)
    assert ours.keys() & theirs.keys() >= {"latent", "pixels", "cond.step0/llm2vae", "uncond.step0/hidden_out"}
    # The unconditional arm's target is embedded with the conditional one's.
    alone = theirs.keys() - ours.keys()
    assert all(name.startswith("uncond.step0/") for name in alone) and len(alone) == 4
    for name in theirs.keys() & ours.keys() - {"frames"}:
        difference = compare(theirs[name], ours[name])
        assert difference.mismatch is None, name
        floor = compare(theirs[name], reordered[name]).rel_l2
        assert difference.rel_l2 <= ALLOWED * max(floor, NORM), name
    # A pixel between two 8-bit colours may be rounded either way.
    assert compare(theirs["frames"], ours["frames"]).max_abs <= 1


if __name__ == "__main__":
    make(Path(sys.argv[2])) if sys.argv[1] == "make" else record(Path(sys.argv[2]), sys.argv[1])
