"""`.nemo` archives: a checkpoint's directory packed as one tar file, and unpacked without trust."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from nemo_popsd.atomic import flush_file
from nemo_popsd.errors import UserError


def pack(directory: Path, archive: Path) -> None:
    """Packs `directory` without compression; the file, which may be in it and is left out, is on the disk when this
    returns.
    """
    itself = archive.name if archive.parent == directory else None
    with tarfile.open(archive, "w") as tar:
        tar.add(directory, arcname=".", filter=lambda member: None if member.name == f"./{itself}" else member)
    flush_file(archive)


def unpack(archive: Path, directory: Path) -> None:
    """Unpacks regular files and directories into `directory`; looks at every member before it writes the first.

    Raises:
        UserError: no tar archive; or a member that leaves the directory, is a link or a device, or comes twice.
    """
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            seen: set[PurePosixPath] = set()
            for member in members:
                if reason := _refused(member, seen):
                    raise _unusable(archive, f"{member.name!r}, {reason}")
                seen.add(PurePosixPath(member.name))
            tar.extractall(directory, members=members, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise _unusable(archive, f"no whole tar archive ({str(error).splitlines()[0].rstrip(':')})") from None


def _refused(member: tarfile.TarInfo, seen: set[PurePosixPath]) -> str | None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "a path outside the archive's folder"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    if not (member.isreg() or member.isdir()):
        return "neither a file nor a folder"
    return "which comes twice" if path in seen else None


def _unusable(archive: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {archive}",
        got=got,
        need="a .nemo archive of plain files, as nemo_popsd writes it",
        mend="give another archive; nothing was unpacked",
    )
