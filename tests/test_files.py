import errno
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from ssd import files
from ssd.files import (
    atomic_file,
    clear_leftovers,
    draft,
    make_folder,
    new_run_folder,
    replace_together,
    run_folder,
    take_new,
    temporary_folder,
    write_file,
    write_free,
    write_new,
)


def test_a_file_that_is_being_written_does_not_show(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"after")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
    with atomic_file(path) as file:
        file.write(b"after")
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(new_run_folder("detect")) for _ in range(2)] == ["runs/detect-1", "runs/detect-2"]
    assert str(new_run_folder("train")) == "runs/train-1"
    assert all((tmp_path / "runs" / name).is_dir() for name in ("detect-1", "detect-2", "train-1"))


def test_what_is_in_the_way_of_a_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.symlink_to("/nowhere/runs")
    with pytest.raises(OSError, match=r"folder runs: runs is a link to /nowhere/runs, .*with --output$"):
        new_run_folder("detect")
    with pytest.raises(OSError, match=r"folder runs/a/b: runs is a link"):
        make_folder(tmp_path.joinpath("runs", "a", "b").relative_to(tmp_path))
    runs.unlink()
    runs.touch()
    for path in (runs, runs / "a" / "b"):
        with pytest.raises(OSError, match=r"/runs is a file; mend that"):
            make_folder(path)
    runs.unlink()
    (tmp_path / "disk").mkdir()
    runs.symlink_to(tmp_path / "disk")
    assert str(new_run_folder("detect")) == "runs/detect-1"
    assert os.listdir(tmp_path / "disk") == ["detect-1"]
    with pytest.raises(OSError, match="cannot write to the folder a.b: embedded null"):
        make_folder(Path("a\0b"))


def test_a_folder_in_which_nothing_can_be_written_is_told(tmp_path, monkeypatch):
    def read_only(dir):  # which means nothing to root
        raise OSError(errno.EROFS, "Read-only file system", dir)

    monkeypatch.setattr("ssd.files.tempfile.TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"out: Read-only file system; mend that, or choose .* --output"):
        make_folder(tmp_path / "out")


@pytest.mark.parametrize("output", [None, Path("some/where")])
def test_the_folder_of_a_command_goes_if_nothing_is_written(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), run_folder(output, "detect") as folder:
        assert folder.is_dir()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), run_folder(output, "detect") as folder:
        (folder / "file").touch()
        raise KeyboardInterrupt
    assert (folder / "file").exists()
    with run_folder(output, "detect") as again:
        pass
    assert again.is_dir()
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "mine", "detect"):
        raise KeyboardInterrupt
    assert (tmp_path / "mine").is_dir()


def test_nothing_writes_past_what_sees_a_full_disk(tmp_path):
    """As Pillow's encoders would, which take a file's descriptor and do not look at what was written."""
    with atomic_file(tmp_path / "a.jpg") as file:
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        Image.effect_noise((300, 300), 90).save(file, "JPEG")
    with Image.open(tmp_path / "a.jpg") as picture:
        picture.load()


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, content: write(descriptor, content[:1000]))
    content = os.urandom(100_001)
    write_file(tmp_path / "a", content)
    write_new({tmp_path / "b": content})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == content


def test_an_error_names_the_file_and_what_became_of_it(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    write_file(tmp_path / "a", b"earlier")
    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error in writing a; the earlier one is whole") as error:
        write_file(tmp_path / "a", b"new")
    assert error.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="in writing b; nothing is left of it"):
        write_file(tmp_path / "b", b"new")
    assert os.listdir(tmp_path) == ["a"]


# --- Names that nothing has ---


