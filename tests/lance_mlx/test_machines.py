"""Several processes at one command, as mlx.launch starts them: the same results, nothing twice, and no hang."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from lance_mlx.distributed.local import local_ranks
from lance_mlx.distributed.ranks import Ranks, share_bounds
from lance_mlx.distributed.split import RowsSplit
from lance_mlx.distributed.watch import STALL_VARIABLE, STATUS
from lance_mlx.media.write import read_metadata
from lance_mlx.requests.request import Request
from lance_mlx.sampling.flow import Step

ROOT = Path(__file__).parents[2]
LIMIT = 240
"""Seconds for a busy machine."""

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring backend")


Launch = Callable[..., list[subprocess.Popen]]


@pytest.fixture
def launch(tmp_path) -> Iterator[Launch]:
    """Start a script in so many processes, with what mlx.launch tells each; keyword arguments are added to the
    environment."""
    started = []

    def start(count: int, script: str, *arguments: object, **environment: str) -> list[subprocess.Popen]:
        given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=os.environ | given | told,
            )
            for told in local_ranks(count, tmp_path)
        ]
        started.extend(ranks)
        return ranks

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


COMMAND = "import lance_command; lance_command.lance_mlx()"
SMALL = ["--width", 80, "--height", 48, "--numerics", "float32"]


def ended(ranks: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each."""
    return [(process.returncode, *streams) for process in ranks for streams in [process.communicate(timeout=LIMIT)]]


def until(process: subprocess.Popen, word: str) -> None:
    """Read stderr up to a line with a word."""
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"{word} was not said")


DRAW = """
import sys, numpy as np, lance_mlx
from lance_mlx.distributed.ranks import join
checkpoint, split = sys.argv[1:]
model = lance_mlx.load(checkpoint, "float32", split=split)
rank, made = join().rank, []
for request in (
    lance_mlx.Request("t2i", "a bird", 80, 48, num_steps=3, guidance_interval=(0.8, 1.0)),
    lance_mlx.Request("t2v", "a bird", 48, 80, 9, num_steps=2, scheduler="heun"),
):
    made.append(model.generate(request).latents)
seeds = [lance_mlx.Request("t2i", "a bird", 64, 48, num_steps=2, seed=seed) for seed in (1, 2)]
made += [drawn.latents for drawn in model.generate_batch(seeds)]
np.savez(f"{split}-{rank}.npz", *made)
"""


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory) -> list[np.ndarray]:
    """What one process draws."""
    folder = tmp_path_factory.mktemp("alone")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    given = [sys.executable, "-c", DRAW, checkpoint, "outputs"]
    subprocess.run(given, cwd=folder, env=environment, check=True, timeout=LIMIT)
    with np.load(folder / "outputs-0.npz") as arrays:
        return list(arrays.values())


@pytest.mark.parametrize(
    ("split", "count"), [("guidance", 2), pytest.param("rows", 2, marks=pytest.mark.exhaustive), ("rows", 3)]
)
def test_what_is_computed_together_is_what_one_computes(launch, checkpoint, tmp_path, alone, split, count):
    done = ended(launch(count, DRAW, checkpoint, split))
    assert [status for status, *_ in done] == [0] * count, done
    drawn = []
    for rank in range(count):
        with np.load(tmp_path / f"{split}-{rank}.npz") as arrays:
            drawn.append(list(arrays.values()))
    assert len(alone) == 4
    for index, expected in enumerate(alone):
        assert all(np.array_equal(drawn[0][index], of_rank[index]) for of_rank in drawn)
        error = np.linalg.norm(drawn[0][index] - expected) / np.linalg.norm(expected)
        assert error < 5e-6


