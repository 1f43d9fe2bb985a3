"""Text from outside, made fit to be shown: names of files need not be UTF-8, and some characters move a terminal's cursor."""

from __future__ import annotations


def printable(path: str) -> str:
    r"""A path with `\xe9` for each byte that is no UTF-8, which text that others read must not have.

    Args:
        path: as Python has it, with lone surrogates for such bytes.
    """
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    r"""The text with `\x1b`, `\n`, … for each character that a terminal would not show but do.

    Args:
        text: with anything in it.
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
