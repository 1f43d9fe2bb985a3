"""Which files lie below a folder, and how a name that is no UTF-8 is written: for `convmixer classify` and for jobs on Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator


def find_files(folder: str, on_error: Callable[[OSError], None]) -> Iterator[str]:
    """Everything below that is no folder, sorted within each, but for what is hidden: `._cat.png` is no picture, but macOS's.

    Links to folders are followed, and no folder is looked into twice: a link may lead back to where it lies. They come
    after all else, so that what a folder holds goes by the folder's own name if that is below, too.

    Args:
        folder: where to begin.
        on_error: gets what a folder that cannot be looked into gives; it may raise it.
    """
    seen: set[str] = set()
    roots = [folder]
    for root in roots:  # grows by the links on the way
        for parent, folders, files in os.walk(root, onerror=on_error):
            real = os.path.realpath(parent)  # and not its inode: file systems in user space may make that up
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = (os.path.join(parent, name) for name in folders)  # noqa: PTH118 (`root` comes back as it was given)
            roots += filter(os.path.islink, below)
            yield from (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))  # noqa: PTH118


def printable(path: str) -> str:
    r"""A path with `\xe9` for each byte that is no UTF-8, which text that others read must not have.

    Args:
        path: as Python has it, with lone surrogates for such bytes.
    """
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
