"""Keeps the contents of a call's attachments until all its messages are known to be good.

Each content once, in a private file, so that memory stays flat. Files are opened part by part
from the root on, never through a link: what lies outside cannot be named.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePath, PureWindowsPath
from typing import IO, Any

from worker.checks import Refused, check_size, line
from worker.model import PART, Attachment, Part, parts_of

#: So many contents last seen are known again without being read again.
_REMEMBERED = 16
_BLOCK = 1024 * 1024


class Keeper:
    """The contents of one call. `file`: an empty, private, binary file; `root`: None for none."""

    def __init__(self, file: Any, root: Path | None) -> None:
        self._file = file
        self._root = root.absolute() if root else None
        self._end = 0
        self._kept: dict[str, tuple[int, int]] = {}  # SHA-256 → where it begins, size
        self._needed: dict[str, None] = {}
        self._seen: OrderedDict[Any, tuple[Any, str, int]] = OrderedDict()

    def take(self, attachment: Attachment) -> tuple[str, int]:
        """SHA-256 and size of the content, which is kept from now on. Raises Refused."""
        if attachment.path is not None:
            return self._take_file(attachment.path)
        content: Any = attachment.content
        try:
            view = memoryview(content).cast("B")
        except (TypeError, ValueError):  # no buffer; or one that was released
            detail = f"expected bytes, got {type(content).__name__}"
            raise Refused("TYPE", detail) from None
        check_size(len(view))
        known = self._seen.get(id(content))
        # Only bytes cannot have changed since.
        if known is not None and known[0] is content and isinstance(content, bytes):
            return known[1], known[2]
        sha256 = hashlib.sha256(view).hexdigest()
        if sha256 not in self._kept:
            self._append(view)
            self._keep(sha256, len(view))
        self._remember(id(content), content, sha256, len(view))
        return sha256, len(view)

    def need(self, sha256: str) -> None:
        """An accepted message refers to this content."""
        self._needed[sha256] = None

    def parts(self) -> Iterator[Part]:
        """Every part of every content that is needed."""
        for sha256 in self._needed:
            begin, size = self._kept[sha256]
            for number in range(parts_of(size)):
                at = number * PART
                self._file.seek(begin + at)
                yield Part(sha256, size, number, self._file.read(min(PART, size - at)))

    def _take_file(self, path: Any) -> tuple[str, int]:
        with os.fdopen(_open_below(self._root, path), "rb") as file:
            about = os.fstat(file.fileno())
            check_size(about.st_size)
            mark = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
            if (known := self._seen.get(mark)) is not None:
                return known[1], known[2]
            sha256, size = self._copy(file)
        self._remember(mark, None, sha256, size)
        return sha256, size

    def _copy(self, file: IO[bytes]) -> tuple[str, int]:
        """As it is now; what becomes of the file afterwards changes nothing."""
        digest, size = hashlib.sha256(), 0
        begin = self._end
        try:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
                check_size(size)
                self._append(block)
            check_size(size)
        except BaseException:
            self._end = begin
            raise
        sha256 = digest.hexdigest()
        if sha256 in self._kept:
            self._end = begin
        else:
            self._keep(sha256, size)
        return sha256, size

    def _append(self, block: Any) -> None:
        self._file.seek(self._end)
        self._file.write(block)
        self._end += len(block)

    def _keep(self, sha256: str, size: int) -> None:
        self._kept[sha256] = (self._end - size, size)

    def _remember(self, key: Any, what: Any, sha256: str, size: int) -> None:
        self._seen[key] = (what, sha256, size)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)


def _open_below(root: Path | None, path: Any) -> int:
    """A descriptor of the regular file `path` below `root`. Raises Refused."""
    if root is None:
        raise Refused("ATT_ROOT", "set POSTROOM_ATTACHMENT_ROOT to send files by their path")
    steps = _steps(root, path)
    try:
        opened = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        detail = f"POSTROOM_ATTACHMENT_ROOT cannot be opened ({_name(error)})"
        raise Refused("ATT_ROOT", detail) from None
    for number, step in enumerate(steps, start=1):
        # A pipe that nobody writes must not hold us up.
        kind = os.O_NONBLOCK if number == len(steps) else os.O_DIRECTORY
        try:
            inner = os.open(step, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | kind, dir_fd=opened)
        except OSError as error:
            raise _refusal(error, root.joinpath(*steps[:number])) from None
        finally:
            os.close(opened)
        opened = inner
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise Refused("ATT_MISSING", "is not a regular file")
    return opened


def _steps(root: Path, path: Any) -> tuple[str, ...]:
    """The names from the root to the file. Raises Refused where they lead out of it."""
    if not isinstance(path, str | PurePath):
        raise Refused("TYPE", f"expected a path, got {type(path).__name__}")
    text = line(str(path), 4096, "ATT_PATH", "path")
    if "://" in text or text.startswith(("http:/", "https:/", "file:/")):
        raise Refused("ATT_SSRF", "nothing is fetched from a URL; give content= or a path")
    given = PurePath(path)
    if not given.is_absolute() and PureWindowsPath(text).anchor:
        raise Refused("ATT_PATH", "give a path below POSTROOM_ATTACHMENT_ROOT")
    if given.is_absolute():
        try:
            given = given.relative_to(root)
        except ValueError:
            raise Refused("ATT_PATH", "lies outside POSTROOM_ATTACHMENT_ROOT") from None
    if ".." in given.parts or not given.parts:
        raise Refused("ATT_PATH", "give a path below POSTROOM_ATTACHMENT_ROOT, without ..")
    return given.parts


def _refusal(error: OSError, where: Path) -> Refused:
    # A link in place of a directory is refused as "no directory".
    if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and where.is_symlink()):
        return Refused("ATT_LINK", "links are not followed")
    return Refused("ATT_MISSING", f"cannot be opened ({_name(error)})")


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "error")
