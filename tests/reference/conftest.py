"""What the tests of the reference share: embedded oracles, tokenizers and the small checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from parity.tensors.recording import Replay
from reference.arms import build_arms
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.prompt import Tokenizer
from reference.request import Request

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "oracles" / "checkpoint-a"


@pytest.fixture(scope="session")
def real_tokenizer() -> Tokenizer:
    return Tokenizer(ROOT / "tests" / "data" / "tokenizer")


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return CHECKPOINT


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    torch.set_num_threads(1)
    return Pipeline.load(CHECKPOINT, "Lance_3B", Numerics())


@pytest.fixture
def request_values() -> dict:
    return json.loads((ROOT / "oracles" / "t2i-fp32-kv" / "manifest.json").read_text())["request"]


@pytest.fixture
def request_(request_values) -> Request:
    return Request.from_dict(request_values)


@pytest.fixture
def noise(request_, pipeline) -> np.ndarray:
    latents = len(pipeline.layout(request_).latent_rows)
    return np.random.default_rng(0).standard_normal((latents, 48), np.float32)


@pytest.fixture
def arms(pipeline, noise):
    """The two arms and the state before the first step of a request without visuals."""

    def build(request: Request, entry: str) -> tuple:
        start = torch.from_numpy(noise)
        return *build_arms(pipeline.inputs(pipeline.layout(request)), request, entry, start), start

    return build


@pytest.fixture
def asked():
    """Request of a task about visuals, and what a run of it is given: one image, or two of another size each."""

    def build(task: str, count: int = 1, **changes: object) -> tuple[Request, Replay]:
        question = task.startswith("x2t")
        text = ["Look.", "what is it", "a bird"] if question else "make it blue"
        order = [f"{i}.png" for i in range(count)]
        spec = {
            "interleave_array": [*order, text] if question else [text, *order],
            "element_dtype_array": ["image"] * count + ["text"] if question else ["text"] + ["image"] * count,
            "istarget_in_interleave": [0] * count + [1] if question else [0] * (count + 1),
        }
        values = {"height": 64, "width": 32, "num_frames": 9, "num_steps": 2, "max_new_tokens": 6} | changes
        request = Request.from_dict({"task": task, "spec": spec} | values)
        random = np.random.default_rng(0)
        grids = tuple((1, 4 + 2 * i, 6) for i in range(count if task != "i2v" else 0))
        sizes = [] if question or task == "i2v" else [(1, 32 + 16 * i, 48) for i in range(count)]
        if not question:
            sizes.append({"idip": (9, 64, 32), "i2v": (9, 32, 48)}.get(task, (1, *sizes[-1][1:]) if sizes else None))
        cells = [((t - 1) // 4 + 1, h // 16, w // 16) for t, h, w in sizes]
        return request, Replay(
            noise=None if question else draw(random, sum(map(np.prod, cells)), 48),
            vae_pixels=tuple(np.clip(draw(random, 3, *size), -1, 1) for size in sizes),
            vit_patches=tuple(draw(random, int(np.prod(grid)), 1176) for grid in grids),
            vit_grids=grids,
            eps=tuple(draw(random, 1, 48, *cell) for cell in cells),
        )

    return build


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, np.float32)
