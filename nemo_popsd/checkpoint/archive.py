"""`.nemo` archives: a checkpoint's directory packed as one tar file, and unpacked without trust."""

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
    """Packs `directory` without compression; the file, which may be in it and is left out, is on the disk when this
    returns.
    """
    itself = archive.name if archive.parent == directory else None
    with tarfile.open(archive, "w") as tar:
        tar.add(directory, arcname=".", filter=lambda member: None if member.name == f"./{itself}" else member)
    flush_file(archive)


def unpack(archive: Path, directory: Path) -> None:
    """Unpacks regular files and directories into `directory`; looks at every member before it writes the first.

    An archive is not compressed, so that what is written is no larger than what is read.

    Raises:
        UserError: no tar archive; or a member that leaves the directory, is a link or a device, has holes, or comes
            twice; or the system refuses to write one.
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
        raise _unusable(archive, f"no whole tar archive ({reason})") from None
    except (OSError, ValueError, OverflowError) as error:
        words = f"{error.strerror}: {error.filename!r}" if isinstance(error, OSError) else str(error)
        raise _unusable(archive, f"what cannot be unpacked into {directory} ({words})") from None


def _refused(member: tarfile.TarInfo, folders: Mapping[PurePosixPath, bool]) -> str | None:
    """Why `member` is not unpacked; `folders` says of each path before it whether it is a folder."""
    path = PurePosixPath(member.name)
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in path.parts):
        return "a name that is too long"
    if path.is_absolute() or ".." in path.parts:
        return "a path outside the archive's folder"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    if member.issparse():
        return "a file with holes"
    if not (member.isreg() or member.isdir()):
        return "neither a file nor a folder"
    if any(not folders.get(parent, True) for parent in path.parents):
        return "a path through a file"
    return "which comes twice" if path in folders else None


def _unusable(archive: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {archive}",
        got=got,
        need="a .nemo archive of plain files, as nemo_popsd writes it",
        fix="give another archive, or set TMPDIR to a directory with room",
    )
