"""Commands that are ended early, and given again: what they leave, and how they go on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from PIL import Image
from safetensors import SafetensorError, safe_open

ORACLES = Path(__file__).parents[1] / "oracles"
CHECKPOINT = ORACLES / "checkpoint-a"
MODULES = {"lance-parity": "parity.cli.main", "lance-mlx": "lance_mlx.cli.main"}
_DRAWING = ["--model", CHECKPOINT, "--width", 64, "--height", 64, "--steps", 4, "-Q"]
_BUNDLE = ORACLES / "t2i-fp32-nokv"
COMMANDS = {
    "generate": ["lance-mlx", "generate", "t2i", "--prompt", "a", "-o", "out/a.png", "--overwrite", *_DRAWING],
    "seeds": ["lance-mlx", "generate", "t2v", "--prompt", "a", "--seed", 1, 2, "-o", "out/a.mp4", "--num-frames", 9,
              "--overwrite", *_DRAWING],
    "requests": ["lance-mlx", "generate", "t2i", "--requests", "requests.json", "-o", "out", "--batch-size", 1,
                 *_DRAWING],
    "benchmark": ["lance-mlx", "benchmark", "geneval", "--prompts", "prompts.jsonl", "-o", "out", "--samples", 2,
                  "--batch-size", 1, *_DRAWING],
    "convert": ["lance-mlx", "convert", CHECKPOINT, "out/converted", "--variant", "image", "--shard-size", 0.001, "-Q"],
    "convert-vae": ["lance-mlx", "convert-vae", CHECKPOINT / "Wan2.2_VAE.pth", "out/vae.safetensors"],
    "serve": ["lance-mlx", "serve", "--model", CHECKPOINT, "--port"],
    "record": ["lance-parity", "record", "t2i", "--checkpoint", CHECKPOINT, "--out", "out/bird", "--prompt", "a",
               "--width", 64, "--height", 64, "--steps", 2, "--copy-checkpoint"],
    "localize": ["lance-parity", "localize", _BUNDLE, "--fault", "norm-eps-1e-5", "--report", "out/report", "--json",
                 "out/found.json"],
    "run": ["lance-parity", "run", _BUNDLE, "--report", "out/report", "--json", "out/rows.json"],
    "floors": ["lance-parity", "floors", "given/t2i-fp32-nokv"],
    "check": ["lance-parity", "check", _BUNDLE, "--impl", "mlx", "--dump", "out/dump", "--json", "out/result.json"],
}  # fmt: skip
_LONG = 3600.0
"""Seconds after which a command that is left alone is ended all the same; a machine may have other work."""
MEASURED: dict[str, float] = {}
"""Seconds that each command takes when it is left alone."""
DOCUMENTED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
_STATUSES = {"localize": (1,)}
_THERE_ALREADY = {
    "convert": ["lance-mlx", "info", "--model", "out/converted"],
    "record": ["lance-parity", "verify", "out/bird"],
    "convert-vae": [],
}
"""Commands that refuse what they have made, and what uses that."""


def killed(seed: int, folder: Path) -> tuple[str, str, str]:
    """Kill a command in a folder: which and how, how it ended, and what is wrong about that, nothing for nothing."""
    rng = Random(f"kill {seed}")
    name, number = rng.choice(list(COMMANDS)), rng.choice(list(DOCUMENTED))
    _prepare(folder)
    if name not in MEASURED:
        beside = folder.with_name(f"{folder.name}.alone")
        beside.mkdir()
        _prepare(beside)
        started = time.monotonic()
        status, said = _run(name, beside, number, 8.0 if name == "serve" else _LONG)
        MEASURED[name] = time.monotonic() - started
        if name != "serve" and status not in _STATUSES.get(name, (0,)):
            return name, str(status), f"fails when it is left alone: {said[-300:]}"
    delay = rng.uniform(0, 0.3) if rng.random() < 0.3 else rng.uniform(0, MEASURED[name])
    what = f"{name} {number.name}"
    status, said = _run(name, folder, number, delay)
    found = [_wrong_end(name, number, status, said, folder)]
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.png")}
    for path in folder.rglob(".*"):
        # Nothing is taken for abandoned that was made a moment ago.
        os.utime(path, (time.time() - 120,) * 2, follow_symlinks=False)
    if name != "serve":
        again, said = _run(name, folder, number, _LONG)
        refused = again == 2 and name in _THERE_ALREADY and any(folder.glob("out/*"))
        if again not in _STATUSES.get(name, (0,)) and not refused:
            found.append(f"given again: {again}, {said[-300:]}")
        made_again = [path for path, time in before.items() if path.exists() and path.stat().st_mtime_ns != time]
        if made_again and name in ("requests", "benchmark"):
            found.append(f"made again: {made_again}")
        if hidden := [path.name for path in folder.rglob(".*") if path.name != ".written-by-lance-parity"]:
            found.append(f"still there after that: {hidden[:3]}")
        found += _broken(folder)
        if use := _THERE_ALREADY.get(name):
            found += [f"{use[1]}: {told[-200:]}" for status, told in [_run(use, folder, number, _LONG)] if status]
    return f"{what} after {delay:.2f} s", str(status), "; ".join(filter(None, found))


def _prepare(folder: Path) -> None:
    (folder / "requests.json").write_text(json.dumps({f"000{i}.png": f"a {i}" for i in range(4)}))
    entries = ({"tag": "a", "include": [], "prompt": f"a {i}"} for i in range(3))
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    shutil.copytree(_BUNDLE, folder / "given" / _BUNDLE.name)
    (folder / "given" / CHECKPOINT.name).symlink_to(CHECKPOINT)


def _run(name: str | list, folder: Path, number: signal.Signals, seconds: float) -> tuple[int, str]:
    """Run a command and send it a signal after so long, from its first import on; returns status and outputs."""
    command = COMMANDS[name] if isinstance(name, str) else name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = [*command, free.getsockname()[1]] if name == "serve" else command
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    script = f"import os, lance_command; os.close({writing}); lance_command.{command[0].replace('-', '_')}()"
    with (folder / "said").open("wb+") as said:
        running = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, command[1:])], cwd=folder, stdout=said, stderr=said,
            pass_fds=[writing], start_new_session=True, env=os.environ | {"TMPDIR": str(temporary)},
        )  # fmt: skip
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        try:
            status = running.wait(seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(number)
            try:
                status = running.wait(300)
            except subprocess.TimeoutExpired:
                status = None
        deadline = time.monotonic() + 10
        while orphans := [pid for pid in filter(str.isdecimal, os.listdir("/proc")) if _is_of(pid, running.pid)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for pid in orphans:
            os.kill(int(pid), signal.SIGKILL)
        said.seek(0)
        text = said.read().decode(errors="replace")
    (folder / "said").unlink()
    return status, text + ("\nprocesses are left: " + " ".join(orphans) if orphans else "")


def _is_of(pid: str, session: int) -> bool:
    try:
        state, *_, of, _ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:5]
        return int(of) == session and state != "Z"
    except OSError:
        return False


def _wrong_end(name: str, number: signal.Signals, status: int | None, said: str, folder: Path) -> str:
    tests = {
        "does not end": status is None,
        # A process that is done already ends by the signal itself, which a shell gives the same status.
        f"status {status}": status not in (DOCUMENTED[number], -number, *_STATUSES.get(name, (0,))),
        **{f"{mark}: {said[said.find(mark) :][:600]!r}": mark in said for mark in ("Traceback", "Exception ignored")},
        f"{len(said.splitlines())} lines": status == DOCUMENTED[number] and len(said.splitlines()) > 4,
        said[said.find("processes are left") :]: "processes are left" in said,
    }
    if number is not signal.SIGKILL:
        temporary = folder.with_name(f"{folder.name}.tmp")
        hidden = [path.name for path in folder.rglob(".*") if path.name != ".written-by-lance-parity"]
        tests |= {f"leaves {hidden[:3]}": hidden, f"TMPDIR {os.listdir(temporary)[:3]}": os.listdir(temporary)}
    return ", ".join([what for what, holds in tests.items() if holds] + _broken(folder))


def _broken(folder: Path) -> list[str]:
    """The visible files that are not whole."""
    found = []
    for path in (path for place in ("out", "given") for path in (folder / place).rglob("*")):
        try:
            if path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                safe_open(path, "numpy").__exit__(None, None, None)
            elif path.suffix == ".html" and "</html>" not in path.read_text()[-20:]:
                raise ValueError("no end")
        except (OSError, ValueError, SafetensorError) as error:
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                found.append(f"{path.relative_to(folder)} is not whole: {error}")
    return found
