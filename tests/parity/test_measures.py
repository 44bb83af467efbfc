"""A slice of what the scripts measure of the verdict itself, on any machine."""

import subprocess
import sys
from pathlib import Path

from parity.oracle.machines import settings

ROOT = Path(__file__).parents[2]


def measure(script, output, *arguments):
    output.write_text(f"<!-- {script}: begin -->\n<!-- {script}: end -->\n")
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", *arguments, "--output", output]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


def test_right_code_is_not_called_wrong_under_the_settings_of_other_processors(tmp_path):
    chosen = next(iter(settings()), None)
    options = ("--settings", chosen) if chosen else ()
    done = measure("false_alarms", tmp_path / "table.md", "oracles/t2i-fp32-nokv", *options)
    assert done.returncode == 0, done.stderr
    assert "0 called wrong" in (tmp_path / "table.md").read_text() and "16 clean runs" in done.stdout or not chosen


def test_an_error_of_ten_floors_is_found_and_under_bfloat16_of_three(tmp_path):
    done = measure("sharpness", tmp_path / "table.md", "oracles/t2i-fp32-nokv", "oracles/t2v-bf16-kv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missed" not in done.stdout and "| localize | bfloat16 |" in (tmp_path / "table.md").read_text()
