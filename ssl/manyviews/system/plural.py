"""Numbers and what they count, in the singular or the plural."""


def plural(count: int | float, noun: str, several: str = "") -> str:
    """A number and what is counted: 1 image, 2,000 images, 0.5 epochs."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun if count == 1 else several or f'{noun}s'}"