def test_outputs_are_shared_and_one_rank_writes_what_all_draw(launch, checkpoint, tmp_path):
    given = ["generate", "t2i", "--model", checkpoint, *SMALL, "--steps", 2, "--prompt", "a bird"]
    several = ended(launch(2, COMMAND, *given, "--seed", 1, 2, 3, "--output", "each.png"))
    assert [status for status, *_ in several] == [0, 0], several
    written = [[line.split(":")[0] for line in stdout.splitlines()] for _, stdout, _ in several]
    assert written == [["each-1.png"], ["each-2.png", "each-3.png"]]
    together = ended(launch(2, COMMAND, *given, "--seed", 1, "--output", "both.png"))
    assert [status for status, *_ in together] == [0, 0], together
    assert together[0][1].startswith("both.png: ") and together[1][1:] == ("", "")
    pixels = [np.array(Image.open(tmp_path / name)).astype(int) for name in ("each-1.png", "both.png")]
    assert abs(pixels[0] - pixels[1]).max() <= 1


def ask(path: Path) -> dict[str, list]:
    return {
        "interleave_array": [str(path), ["Look.", "What is it?", "a bird"]],
        "element_dtype_array": ["image", "text"],
        "istarget_in_interleave": [0, 1],
    }


def test_answers_of_all_ranks_are_noted_in_one_folder(launch, checkpoint, tmp_path, media):
    shutil.copy(media / "phone.jpg", tmp_path / "tablet.jpg")
    pictures = media / "phone.jpg", media / "logo.png", tmp_path / "tablet.jpg"
    asked = {str(index): ask(path) for index, path in enumerate(pictures)}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    given = ["generate", "--requests", "asked.json", "--model", checkpoint, "--output", "answers"]
    done = ended(launch(2, COMMAND, *given, "--vit-resolution", 56, "--max-tokens", 3))
    assert [status for status, *_ in done] == [0, 0], done
    assert [stdout.count("\n") for _, stdout, _ in done] == [1, 2]
    results = json.loads((tmp_path / "answers" / "result.json").read_text())
    prompts = json.loads((tmp_path / "answers" / "prompt.json").read_text())
    assert len(results) == 3 and sorted(prompts) == ["logo.png", "phone.jpg", "tablet.jpg"]


def lines(stderr: str) -> list[str]:
    """Those of the command itself; MLX's ring says by itself that a connection closed."""
    return [line for line in stderr.splitlines() if line.startswith("lance-mlx: ")]


@pytest.mark.parametrize(
    ("split", "victim", "number", "how"),
    [
        ("guidance", 1, signal.SIGKILL, "has ended"),
        pytest.param("rows", 0, signal.SIGKILL, "has ended", marks=pytest.mark.exhaustive),
        ("rows", 1, signal.SIGSTOP, "has not answered"),
        pytest.param("outputs", 1, signal.SIGKILL, "has ended", marks=pytest.mark.exhaustive),
    ],
)
def test_a_rank_that_dies_or_stalls_ends_the_others(launch, checkpoint, tmp_path, split, victim, number, how):
    given = ["generate", "t2i", "--model", checkpoint, *SMALL, "--steps", 1000, "--prompt", "a bird"]
    given += ["--split", split, "--seed", *((1, 2) if split == "outputs" else (1,)), "--output", "bird.png"]
    ranks = launch(2, COMMAND, *given, **{STALL_VARIABLE: "5"})
    # The others of what is drawn together say nothing.
    until(ranks[0], "denoising")
    ranks[victim].send_signal(number)
    (status, stdout, stderr), *_ = ended([ranks[1 - victim]])
    assert status == STATUS, stderr
    assert [line.startswith(f"lance-mlx: rank {victim} of 2 {how}") for line in lines(stderr)] == [True], stderr
    assert "Traceback" not in stderr and stdout == ""
    assert list(tmp_path.glob("*.png")) == []


