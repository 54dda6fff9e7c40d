"""Packs a checkpoint's directory as one tar file (`.nemo`), and unpacks archives that are not trusted."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import flush_file
from nemo_popsd.files.reading import unreadable

_NAME_BYTES = 255


def pack(directory: Path, archive: Path) -> None:
    """Packs `directory` without compression. The archive is flushed to the disk when this returns.

    Args:
        directory: directory to pack.
        archive: file to write. It may be inside `directory`; it is not added to itself.
    """
    itself = archive.name if archive.parent == directory else None
    with tarfile.open(archive, "w") as tar:
        tar.add(directory, arcname=".", filter=lambda member: None if member.name == f"./{itself}" else member)
    flush_file(archive)


def unpack(archive: Path, directory: Path) -> None:
    """Unpacks regular files and directories into `directory`. All members are checked before the first is written.

    Compressed archives are refused, so the unpacked files are never larger than the archive.

    Raises:
        UserError: the file is not a tar archive; a member leaves the directory, is a link, a device or a sparse file,
            or occurs twice; or the system refuses to write a member.
    """
    if reason := unreadable(archive):
        raise _unusable(archive, f"a file that {reason}")
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            folders: dict[PurePosixPath, bool] = {}
            for member in members:
                if reason := _refused(member, folders):
                    raise _unusable(archive, f"{member.name[:_NAME_BYTES]!r}, {reason}")
                folders[PurePosixPath(member.name)] = member.isdir()
            tar.extractall(directory, members=members, filter="data")
    except (tarfile.TarError, EOFError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(":")
        raise _unusable(archive, f"an incomplete or damaged tar archive ({reason})") from None
    except (OSError, ValueError, OverflowError) as error:
        reason = f"{error.strerror}: {error.filename!r}" if isinstance(error, OSError) else str(error)
        raise _unusable(archive, f"an archive that cannot be unpacked into {directory} ({reason})") from None


def _refused(member: tarfile.TarInfo, folders: Mapping[PurePosixPath, bool]) -> str | None:
    """The reason to refuse `member`, or None.

    Args:
        member: member to check.
        folders: for each path before it in the archive, whether the path is a folder.
    """
    path = PurePosixPath(member.name)
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in path.parts):
        return "a name that is too long"
    if path.is_absolute() or ".." in path.parts:
        return "a path outside the archive's folder"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    if member.issparse():
        return "a sparse file"
    if not (member.isreg() or member.isdir()):
        return "neither a file nor a folder"
    if any(not folders.get(parent, True) for parent in path.parents):
        return "a path through a file"
    return "which occurs twice" if path in folders else None


def _unusable(archive: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {archive}",
        got=got,
        need="a .nemo archive of plain files, as nemo_popsd writes it",
        fix="use another archive, or set TMPDIR to a directory with enough space",
    )
