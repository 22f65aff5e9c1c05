"""Fonts for class names in any script: those of this machine; a name that none of them has becomes a number."""

from collections.abc import Iterable, Sequence
from functools import cache

FAMILY = "DejaVu Sans"  # comes with matplotlib


def find_families(texts: Iterable[str]) -> list[str]:
    """Return the font families that the texts need, our own first."""
    found = {family for char in {char for text in texts for char in text} if (family := _find_family(char))}
    return [FAMILY, *sorted(found - {FAMILY})]


def number_names(classes: Sequence[str]) -> dict[str, str]:
    """Return each class as figures show it: its name, or `#3` for the third one where no font has the name."""
    return {
        name: name if name.isascii() or all(_find_family(char) for char in name) else f"#{place}"
        for place, name in enumerate(classes, start=1)
    }


def describe_numbers(classes: Sequence[str]) -> str:
    """Say which class each number of `number_names` is; empty if there is none."""
    numbered = [f"{shown} is {name}" for name, shown in number_names(classes).items() if shown != name]
    return ", ".join(numbered)


def find_file(text: str) -> str | None:
    """Return the file of a font that has every character of a text; None if there is none on this machine."""
    from matplotlib import font_manager

    names = (name for name, chars in _list_charmaps() if all(c.isspace() or ord(c) in chars for c in text))
    return next((str(font_manager.findfont(name)) for name in names), None)


@cache
def _find_family(char: str) -> str:
    """Return a family that has a character; empty if there is none on this machine."""
    return next((family for family, chars in _list_charmaps() if char.isspace() or ord(char) in chars), "")


@cache
def _list_charmaps() -> list[tuple[str, frozenset[int]]]:
    """Return the characters of each family, ours first; none without matplotlib. Unreadable fonts are passed over."""
    try:
        from matplotlib import font_manager, ft2font
    except ImportError:
        return []

    fonts = sorted(font_manager.fontManager.ttflist, key=lambda f: (f.name != FAMILY, f.name, f.fname))
    charmaps: dict[str, frozenset[int]] = {}
    for font in fonts:
        if font.name not in charmaps and font.style == "normal" and not font.name.startswith(("STIX", "cm", "Last")):
            try:
                charmaps[font.name] = frozenset(ft2font.FT2Font(font.fname).get_charmap())
            except (OSError, RuntimeError):
                continue
    return list(charmaps.items())
