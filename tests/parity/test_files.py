"""Files and folders that are being written, and what is left of those whose process was killed."""

import fcntl
import os

import pytest

from parity.errors import ParityError
from parity.files import check_place, folder_beside, replacing, write_atomically


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


def test_links_are_followed_and_streams_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    link, pipe, full = (tmp_path / name for name in ("link.json", "pipe", "full"))
    link.symlink_to("there/real.json")
    full.symlink_to("/dev/full")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, link, pipe):
        check_place(path)
        write_atomically(path, b"{}")
    assert link.is_symlink() and (tmp_path / "there" / "real.json").read_bytes() == b"{}"
    assert pipe.is_fifo() and os.read(reader, 10) == b"{}"
    os.close(reader)
    with pytest.raises(ParityError, match="full cannot be written: No space left on device"):
        write_atomically(full, b"{}")
    assert full.is_char_device()


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", "is a folder: name a file in it"), ("file/new/a.json", "file is not a folder: name another file")],
)
def test_a_place_that_takes_nothing_is_seen_before(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(ParityError, match=message):
        check_place(tmp_path / name)
    check_place(tmp_path / "new" / "folder" / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
