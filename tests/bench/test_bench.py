"""The cases of scripts/bench.py at small sizes; `pytest tests/bench --benchmark-enable` times them.

Without that option every case runs once, and is checked for what holds whatever the time.
"""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from lance_mlx.sampling.flow import velocities

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench  # noqa: E402
import bench_cases  # noqa: E402


@pytest.mark.parametrize("case", bench.cases(quick=True), ids=lambda case: f"{case.name} {case.label}")
def test_case(benchmark, case):
    work = bench_cases.CASES[case.name](*case.arguments)
    try:
        benchmark(work.run)
    finally:
        work.remove()
    assert work.items >= 1 and (work.operations is None or work.operations > 0)


def test_wasted_work_gives_the_same_velocities():
    task = ("t2i", 16, 64, 2, "float32")
    model, arms, _, prefix = bench_cases._sampling(*task)
    prefix()
    state = bench_cases.state_of(model, next(iter(arms.values())).sequence)
    plain = mx.stack(velocities(model, list(arms.values()), state))
    with bench_cases.both_experts():
        wasteful = mx.stack(velocities(model, list(arms.values()), state))
    assert float(abs(plain - wasteful).max()) < 1e-4 * float(abs(plain).max())


def result(name, arguments, seconds):
    return bench.Result(name, arguments, seconds, 10 * seconds, 1, None, 1.0)


def test_every_series_of_steps_is_fitted_by_itself(tmp_path):
    steps = [case for case in bench.whole_model_cases() if case.name == "step"]
    results = [result("step", c.arguments, c.arguments[1] ** (1 if "bfloat16" in c.arguments else 2)) for c in steps]
    lines = bench.summary(results)
    assert lines == [
        "step (2048, 36, bfloat16): cost grows with latents to the power 1.00, memory to 1.00",
        "step (2048, 36, float32): cost grows with latents to the power 2.00, memory to 2.00",
    ]
    assert bench.plot(results, tmp_path).is_file()


def test_a_power_law_is_fitted():
    assert bench.exponent([(n, 3 * n**1.5) for n in (10, 100, 1000)]) == pytest.approx(1.5)


def test_the_script_prints_a_table_and_writes_json_and_a_plot(tmp_path):
    command = [sys.executable, SCRIPTS / "bench.py", "--quick", "--repeats", "1", "--only", "ViT"]
    done = subprocess.run([*command, "--json", tmp_path / "b.json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "share of product" in done.stdout
    assert {entry["name"] for entry in json.loads((tmp_path / "b.json").read_text())} == {"ViT, 4 blocks"}
    done = subprocess.run([*command[:-1], "nothing"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stderr == "no case's name holds 'nothing'\n"
    done = subprocess.run([*command, "--whole-model"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stderr == "--quick, --whole-model and --video: name one of them\n"
