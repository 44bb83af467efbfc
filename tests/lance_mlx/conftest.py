"""What the tests of lance_mlx share: the embedded checkpoint and its tokenizer."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from lance_mlx import FLOAT32, Pipeline, Task, load
from lance_mlx.tokenizer import LanceTokenizer

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "oracles" / "checkpoint-a"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """An official checkpoint at a small width, read only."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The embedded oracle bundles."""
    return ROOT / "oracles"


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """The small video checkpoint in float32."""
    return load(CHECKPOINT, Task.T2V, FLOAT32)


@pytest.fixture(scope="session")
def tokenizer() -> LanceTokenizer:
    """The small checkpoint's tokenizer."""
    return LanceTokenizer(CHECKPOINT / "Lance_3B")


@pytest.fixture(scope="session")
def real_tokenizer() -> LanceTokenizer:
    """Qwen2.5-VL's own tokenizer."""
    return LanceTokenizer(ROOT / "tests" / "data" / "tokenizer")


class CheckpointCopy:
    """A checkpoint folder that a test may damage."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.variant = folder / "Lance_3B"
        shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("Lance_3B_Video"))

    def edit_config(self, **values: object) -> None:
        """Set keys of llm_config.json; None removes one."""
        path = self.variant / "llm_config.json"
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def edit_weights(self, **arrays: mx.array | None) -> None:
        """Set tensors of model.safetensors; None removes one."""
        path = self.variant / "model.safetensors"
        tensors = mx.load(str(path))
        mx.eval(tensors)
        tensors |= {name.replace("__", "."): array for name, array in arrays.items()}
        mx.save_safetensors(str(path), {name: array for name, array in tensors.items() if array is not None})


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> CheckpointCopy:
    """A checkpoint folder that the test may damage."""
    return CheckpointCopy(tmp_path / "checkpoint")
