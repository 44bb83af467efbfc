"""That float32 is multiplied as float32, and that what lowers it is named."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from lance_mlx.backend import precision

SHOW = "import os, lance_mlx; print(os.environ['MLX_ENABLE_TF32'])"


def environment(**values: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != precision.VARIABLE} | values


@pytest.mark.parametrize("values, expected", [({}, "0"), ({precision.VARIABLE: "1"}, "1")])
def test_mlx_keeps_float32_unless_the_environment_decides(values, expected):
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment(**values), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


def test_products_here_are_in_float32():
    assert precision.multiplies_float32() and precision.describe() == "in float32"


def test_fewer_bits_are_found_and_named(monkeypatch):
    product = mx.array.__matmul__

    def in_tf32(a, b):
        return product(*((x.view(mx.uint32) & 0xFFFFE000).view(mx.float32) for x in (a, b)))

    monkeypatch.setattr(mx.array, "__matmul__", in_tf32)
    monkeypatch.setenv(precision.VARIABLE, "1")
    assert precision.describe() == "in TF32, of 10 bits: MLX_ENABLE_TF32 is 1; 0 keeps float32"
    monkeypatch.setenv(precision.VARIABLE, "0")
    assert precision.describe().endswith("something multiplied with MLX before lance_mlx was imported")
