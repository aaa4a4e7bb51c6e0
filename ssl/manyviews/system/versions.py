"""Versions of the packages that determine a result."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("manyviews", "torch", "timm")


def versions() -> dict[str, str]:
    """Returns the installed version of each of `PACKAGES`; "not installed" for sources that are on the path only."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
