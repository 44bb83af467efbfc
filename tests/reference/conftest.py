"""What the tests of the reference share: embedded oracles, tokenizers and the small checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

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
def noise(request_) -> np.ndarray:
    frames, rows, columns = request_.latent_grid
    return np.random.default_rng(0).standard_normal((frames * rows * columns, 48), np.float32)
