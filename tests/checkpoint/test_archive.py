"""`.nemo` archives: packing, and members that would write outside the directory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_popsd.checkpoint.archive import pack, unpack
from nemo_popsd.errors import UserError


def _file(name: str) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))

    return add


def _special(name: str, type_: bytes, target: str = "") -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = type_, target
        tar.addfile(member)

    return add


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([_file("../evil")], "'../evil', a path outside the archive's folder"),
        ([_file("weights/../../evil")], "a path outside"),
        ([_file("/tmp/evil")], "a path outside"),
        ([_special("weights", tarfile.SYMTYPE, "/etc")], "'weights', a link to '/etc'"),
        ([_special("a", tarfile.SYMTYPE, "."), _file("a/evil")], "a link to"),
        ([_special("passwd", tarfile.LNKTYPE, "/etc/passwd")], "a link to '/etc/passwd'"),
        ([_special("null", tarfile.CHRTYPE)], "neither a file nor a folder"),
        ([_special("disk", tarfile.BLKTYPE)], "neither a file nor a folder"),
        ([_special("pipe", tarfile.FIFOTYPE)], "neither a file nor a folder"),
        ([_file("manifest.json"), _file("./manifest.json")], "occurs twice"),
        ([_file("é" * 200)], "a name that is too long"),
        ([_file("a"), _file("a/b")], "'a/b', a path through a file"),
    ],
)
def test_hostile_members_are_refused_and_nothing_is_written(
    tmp_path: Path, members: list[Callable[[tarfile.TarFile], None]], message: str
) -> None:
    archive, inside = tmp_path / "a.nemo", tmp_path / "outer" / "inner"
    inside.mkdir(parents=True)
    with tarfile.open(archive, "w") as tar:
        _file("first")(tar)
        for add in members:
            add(tar)
    with pytest.raises(UserError, match=message) as refused:
        unpack(archive, inside)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "outer").rglob("*")) == [inside]


def test_a_packed_directory_is_unpacked_unchanged(tmp_path: Path) -> None:
    (tmp_path / "in" / "weights").mkdir(parents=True)
    (tmp_path / "in" / "weights" / ".metadata").write_bytes(b"\0\1")
    pack(tmp_path / "in", tmp_path / "a.nemo")
    unpack(tmp_path / "a.nemo", tmp_path / "out")
    assert (tmp_path / "out" / "weights" / ".metadata").read_bytes() == b"\0\1"


def test_archives_that_expand_when_unpacked_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "a.nemo"
    with tarfile.open(archive, "w:gz") as tar:
        _file("first")(tar)
    with pytest.raises(UserError, match="an incomplete or damaged tar archive"):
        unpack(archive, tmp_path)
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("sparse")
        member.size = 512
        member.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,1"}
        tar.addfile(member, io.BytesIO(b"x" * 512))
    with pytest.raises(UserError, match="'sparse', a sparse file"):
        unpack(archive, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b garbage", b"garbage" * 200])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nemo").write_bytes(content)
    with pytest.raises(UserError, match=r"is empty|damaged tar archive"):
        unpack(tmp_path / "a.nemo", tmp_path)
