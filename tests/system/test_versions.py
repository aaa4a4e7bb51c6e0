from importlib.metadata import PackageNotFoundError, version

import pytest

import manyviews.system.versions as versions_module
from manyviews.cli import header
from manyviews.system.versions import versions


def test_versions_are_those_installed() -> None:
    assert versions()["torch"] == version("torch")


def test_sources_that_are_only_on_the_path_have_a_command_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without site-packages of its own no package has metadata of manyviews.
    def metadata(name: str) -> str:
        if name == "manyviews":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(versions_module, "version", metadata)
    assert "manyviews not installed torch " in header("pretrain.py")
