"""Which files lie below a folder, and how a name that is no UTF-8 is written: for `convmixer classify` and for jobs on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pictures.files import walk


def find_files(folder: str, on_error: Callable[[OSError], None]) -> Iterator[str]:
    """Every file below that is not hidden; for the order, links and `on_error` see `pictures.files.walk`."""
    for _, _, files in walk([folder], on_error):
        yield from files


def printable(path: str) -> str:
    r"""A path with `\xe9` for each byte that is no UTF-8, which text that others read must not have.

    Args:
        path: as Python has it, with lone surrogates for such bytes.
    """
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
