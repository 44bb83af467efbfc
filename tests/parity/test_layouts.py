import dataclasses
import json
import shutil

import numpy as np
import pytest

from parity.errors import ParityError
from parity.lance.sequence_layouts import BUILDERS, check_layout, find_tokenizer, read_layout, read_layouts


@pytest.fixture
def layouts(tmp_path, oracles):
    folder = tmp_path / "layouts"
    folder.mkdir()
    for path in (oracles / "layouts").glob("t2i-768.*"):
        shutil.copy(path, folder)
    return folder


class Rebuilt:
    """Builds exactly the arrays of a layout, but for `changed` ones."""

    def __init__(self, arrays, **changed):
        self.arrays = arrays | changed

    def __call__(self, request, tokenizer, media):
        return {name: array for name, array in self.arrays.items() if array is not None}


@pytest.mark.parametrize("implementation", ["mlx", "reference"])
@pytest.mark.parametrize("name", ["t2i-768", "t2v-768x768x50", "t2v-480x848x121"])
def test_both_build_the_largest_sequences_exactly(oracles, implementation, name):
    layout = read_layout(oracles / "layouts" / f"{name}.npz")
    result = check_layout(layout, implementation, BUILDERS[implementation], find_tokenizer(oracles / "layouts"))
    assert (result.verdict, result.detail) == ("agree", "")
    assert result.compared == len(layout.arrays) and result.tokens == len(layout.arrays["text_ids"])


def test_one_wrong_number_is_named(layouts):
    layout = read_layout(layouts / "t2i-768.npz")
    positions = layout.arrays["position_ids.cond"].copy()
    positions[1, 77] += 1
    result = check_layout(layout, "mlx", Rebuilt(layout.arrays, **{"position_ids.cond": positions}), layouts)
    assert result.verdict == "diverge"
    expected = layout.arrays["position_ids.cond"][1, 77]
    assert result.detail == f"position_ids.cond is {expected + 1} at [1, 77] where the oracle has {expected}"


@pytest.mark.parametrize(
    ("array", "verdict"),
    [
        (None, "unusable"),
        (np.zeros(31, np.float64), "diverge"),
        (np.zeros(30, np.float32), "diverge"),
        (np.full(31, -0.0, np.float32), "diverge"),
    ],
)
def test_what_is_missing_or_of_another_kind_does_not_agree(layouts, array, verdict):
    layout = read_layout(layouts / "t2i-768.npz")
    zeros = layout.arrays | {"timesteps": np.zeros(31, np.float32)}
    layout = dataclasses.replace(layout, arrays=zeros)
    assert check_layout(layout, "mlx", Rebuilt(zeros), layouts).verdict == "agree"
    result = check_layout(layout, "mlx", Rebuilt(zeros, timesteps=array), layouts)
    assert result.verdict == verdict and "timesteps" in result.detail


def test_tokenizers_are_found_in_or_above_the_folder(layouts, tmp_path):
    found = find_tokenizer(layouts)
    assert (found / "vocab.json").is_file() and tmp_path not in found.parents
    for place in (tmp_path / "tokenizer", layouts / "tokenizer"):
        place.mkdir()
        for name in ("vocab.json", "merges.txt"):
            (place / name).touch()
        assert find_tokenizer(layouts).resolve() == place
    with pytest.raises(ParityError, match="--tokenizer"):
        find_tokenizer(layouts, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "t2i-768.json").unlink(),
        lambda folder: (folder / "t2i-768.npz").unlink(),
        lambda folder: (folder / "t2i-768.npz").write_bytes((folder / "t2i-768.npz").read_bytes()[:-100]),
        lambda folder: (folder / "t2i-768.npz").write_bytes(b""),
        lambda folder: (folder / "t2i-768.json").write_text("[]"),
        lambda folder: (folder / "t2i-768.json").write_text(json.dumps({"format": "lance-layout/1"})),
        lambda folder: np.savez(folder / "t2i-768.npz", text_ids=np.array([None])),
        lambda folder: np.savez(folder / "t2i-768.npz", timesteps=np.zeros(3)),
        lambda folder: shutil.rmtree(folder),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_refuses_damaged_layouts_in_one_line(layouts, damage):
    damage(layouts)
    with pytest.raises(ParityError) as caught:
        read_layouts(layouts)
    assert "\n" not in str(caught.value)
