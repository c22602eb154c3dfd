"""The pytest plugin that points PEFT's tests at our configs; it runs inside the suite's own pytest process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest.mock import Mock

import pytest

from .selection import SELECTIONS, SKIPS_LIFTED_EVERYWHERE, Selection
from .source import PACKAGE
from .subjects import Subject, config_classes, is_about_ours, load_subjects
from .verdict import Explanation, read_explanations

RESULTS = "PEFT_SUITE_RESULTS"  # where the outcome of every test is written, as JSON
_OF_CONFIG = "config"

_subjects: list[Subject] = []
_edited: set[str] = set()
_outcomes: dict[str, dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    del config
    pytest.register_assert_rewrite(f"{PACKAGE}.testing_common")
    _subjects.extend(load_subjects())
    # the context that goes to the hub on the first use of a model; all of ours are local folders
    _replace(importlib.import_module(f"{PACKAGE}.testing_utils"), "hub_online_once", contextlib.nullcontext)
    _lift_skips(importlib.import_module(f"{PACKAGE}.testing_common"), SKIPS_LIFTED_EVERYWHERE)


def _lift_skips(module: ModuleType, functions: tuple[str, ...]) -> None:
    for name in functions:
        _replace(module, name, lambda *_: None)


def _replace(module: ModuleType, name: str, value: object) -> None:
    if not hasattr(module, name):
        raise pytest.UsageError(f"{module.__name__} has no {name} any more: see selection.py")
    setattr(module, name, value)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the values of PEFT's parametrisations before pytest's own hook reads them."""
    module = cast(ModuleType, metafunc.module)
    selection = _selection_of(module)
    _edit_module(module, selection)
    test = _test_name(metafunc.cls, metafunc.function)
    if test in selection.values:
        names, cases = selection.values[test]
        for marker in metafunc.definition.iter_markers("parametrize"):
            if marker.args[0] == names:
                marker.args[1][:] = cases(_subjects)
    if chosen := selection.rewritten_for(test, _subjects):
        metafunc.parametrize(stand_in_config.__name__, chosen, indirect=True, ids=lambda subject: subject.label)


def _edit_module(module: ModuleType, selection: Selection) -> None:
    """Change the lists' contents, not the names: the tests' parametrisations already hold the list objects."""
    if module.__name__ in _edited:
        return
    _edited.add(module.__name__)
    for name, cases in selection.lists.items():
        getattr(module, name)[:] = cases(_subjects)
    _lift_skips(module, selection.skips_lifted)


@pytest.fixture(autouse=True)
def stand_in_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In rewritten tests, our config under the name of the one that they were written with.

    Fails a test that never builds one: it would pass without saying anything about us.
    """
    subject = getattr(request, "param", None)
    if subject is None:
        yield
        return
    stand_in = Mock(side_effect=subject.build)
    monkeypatch.setattr(request.module, _selection_of(request.module).stands_in_for, stand_in)
    yield
    if not stand_in.called:
        pytest.fail("this rewritten test never builds a config of ours: list it under left_out in selection.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    explanations = read_explanations() if is_about_ours() else []
    kept, left_out = [], []
    for item in items:
        selection = _selection_of(item.module)  # type: ignore[attr-defined]
        test = _test_name(item.cls, item.function)  # type: ignore[attr-defined]
        if selection.reason_left_out(test) is not None:
            left_out.append(item)
            continue
        subject = _config_of(item)
        if subject is None:
            item.runtest = partial(pytest.fail, f"selection.py says nothing about {test}", pytrace=False)
        else:
            item.user_properties.append((_OF_CONFIG, subject))
            _expect_explained_failure(item, explanations)
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _expect_explained_failure(item: pytest.Item, explanations: list[Explanation]) -> None:
    for explanation in explanations:
        if explanation.covers(_test_id(item.nodeid)):
            item.add_marker(pytest.mark.xfail(strict=True, reason=explanation.reason))


def _config_of(item: pytest.Item) -> str | None:
    """The name of the config class under test, or None where the test is not about ours."""
    classes = tuple(config_classes(_subjects))
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        if isinstance(value, Subject):
            return value.config_cls.__name__
        if isinstance(value, classes):
            return type(value).__name__
        if isinstance(value, type) and value in classes:
            return value.__name__
    return None


def _selection_of(module: ModuleType) -> Selection:
    return SELECTIONS[module.__name__.rpartition(".")[2]]


def _test_name(cls: type | None, function: Any) -> str:
    return function.__name__ if cls is None else f"{cls.__name__}.{function.__name__}"


def _test_id(nodeid: str) -> str:
    """The id without the file, which has a longer path on some machines than on others."""
    return nodeid.partition("::")[2]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called in the main process for every test, whichever worker ran it."""
    if report.when != "call" and report.outcome == "passed":
        return
    test = _test_id(report.nodeid)
    if _outcomes.get(test, {}).get("outcome") != "failed":
        explained = report.outcome == "skipped" and hasattr(report, "wasxfail")
        config = dict(report.user_properties).get(_OF_CONFIG, "-")
        _outcomes[test] = {"config": str(config), "outcome": "explained" if explained else report.outcome}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        Path(os.environ[RESULTS]).write_text(json.dumps(_outcomes, indent=1))
