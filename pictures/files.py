"""Which files are taken for pictures, and what lies below folders: for training, `convmixer classify` and jobs on Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp"}
"""In lower case: of files in folders; one that is named may be called whatever."""


def walk(
    roots: Iterable[str], on_error: Callable[[OSError], None], seen: Iterable[str] = ()
) -> Iterator[tuple[str, list[str], list[str]]]:
    """What lies below folders, sorted within each, but for what is hidden: `._cat.png` is no picture, but macOS's.

    Links to folders are followed, and no folder is looked into twice: a link may lead back to where it lies. They come
    after all else, so that what a folder holds goes by the folder's own name if that is below, too.

    Args:
        roots: where to begin.
        on_error: gets what a folder that cannot be looked into gives; it may raise it.
        seen: real paths of folders not to be looked into.

    Yields:
        The root, or the link on the way, that a folder is below, and paths of the folders and of the files in that folder.
    """
    looked_into, waiting = set(seen), list(roots)
    for root in waiting:  # grows by the links on the way
        for parent, folders, files in os.walk(root, onerror=on_error):
            real = os.path.realpath(parent)  # and not its inode: file systems in user space may make that up
            if real in looked_into:
                folders.clear()
                continue
            looked_into.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = [os.path.join(parent, name) for name in folders]  # noqa: PTH118 (`root` comes back as it was given)
            waiting += filter(os.path.islink, below)  # Path.is_symlink raises for a path that is too long
            yield root, below, [os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")]  # noqa: PTH118


def find_files(folder: str, on_error: Callable[[OSError], None]) -> Iterator[str]:
    """Every file below that is not hidden; for the order, links and `on_error` see `walk`."""
    for _, _, files in walk([folder], on_error):
        yield from files
