"""The examples in docstrings are true."""

import doctest
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import manyviews

PACKAGE = Path(manyviews.__file__).parent
MODULES = [
    ".".join(("manyviews", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text()
]


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    """The examples of a module; also those of decorated functions, which doctest takes for another module's."""
    finder = doctest.DocTestFinder(recurse=False)
    tests = doctest.DocTestFinder().find(module)
    names = {test.name for test in tests}
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and inspect.isfunction(value) and f"{module.__name__}.{name}" not in names:
            tests += finder.find(inspect.unwrap(value), f"{module.__name__}.{name}", module=module)
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    tests = examples_of(module)
    assert tests, f"the examples of {name} are not collected"
    for test in tests:
        runner.run(test)
    assert not runner.failures


def test_what_a_user_calls_has_an_example() -> None:
    for name in ("pretrain", "evaluate", "extract", "finetune", "Run", "Features"):
        assert ">>>" in (getattr(manyviews, name).__doc__ or ""), name
