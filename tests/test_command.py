"""What a signal does to both commands, also before they have begun and where nobody can catch an exception; and how
the documentation gives them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lance_command import Interrupts

ROOT = Path(__file__).parents[1]
ENDS = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)


@ENDS
@pytest.mark.parametrize(
    ("command", "library"), [("lance_mlx", "ctypes"), ("lance_mlx", "tqdm"), ("lance_parity", "typer")]
)
def test_a_signal_while_libraries_are_imported_is_one_line(tmp_path, command, library, number, status):
    script = f"print('on', flush=True)\nimport lance_command\nlance_command.{command}()"
    # A library that takes its time.
    Path(tmp_path / f"{library}.py").write_text("import time\nprint('in', flush=True)\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    running = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while "in" not in running.stdout.readline():
        assert running.poll() is None
    time.sleep(0.2)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    line = f"{command.replace('_', '-')}: interrupted, nothing written\n"
    assert (running.returncode, errors) == (status, line)


@ENDS
def test_an_interrupt_that_a_finalizer_keeps_to_itself_comes_again(capsys, number, status):
    class Kept:
        def __del__(self):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number), signal.getsignal(signal.SIGALRM), sys.unraisablehook
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            Kept()
            time.sleep(60)
        assert interrupts.status == status
    assert before == (signal.getsignal(number), signal.getsignal(signal.SIGALRM), sys.unraisablehook)
    assert capsys.readouterr().err == ""


def test_beginning_imports_nothing_else():
    script = "import sys; before = set(sys.modules); import lance_command; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert tops - set(sys.stdlib_module_names) == {"lance_command"}


def test_commands_of_the_documentation_end_in_no_comment():
    """Which zsh, a Mac's shell, takes for arguments where it is typed."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    command = re.compile(r"^    (\$ )?(lance-|make |pip |python|mlx\.launch).* # ", re.MULTILINE)
    assert [found[0] for page in pages for found in command.finditer(page.read_text(encoding="utf-8"))] == []
