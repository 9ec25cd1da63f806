"""Files are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from splitfrozen.disk import explained, write_whole
from splitfrozen.errors import DiskFullError, StoreError


def test_a_reader_keeps_the_old_file_until_it_opens_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    with path.open("rb") as reader:
        write_whole(path, b"newer", mode=0o600)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_its_check_gets_no_name(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    write_whole(path, b"good")
    seen = []

    def check(draft: Path) -> None:
        seen.append((draft.suffix, draft.parent, draft.read_bytes()))
        raise ValueError("not good")

    with pytest.raises(ValueError, match="not good"):
        write_whole(path, b"bad", check=check)
    assert seen == [(".onnx", tmp_path, b"bad")]
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"a\.json cannot be used.*No such file"):
        write_whole(tmp_path / "none" / "a.json", b"")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_has_its_own_error(code: int) -> None:
    with pytest.raises(DiskFullError, match="no space is left for x"), explained(Path("x")):
        raise OSError(code, "full")


def test_other_trouble_is_no_full_disk() -> None:
    with pytest.raises(StoreError) as caught, explained(Path("x")):
        raise OSError(errno.EACCES, "Permission denied")
    assert not isinstance(caught.value, DiskFullError)
    assert "Permission denied" in str(caught.value)
