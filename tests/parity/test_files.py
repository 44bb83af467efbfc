"""Files and folders that are being written, and what is left of those whose process was killed."""

import fcntl
import os

import pytest

from parity.errors import ParityError
from parity.files import folder_beside, replacing, write_atomically


def test_what_a_dead_process_left_goes_and_what_a_live_one_writes_stays(tmp_path):
    dead, live, young, other = (tmp_path / name for name in (
        ".lance-parity-dead.part", ".lance-parity-live.part", ".lance-parity-young.part", ".another.part"))  # fmt: skip
    dead.mkdir()
    (dead / "taps.safetensors").touch()
    for path in (live, young, other):
        path.touch()
    with live.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for path in (dead, live, other):
            os.utime(path, (0, 0))
        write_atomically(tmp_path / "a.json", b"{}")
        with folder_beside(tmp_path / "b") as folder:
            # Nobody takes this for abandoned, however old.
            os.utime(folder, (0, 0))
            write_atomically(tmp_path / "c.json", b"{}")
            assert folder.is_dir()
    kept = {live.name, young.name, other.name, "a.json", "c.json"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_fails_leaves_nothing_and_what_was_there(tmp_path, error):
    path = tmp_path / ("a" * 250 + ".json")
    path.write_text("before")
    with pytest.raises((KeyboardInterrupt, ParityError)), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
