import os

import pytest

from ssd.files import atomic_file, free_path, new_run_folder


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
