"""The door for text that goes to a terminal: control characters are spelled out, and every encoding will do."""

import codecs
import io
import sys

from manyviews.system.files import spelled

ERRORS = "manyviews_spelled"
"""The name by which Python's streams know what is done with letters that they cannot write."""

INSTEAD = {
    "×": "x",
    "→": "->",
    "←": "<-",
    "⇝": "~>",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "*",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "√": "sqrt ",
    "‖": "||",
    "²": "^2",
    "³": "^3",
    "½": "1/2",
    "∝": "~",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "ε": "epsilon",
    "θ": "theta",
    "λ": "lambda",
    "μ": "mu",
    "µ": "mu",
    "ν": "nu",
    "π": "pi",
    "σ": "sigma",
    "τ": "tau",
    "φ": "phi",
    "ψ": "psi",
    "Σ": "sum",
    "Δ": "delta",
    "✓": "yes",
    "✗": "no",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "•": "*",
    "◌": "o",
    **dict.fromkeys("─━╌╍┄┅═╴╶╸╺", "-"),
    **dict.fromkeys("│┃┆┇║╎╏", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┗┛┣┫┳┻╋╔╗╚╝╠╣╦╩╬┡┩╇╈╉╊╞╡╪", "+"),
    **dict.fromkeys("█▉▊▋▌▍▎▏", "#"),
}
"""What stands for a letter of our own messages on a terminal that lacks it; any other letter is spelled out."""


def prepare() -> None:
    """Lets standard output and error write every letter: what their encoding lacks is written in other ones."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != ERRORS:
            stream.reconfigure(errors=ERRORS)


def clean(text: str) -> str:
    """A text of perhaps many lines without any control character but line breaks and tabs: the others are spelled."""
    return "\n".join("\t".join(map(spelled, line.split("\t"))) for line in text.split("\n"))


def write(text: str, *, error: bool = False) -> None:
    """Writes a text to standard output, or to standard error, cleaned, at once."""
    prepare()
    stream = sys.stderr if error else sys.stdout
    stream.write(clean(text))
    stream.flush()


def _instead(error: UnicodeError) -> tuple[str | bytes, int]:
    """A handler of the codecs registry: writes what a stream cannot encode in letters that every encoding has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    said = "".join(INSTEAD.get(letter) or spelled(letter, ascii_only=True) for letter in letters)
    return said, error.end


codecs.register_error(ERRORS, _instead)
