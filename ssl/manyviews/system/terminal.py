"""Writes text to a terminal of any encoding; control characters are escaped."""

import codecs
import io
import re
import sys

from manyviews.system.files import spelled

ERRORS = "manyviews_spelled"
"""The name of our codecs error handler."""

_REPLACED = """
× x   → ->   ← <-   ⇝ ~>   … ...   ± +-   ≤ <=   ≥ >=   ≠ !=   ‖ ||   ² ^2   ³ ^3   ½ 1/2   ∝ ~   · *   • *   ◌ o
α alpha   β beta   γ gamma   ε epsilon   θ theta   λ lambda   μ mu   µ mu   ν nu   π pi   σ sigma   τ tau   φ phi
ψ psi   Σ sum   Δ delta   ✓ yes   ✗ no   “ "   ” "   ‘ '   ’ '
"""
INSTEAD = {
    **dict(re.findall(r"(\S+) (\S+)", _REPLACED)),
    "√": "sqrt ",
    **dict.fromkeys("–—−─━╌╍┄┅═╴╶╸╺", "-"),
    **dict.fromkeys("│┃┆┇║╎╏", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┗┛┣┫┳┻╋╔╗╚╝╠╣╦╩╬┡┩╇╈╉╊╞╡╪", "+"),
    **dict.fromkeys("█▉▊▋▌▍▎▏", "#"),
}
"""ASCII in place of a character of our own messages; any other character is escaped."""


def prepare() -> None:
    """Lets standard output and error write every character; those outside their encoding are replaced."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != ERRORS:
            stream.reconfigure(errors=ERRORS)


def clean(text: str) -> str:
    """Escapes all control characters but line breaks and tabs."""
    return "\n".join("\t".join(map(spelled, line.split("\t"))) for line in text.split("\n"))


def write(text: str, *, error: bool = False) -> None:
    """Writes and flushes text to standard output or error, without control characters."""
    prepare()
    stream = sys.stderr if error else sys.stdout
    stream.write(clean(text))
    stream.flush()


def _instead(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codecs error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    text = "".join(INSTEAD.get(letter) or spelled(letter, ascii_only=True) for letter in letters)
    return text, error.end


codecs.register_error(ERRORS, _instead)
