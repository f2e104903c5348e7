"""Checks of arguments, and what their messages say."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from convscope.errors import (
    ConvscopeError,
    ConvscopeWarning,
    find_name,
    require_extra,
    require_int,
    require_number,
    warn,
    warns_of_failures,
)


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(200)])
def test_integers_are_returned_as_int(value: object) -> None:
    checked = require_int("steps", value)
    assert type(checked) is int
    assert checked == value


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None, np.float32(2)])
def test_other_values_are_no_integers(value: object) -> None:
    with pytest.raises(ConvscopeError, match=r"^steps is .*; expected a whole number, 1 or more$"):
        require_int("steps", value)


def test_numbers_are_returned_as_float() -> None:
    for value in (0.5, np.float32(0.5)):
        checked = require_number("keep", value, above=0, below=1)
        assert type(checked) is float
        assert checked == 0.5
    assert require_number("tolerance", 0, minimum=0) == 0


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"above": 0, "below": 1}, "keep is 0; expected a number above 0 and below 1"),
        (1.0, {"above": 0, "below": 1}, "keep is 1.0; expected a number above 0 and below 1"),
        (-1, {"minimum": 0}, "keep is -1; expected a number of at least 0"),
        (float("nan"), {"minimum": 0}, "keep is nan; expected a number of at least 0"),
        (float("inf"), {}, "keep is inf; expected a number"),
        (True, {}, "keep is True; expected a number"),
        ("low", {"above": 2.5}, "keep is 'low'; expected a number above 2.5"),
    ],
)
def test_numbers_out_of_range_are_refused(value: object, bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ConvscopeError) as error:
        require_number("keep", value, **bounds)
    assert str(error.value) == message


def test_missing_package_names_its_extra() -> None:
    with pytest.raises(ConvscopeError, match=r"^no_such_package is not installed; pip install 'convscope\[scan\]'$"):
        require_extra("no_such_package.part")
    assert require_extra("json.decoder").__name__ == "json.decoder"


def test_the_exception_is_available_without_torch() -> None:
    script = "import sys, convscope; convscope.ConvscopeError; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


class Result:
    """A result with failures."""

    failed = tuple(f"image {i}: is damaged" for i in range(5))


@warns_of_failures
def inner() -> Result:
    return Result()


@warns_of_failures
def outer() -> Result:
    inner()
    return inner()


def test_warnings_point_to_the_line_outside_the_package() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("assumed")
        outer()  # warns once, although it calls inner twice
        inner()
    assert [w.category for w in caught] == [ConvscopeWarning] * 3
    assert [w.filename for w in caught] == [__file__] * 3
    text = "could not be used: image 0: is damaged; image 1: is damaged; image 2: is damaged; and 2 more, see .failed"
    assert [str(w.message) for w in caught] == ["assumed", text, text]


def test_a_call_that_fails_leaves_warnings_on() -> None:
    @warns_of_failures
    def broken() -> Result:
        raise ConvscopeError("no")

    with pytest.raises(ConvscopeError):
        broken()
    with pytest.warns(ConvscopeWarning, match="image 0: is damaged"):
        inner()


@pytest.mark.parametrize("given", ["grad-cam", "GradCAM", "Grad_CAM", "grad cam"])
def test_find_name_ignores_case_and_hyphens(given):
    assert find_name("method", given, ["cam", "grad-cam", "grad-cam++"]) == "grad-cam"


def test_find_name_names_the_nearest():
    with pytest.raises(ConvscopeError, match="method 'gradcem' is not known; nearest: grad-cam"):
        find_name("method", "gradcem", ["occlusion", "grad-cam"])
    with pytest.raises(ConvscopeError, match="method is None; expected a name such as 'occlusion'"):
        find_name("method", None, ["occlusion", "grad-cam"])


def test_names_are_those_of_the_tables():
    from convscope import names
    from convscope.attribution.registry import METHODS
    from convscope.evaluation.registry import METRICS
    from convscope.featurevis.recipes import RECIPES

    assert list(names.METHOD_NAMES) == list(METHODS)
    assert list(names.RECIPE_NAMES) == list(RECIPES)
    assert list(names.METRIC_NAMES) == list(METRICS)
