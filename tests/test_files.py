import errno
import os
from pathlib import Path

import pytest

from ssd.files import atomic_file, free_path, make_folder, new_run_folder, run_folder


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


def test_what_is_there_has_its_name_a_dangling_link_too(tmp_path):
    assert free_path(tmp_path / "a.json") == tmp_path / "a.json"
    (tmp_path / "a.json").touch()
    (tmp_path / "a-2.json").symlink_to(tmp_path / "gone")
    assert free_path(tmp_path / "a.json") == tmp_path / "a-3.json"


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
