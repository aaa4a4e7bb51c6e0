import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import manyviews
from manyviews.system.versions import versions


def test_versions_are_those_installed() -> None:
    assert versions()["torch"] == version("torch")


def test_sources_that_are_only_on_the_path_have_a_command_line_too() -> None:
    # Without site-packages of its own no package has metadata of manyviews.
    code = (
        "import importlib.metadata as metadata\n"
        "def version(name, real=metadata.version):\n"
        "    if name == 'manyviews': raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "from manyviews.cli import header; print(header('pretrain.py'))"
    )
    folder = Path(manyviews.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True, check=True)
    assert "manyviews not installed torch " in done.stdout