def test_files_that_belong_together_are_new_or_not_there(tmp_path):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(FileExistsError, match="b exists already; nothing was overwritten"):
        write_new({tmp_path / "a": b"1", tmp_path / "b": b"2", tmp_path / "sub" / "c": b"3"})
    assert os.listdir(tmp_path) == ["b"]
    (tmp_path / "a-3").symlink_to("gone")  # what is there has its name, a dangling link too
    paths = write_free({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert paths == [tmp_path / "a-2", tmp_path / "b-2"]
    assert write_free({tmp_path / "a": b"1", tmp_path / "b": b"2"}) == [tmp_path / "a-4", tmp_path / "b-4"]
    assert (tmp_path / "b").read_text() == "mine"


@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_at_once_each_has_a_name_of_its_own(tmp_path, monkeypatch, has_links):
    """All find the same names free, before the first one takes them."""
    together = threading.Barrier(8)
    taken, seen = [], threading.local()
    there = os.path.lexists

    def wait(path):
        found = there(path)
        if Path(path).name == "a.json" and not getattr(seen, "it", False):
            seen.it = True
            together.wait(60)
        return found

    def no_links(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os.path, "lexists", wait)
    if not has_links:
        monkeypatch.setattr(files.os, "link", no_links)

    def write(number):
        content = str(number).encode() * 1000
        paths = write_free({tmp_path / "a.json": content, tmp_path / "a.jpg": content})
        taken.append((paths, content))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 8
    assert len({path for paths, _ in taken for path in paths}) == 16
    for paths, content in taken:
        assert {path.stem for path in paths} == {paths[0].stem}
        assert [path.read_bytes() for path in paths] == [content] * 2
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for paths, _ in taken for path in paths)


def test_folders_are_taken_as_files_are(tmp_path):
    for name in ("made", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "made.json").touch()
    moves = [(tmp_path / "made.json", tmp_path / "there.json"), (tmp_path / "made", tmp_path / "there")]
    with pytest.raises(FileExistsError, match="there exists already"):
        take_new(moves)
    assert not (tmp_path / "there.json").exists()
    assert (tmp_path / "there" / "file").read_text() == "there"


def test_files_take_the_place_of_others_together(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    for folder in ("new", "old"):
        for name in "ab":
            (tmp_path / folder / name).write_text(folder)
    replace, seen = os.replace, []

    def fails_last(source, target):
        if len(seen) == 3:
            seen.append("failed")
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)
        if "failed" not in seen:
            seen.append({path.name: path.read_text() for path in (tmp_path / "old").iterdir()})

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fails_last)
        with pytest.raises(OSError, match="Input/output"):
            replace_together(tmp_path / "new", tmp_path / "old", ["a", "b"])
    # Killed in between, it would leave no mixture that can be taken for a whole.
    assert seen[:3] == [{"b": "old"}, {}, {"b": "new"}]
    assert {path.read_text() for path in (tmp_path / "old").iterdir()} == {"old"}
    (tmp_path / "new" / "earlier").rmdir()
    replace_together(tmp_path / "new", tmp_path / "old", ["a", "b"])
    assert {path.read_text() for path in (tmp_path / "old").iterdir()} == {"new"}


# --- What killed processes leave ---

WRITING = """
import sys
from ssd.files import atomic_file, temporary_folder
from pathlib import Path
with atomic_file(sys.argv[1] + "/state.pt") as file, temporary_folder(Path(sys.argv[1], "model")) as folder:
    file.write(b"half" * 100_000)
    (folder / "part").write_bytes(b"half")
    print("there", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing state.pt and model."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITING, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "there\n"
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="there, only files of dead processes can be told")
def test_what_a_killed_process_left_goes_when_its_place_is_written(tmp_path, writer):
    (tmp_path / "state.pt.deadbeef.tmp").write_text("of an earlier version")
    for name in ("notes.deadbeef.tmp", "state.pt.tmp", "state.pt.deadbeef.part"):
        (tmp_path / name).write_text("another's")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(os.listdir(tmp_path)) == 6
    write_file(tmp_path / "state.pt", b"new")
    with temporary_folder(tmp_path / "model") as folder:
        assert sorted(os.listdir(tmp_path)) == sorted(
            ["notes.deadbeef.tmp", "state.pt", "state.pt.deadbeef.part", "state.pt.tmp", folder.name]
        )
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["state.pt", "state.pt.deadbeef.part", "state.pt.tmp"]


def test_what_is_being_written_stays(tmp_path, writer):
    """By another process, and by this one."""
    before = set(os.listdir(tmp_path))
    with draft(tmp_path / "state.pt") as mine:
        write_file(tmp_path / "state.pt", b"new")
        clear_leftovers(tmp_path)
        assert set(os.listdir(tmp_path)) == before | {"state.pt", mine.path.name}
    writer.stdin.write("\n")
    writer.stdin.close()
    assert writer.wait(60) == 0
    assert (tmp_path / "state.pt").read_bytes() == b"half" * 100_000
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_where_there_are_no_locks_what_others_left_is_left(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / "a.deadbeef.tmp").touch()
    write_file(tmp_path / "a", b"new")
    assert sorted(os.listdir(tmp_path)) == ["a", "a.deadbeef.tmp"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_draft_that_was_taken_for_a_dead_ones_is_made_again(tmp_path, monkeypatch):
    """It has no lock yet when another process looks at it."""
    lock, removed = files._lock, []

    def after_another(descriptor, path):
        if not removed:
            removed.append(path)
            os.unlink(path)
        return lock(descriptor, path)

    monkeypatch.setattr(files, "_lock", after_another)
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(removed) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files here")
def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device or pipe, not a file to be replaced; nothing was written"):
        write_file(tmp_path / "pipe", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are others here")
@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_permissions_and_links_stay(tmp_path, mode):
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    real.parent.mkdir()
    real.write_bytes(b"old")
    real.chmod(mode)
    link.symlink_to(real)
    write_file(link, b"new")
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"new", mode)
    assert len(list(real.parent.iterdir())) == 1


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 255, "\u00e9" * 127):
        write_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        (tmp_path / name).unlink()
    assert write_free({tmp_path / ("y" * 251 + ".jpg"): b"new"}) == [tmp_path / ("y" * 251 + ".jpg")]