def test_a_request_file_goes_on_after_a_rank_died(launch, checkpoint, tmp_path):
    prompts = {f"{index:06d}.png": f"bird {index}" for index in range(8)}
    (tmp_path / "asked.json").write_text(json.dumps(prompts))
    given = ["generate", "--requests", "asked.json", "--model", checkpoint, *SMALL, "--steps", 100, "--batch-size", 1]
    ranks = launch(2, COMMAND, *given, "--output", "made")
    # The first of its share is there.
    while not (tmp_path / "made" / "000004.png").exists():
        assert ranks[1].poll() is None
        time.sleep(0.05)
    ranks[1].kill()
    (status, stdout, stderr), *_ = ended(ranks[:1])
    # It may have been done before it heard of it.
    assert status in (STATUS, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").glob("*.png")}
    assert 0 < len(before) < 8
    assert all(read_metadata(path)["request"]["prompt"] == prompts[path.name] for path in before)
    done = ended(launch(2, COMMAND, *given, "--output", "made"))
    assert [status for status, *_ in done] == [0, 0], done
    noted = json.loads((tmp_path / "made" / "prompt.json").read_text())
    assert noted == prompts and sorted(path.name for path in (tmp_path / "made").glob("*.png")) == sorted(prompts)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    made = [line.split(":")[0] for _, stdout, _ in done for line in stdout.splitlines() if ".png" in line]
    assert sorted(made) == sorted(f"made/{name}" for name in prompts if tmp_path / "made" / name not in before)


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        ({"MLX_RANK": "0"}, [], "start with mlx.launch"),
        ({"MLX_RANK": "5"}, [], "MLX_RANK 5 is none of 2 ranks"),
        ({}, ["--split", "rows"], "--split is for several processes"),
    ],
)
def test_what_cannot_be_ranks_is_one_line(refused, run, checkpoint, tmp_path, environment, options, words):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    if environment.get("MLX_RANK") == "5":
        environment = environment | {"MLX_HOSTFILE": str(hosts)}
    environment = environment and environment | {"PYTHONPATH": str(ROOT)}
    output = ["--output", tmp_path / "bird.png"]
    line = refused("generate", "t2i", "--model", checkpoint, "--prompt", "a", *output, *options, **environment)
    assert words in line


def test_one_process_of_mlx_launch_is_alone(run, checkpoint, tmp_path):
    (tmp_path / "hosts.json").write_text("")
    environment = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "PYTHONPATH": str(ROOT)}
    given = ["--model", checkpoint, *SMALL, "--steps", 1, "--prompt", "a", "--output", tmp_path / "bird.png"]
    assert run("generate", "t2i", *given, **environment).returncode == 0


def test_shares_are_neighbours_and_all_there_is():
    for count in range(20):
        for size in range(1, 7):
            shares = [Ranks(rank, size).share(list(range(count))) for rank in range(size)]
            assert sum(shares, []) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert share_bounds(count, size)[-1] == count


class Counting(Ranks):
    """Rank 0 of three that all compute what it computes, and count the bytes that a ring would have it send."""

    def __init__(self) -> None:
        super().__init__(0, 3)
        self.sent = 0

    def gather(self, x: mx.array) -> mx.array:
        self.sent += x.nbytes * (self.size - 1)
        return mx.concatenate([x] * self.size)


def test_bytes_of_a_step_are_those_of_the_formula(pipeline):
    # docs/machines.md has it.
    config, ranks = pipeline.model.config, Counting()
    request = Request("t2i", "a bird", 48, 80, num_steps=2, guidance_interval=(0.9, 1.0))
    latents = 15
    own = latents // 3 * 4 * (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim + 48)
    sent = []
    shared = denoise(pipeline, request, RowsSplit(ranks))
    for _ in shared:
        sent.append(ranks.sent)
        ranks.sent = 0
    assert sent == [2 * 2 * own, 2 * own]


def denoise(pipeline, request, split) -> Iterator[Step]:
    """The steps of a request, with a split."""
    pipeline.split = split
    try:
        yield from pipeline.denoise(pipeline.prepare(request))
    finally:
        pipeline.split = None
