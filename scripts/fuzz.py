"""Damages what the commands are given, and kills them, and holds how they end against what is promised.

    python scripts/fuzz.py {bundle,checkpoint,media,kill}... [--count N] [--seed S] [--keep DIR]

A case is its kind and its seed: the seeds from S on, N of each kind, are the same cases again, but for when a kill
comes. bundle gives lance-parity damaged bundles, checkpoint and media give lance-mlx damaged checkpoints, request
files, images and videos (fuzz_damage.py): each in a fork of this process, every 25th in one of its own. A command has
to end in time with a documented status, in a few plain lines that name what is bad, without a traceback, in bounded
memory, with what it was given unchanged and nothing left behind. What is killed (fuzz_kills.py) may leave nothing that
passes for whole, and has to go on from there when it is given again. Linux. Exit status: 0 when all cases do so, 1 when
one does not: its folder is kept where --keep names a place. Ctrl-C ends with the counts so far.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import fuzz_damage
import numpy as np
from fuzz_kills import CHECKPOINT, MODULES, ORACLES, killed
from safetensors.numpy import save_file

IMPORTED = """parity.comparison.check parity.comparison.compare parity.localize.investigation parity.lance.definition
    parity.report.localization_page parity.report.run_page parity.report.terminal_store parity.report.terminal_localize
    parity.report.formats parity.lance.stream.comparison parity.lance.stream.given parity.oracle.judgement
    parity.lance.sequence_layouts lance_mlx.cli.app""".split()
"""What commands import, once for all forks; nothing may compute before them."""
SECONDS, FRESH = 400, 25
MOST_RESIDENT, MOST_DATA = 2 << 30, 8 << 30
LINES, LETTERS = 6, 1000
"""Most that a refusal says."""
CACHE = "LANCE_PARITY_CACHE"


class Case(NamedTuple):
    """What is damaged and how, a command, the statuses it may end with, and what one of its lines has to name."""

    what: str
    command: list[object]
    names: tuple[str, ...]
    statuses: tuple[int, ...] = (0, 2)


class Ended(NamedTuple):
    """How a command ended: its status (negative for a signal, None for out of time), outputs, and peak in bytes."""

    status: int | None
    out: str
    err: str
    resident: int


def bundle_case(rng: random.Random, folder: Path) -> Case:
    """A damaged bundle for lance-parity."""
    if rng.random() < 0.03:
        shutil.copytree(ORACLES / "layouts", folder / "layouts")
        file = rng.choice(sorted((folder / "layouts").iterdir()))
        how = fuzz_damage.damage(rng, file)
        return Case(f"{file.name}: {how}", ["lance-parity", "layouts", "layouts"], (file.stem,), (0, 1, 2))
    name = rng.choice(["x2t_image-fp32-nokv", "t2i-fp32-nokv", "t2i-fp32-nokv", "image_edit-fp32-nokv", "t2i-fp32-kv"])
    shutil.copytree(ORACLES / name, folder / name)
    shutil.copytree(ORACLES / "media", folder / "media")
    (folder / "whole").symlink_to(ORACLES)
    files = [f"{name}/{file}" for file in ["manifest.json"] * 6 + ["taps.safetensors", "inputs.safetensors"] * 3]
    files += [f"{name}/floors.safetensors"] * 2
    if rng.random() < 0.2:
        shutil.copy(ORACLES / "MANIFEST.json", folder)
        files += ["MANIFEST.json"] * 3
    if "image" in name:
        files += ["media/photo.png"] * 2
    if rng.random() < 0.15:
        shutil.copytree(CHECKPOINT, folder / "checkpoint-a", ignore=shutil.ignore_patterns("Lance_3B_Video"))
        files = [str(path.relative_to(folder)) for path in (folder / "checkpoint-a").rglob("*") if path.is_file()]
    else:
        (folder / "checkpoint-a").symlink_to(CHECKPOINT)
    file = rng.choice(files)
    how = fuzz_damage.damage(rng, folder / file)
    other, impl = f"whole/{name}", rng.choice(["mlx", "reference"])
    commands = [
        (8, ["verify", rng.choice([name, "."])], (0, 1, 2)),
        (8, ["check", name, "--impl", impl, *rng.choice([[], ["--json", "out.json"], ["--output", "out.md"]])], (0, 2)),
        (3, ["oracles", rng.choice([name, "."])], (0, 2)),
        (2, ["compare", name, f"@{impl}"], (0, 2)),
        (3, ["compare", *rng.choice([(name, other), (other, name)]), "--within", "0.1"], (0, 1, 2)),
        (3, ["compare", f"{other}/taps.safetensors", f"{name}/taps.safetensors", "--output", "out.csv"], (0, 1, 2)),
        (2, ["run", rng.choice([name, "."]), "--impl", impl, "--report", "out"], (0, 2)),
        (2, ["localize", name, "--report", "out", "--json", "out.json"], (0, 2)),
        (2, ["stream", "--against", "t2i-fp32-kv" if name == "t2i-fp32-kv" else name], (0, 2)),
    ]
    _, command, statuses = rng.choices(commands, [each[0] for each in commands])[0]
    return Case(f"{file}: {how}", ["lance-parity", *command], (name, *Path(file).parts, "streamed"), statuses)


def checkpoint_case(rng: random.Random, folder: Path) -> Case:
    """A damaged checkpoint, official or converted, or request file for lance-mlx."""
    files = ["Lance_3B/llm_config.json", "Lance_3B/model.safetensors", "Wan2.2_VAE.pth"] * 3
    files += [f"Lance_3B/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")]
    files += ["Qwen2.5-VL-ViT/config.json", "Qwen2.5-VL-ViT/vit.safetensors"]
    if rng.random() < 0.4:
        shutil.copytree(converted(), folder / "given")
        files = [path.name for path in (folder / "given").iterdir() if path.suffix in (".json", ".safetensors")]
    else:
        shutil.copytree(CHECKPOINT, folder / "given", ignore=shutil.ignore_patterns("Lance_3B_Video"))
    photo = ORACLES / "media" / "photo.png"
    edit = {"interleave_array": ["blue", str(photo), str(photo)], "element_dtype_array": ["text", "image", "image"],
            "istarget_in_interleave": [0, 0, 1]}  # fmt: skip
    (folder / "image_edit.json").write_text(json.dumps({"0001": edit, "0002": edit}))
    suffix = rng.choice([".npy", ".safetensors"])
    np.save(folder / "noise.npy", np.zeros((4, 48), np.float32))
    save_file({"noise": np.zeros((4, 48), np.float32)}, folder / "noise.safetensors")
    drawing = ["--model", "given", "--steps", 1, "-Q", "-o", "out"]
    small, seeing = ["--width", 32, "--height", 32], ["--vae-resolution", 64, "--vit-resolution", 56]
    command = rng.choice([
        ["info", "--model", "given"], ["info", "--model", "given", "--task", "t2i"],
        ["generate", "t2i", "--prompt", "a", *drawing[:-1], "out.png", *small],
        ["generate", "t2i", "--prompt", "a", *drawing[:-1], "out.png", *small, "--noise", f"noise{suffix}"],
        ["generate", "x2t_image", "--image", photo, *drawing[:2], "-Q", "--max-tokens", 2, "--vit-resolution", 56],
        ["generate", "--requests", "image_edit.json", *drawing, *seeing],
        ["convert", "given", "out", "-Q"], ["convert-vae", "given/Wan2.2_VAE.pth", "out.safetensors"],
    ])  # fmt: skip
    file = f"given/{'Wan2.2_VAE.pth' if command[0] == 'convert-vae' else rng.choice(files)}"
    file = "image_edit.json" if "--requests" in command and rng.random() < 0.7 else file
    file = command[-1] if "--noise" in command else file
    how = fuzz_damage.damage(rng, folder / file) if (folder / file).exists() else "absent"
    return Case(f"{file}: {how}", ["lance-mlx", *command], ("given", Path(file).stem))


def converted() -> Path:
    """A checkpoint in several files, made once."""
    folder = Path(os.environ[CACHE]) / "converted"
    if not folder.exists():
        options = ["-Q", "--variant", "image", "--shard-size", "0.001"]
        ended = run(["lance-mlx", "convert", CHECKPOINT, folder, *options], folder.parent, True)
        assert ended.status == 0, ended
    return folder


def media_case(rng: random.Random, folder: Path) -> Case:
    """An odd or damaged image or video for lance-mlx."""
    make, is_image = rng.choice([(fuzz_damage.any_image, True), (fuzz_damage.any_video, False)])
    if rng.random() < 0.1:
        path, how = fuzz_damage.any_notes(rng, folder / "given") if rng.random() < 0.7 else make(rng, folder / "given")
        command = ["generate", "--model", CHECKPOINT, "--config-from", path.name, "-o", f"out{path.suffix}", "-Q"]
        return Case(f"notes of {path.suffix} {how}", ["lance-mlx", *command], ("given", "out"))
    path, how = make(rng, folder / "given")
    is_image ^= rng.random() < 0.1
    task = rng.choice(["image_edit", "i2v", "x2t_image", "subject"] if is_image else ["x2t_video", "video_edit"])
    command = ["generate", task, "--model", CHECKPOINT, "--image" if is_image else "--video", path.name, "-Q"]
    command += ["--question", "a", "--max-tokens", 1] if task.startswith("x2t") else ["--prompt", "a", "--steps", 1]
    command += [] if task.startswith("x2t") else ["-o", f"out{rng.choice(['.png', '.mp4'])}"]
    command += ["--width", 32, "--height", 32] if task == "subject" else []
    command += ["--num-frames", 5] if task == "i2v" else []
    sizes = ["--vit-resolution", 56] + (["--vae-resolution", 64] if not task.startswith("x2t") else [])
    return Case(f"{path.suffix} {how}", ["lance-mlx", *command, *sizes], ("given", "out"))


def run(command: list[object], folder: Path, fresh: bool) -> Ended:
    """Run a command in a folder, in a fork or in a process of its own, with TMPDIR beside that."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)
    files = [folder.with_name(f"{folder.name}.{stream}") for stream in ("out", "err")]
    module, given, entry = MODULES[command[0]], list(map(str, command)), command[0].replace("-", "_")
    pid = os.fork()
    if not pid:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        os.setsid()
        os.environ["TMPDIR"], tempfile.tempdir, sys.argv = str(temporary), str(temporary), given
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_DATA, MOST_DATA))
        if fresh:
            script = f"import lance_command; lance_command.{entry}()"
            os.execv(sys.executable, [sys.executable, "-c", script, *given[1:]])
        status = 0
        try:
            import_module(module).main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else ended.code is not None
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    deadline, done = time.monotonic() + SECONDS, 0
    while not done and time.monotonic() < deadline:
        done, status, used = os.wait4(pid, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.killpg(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
    out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Ended(os.waitstatus_to_exitcode(status) if done else None, out, err, used.ru_maxrss * 1024)


def seen(folder: Path) -> dict[str, tuple[int, ...]]:
    """What lies in a folder."""
    kept = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            state = os.lstat(os.path.join(place, name))
            is_folder = name in folders and not os.path.islink(os.path.join(place, name))
            kept[os.path.relpath(os.path.join(place, name), folder)] = (
                (state.st_mode,) if is_folder else (state.st_mode, state.st_size, state.st_mtime_ns)
            )
    return kept


def wrong(case: Case, ended: Ended, before: dict, after: dict, temporary: Path) -> str:
    """What of an end is not as promised, in a few words; nothing where all is."""
    said = ended.out + ended.err
    lines = ended.err.splitlines()
    changed = [name for name in before if after.get(name) != before[name]]
    new = [name for name in after if name not in before]
    mine = case.command[0] == "lance-parity"
    left = [name for name in new if not name.startswith("out") or (ended.status == 2 and not mine)]
    plain = all(unicodedata.category(letter) != "Cc" for letter in said if letter not in "\n\t\r")
    if ended.status is None:
        return "hangs"
    if "Traceback" in said or "should not happen" in said:
        return "traceback: " + " ".join(lines[-2:])[:200]
    told = ended.status != 2 or any(name in said for name in case.names)
    tests = {
        f"status {ended.status}": ended.status not in case.statuses,
        f"{ended.resident >> 20} MB": ended.resident > MOST_RESIDENT,
        f"changes {changed[:1]}": changed,
        f"leaves {left[:3]}": left,
        f"leaves {os.listdir(temporary)[:1]} in TMPDIR": os.listdir(temporary),
        "a control character": not plain,
        "says nothing": ended.status == 2 and not said.strip(),
        f"{len(lines)} lines on stderr": len(lines) > LINES or any(len(line) > LETTERS for line in lines),
        "names nothing": not told,
        "noise on stderr": any(not line.startswith(case.command[0]) for line in lines) and not mine,
    }
    return ", ".join(name for name, holds in tests.items() if holds)


def damaged(kind: str, seed: int, folder: Path) -> tuple[str, str, str]:
    """Run a case: what it is, how it ended, and what is wrong about that."""
    case = CASES[kind](random.Random(f"{kind} {seed}"), folder)
    before = seen(folder)
    ended = run(case.command, folder, seed % FRESH == FRESH - 1)
    found = wrong(case, ended, before, seen(folder), folder.with_name(f"{folder.name}.tmp"))
    return f"{case.command[1]} {case.what}", str(ended.status), found


CASES = {"bundle": bundle_case, "checkpoint": checkpoint_case, "media": media_case}


def main() -> None:
    """Run the cases and print how many of each command ended how; exits with 1 when one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="+", choices=[*CASES, "kill"])
    parser.add_argument("--count", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--keep", type=Path, help="folder for the cases that are wrong")
    asked = parser.parse_args()
    if asked.keep:
        asked.keep.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell runs in the background ignores
    counts: Counter[tuple[str, str, str]] = Counter()
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        os.environ[CACHE] = f"{root}/cache"
        Path(root, "cache").mkdir()
        for module in [*MODULES.values(), *IMPORTED]:
            import_module(module)
        for kind, seed in ((kind, asked.seed + index) for kind in asked.kinds for index in range(asked.count)):
            folder = Path(root, f"{kind}-{seed}")
            folder.mkdir()
            what, status, found = killed(seed, folder) if kind == "kill" else damaged(kind, seed, folder)
            counts[kind, what.split()[0], "wrong" if found else status] += 1
            if found:
                print(f"{kind} {seed}: {what}: {found}", flush=True)
                if asked.keep:
                    # cp, since a copy in Python would wait for the pipes.
                    subprocess.run(["cp", "-a", *Path(root).glob(f"{folder.name}*"), asked.keep], check=True)
            for path in Path(root).glob(f"{folder.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for (kind, name, outcome), count in sorted(counts.items()):
        print(f"{kind:12}{name:14}{outcome:>6}{count:6}")
    sys.exit(any(outcome == "wrong" for *_, outcome in counts))


if __name__ == "__main__":
    main()
