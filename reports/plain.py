"""Safe display of untrusted text: control characters and unsupported letters become escapes.

Names, settings, notes and file names come from runs and users. The code for each output format escapes the syntax of
that format; this module escapes characters that no format can display.
"""

import unicodedata

_JOINERS = "\u200c\u200d"  # used in scripts and emoji, harmless
_SUBSTITUTES = {
    "±": "+-", "∞": "inf", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "×": "x", "·": "*", "—": "--", "–": "-",  # noqa: RUF001
    "“": '"', "”": '"', "‘": "'", "’": "'", "ε": "eps", "µ": "u", "─": "-", "━": "-", "│": "|", "†": "#",  # noqa: RUF001
}  # fmt: skip


def escape_invisible(text: str, keep: str = "") -> str:
    r"""Return the text with an escape, such as `\x1b`, in place of each invisible character.

    Invisible characters are control characters, characters that change the writing direction, and surrogates.

    Args:
        text: Any text.
        keep: Control characters to keep, such as the line feed.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in keep or _is_shown(letter) else _escape(letter) for letter in text)


def one_line(text: str) -> str:
    """Return text on one line, with each run of white space as one space; apply `escape_invisible`."""
    return escape_invisible(" ".join(text.split()))


def shorten(value: object, max_length: int = 80) -> str:
    """Return a value as one line of at most `max_length` characters, for messages and labels."""
    try:
        text = one_line(str(value))
    except ValueError:  # integer with thousands of digits
        text = f"{type(value).__name__} with too many digits"
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def escape_unencodable(text: str, encoding: str) -> str:
    """Replace letters that an encoding lacks: known symbols by ASCII, others by escapes."""
    try:
        text.encode(encoding)
        return text
    except (UnicodeEncodeError, LookupError):
        return "".join(_encode_letter(letter, encoding) for letter in text)


def _encode_letter(letter: str, encoding: str) -> str:
    try:
        letter.encode(encoding)
        return letter
    except UnicodeEncodeError:
        return _substitute(letter)
    except LookupError:
        return letter if letter.isascii() else _substitute(letter)


def _substitute(letter: str) -> str:
    if "\u2800" <= letter <= "\u28ff":  # braille patterns, used by spinners
        return "*"
    return _SUBSTITUTES.get(letter) or _escape(letter)


def _is_shown(letter: str) -> bool:
    return letter in _JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode() if ord(letter) > 127 else f"\\x{ord(letter):02x}"
