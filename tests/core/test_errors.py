import subprocess
import sys

import pytest

from blockloom.core import errors


@pytest.mark.parametrize(
    ("kind", "exit_code", "is_value_error"),
    [
        (errors.UsageError, 2, True),
        (errors.DataError, 3, True),
        (errors.ModelError, 4, True),
        (errors.ResourceError, 5, False),
    ],
)
def test_each_class_carries_its_exit_code(kind, exit_code, is_value_error):
    error = kind("what; got 1")
    assert error.exit_code == exit_code
    assert isinstance(error, errors.BlockloomError)
    assert isinstance(error, ValueError) is is_value_error
    assert str(error) == error.message == "what; got 1"
    assert kind("x", exit_code=9).exit_code == 9
    assert kind("x").exit_code == exit_code  # the override did not leak into the class


def test_nearest_prefers_close_numbers_and_similar_names():
    assert errors.nearest(30, [8, 16, 32]) == 32
    assert errors.nearest(12, [8, 16]) == 8  # a tie goes down
    assert errors.nearest("confidance", ["confidence", "random"]) == "confidence"
    assert errors.nearest("HALTON", ["halton", "raster"]) == "halton"
    assert errors.nearest("zzz", ["halton"]) is None
    assert errors.nearest(3, ["halton"]) is None


@pytest.mark.parametrize(
    ("check", "parts"),
    [
        (lambda: errors.check_one_of("order", "haltn", ["halton", "raster"]), ["haltn", "halton"]),
        (lambda: errors.check_range("top_p", 1.5, 0.0, 1.0), ["top_p", "1.5", "1.0"]),
        (lambda: errors.check_range("x", float("nan"), 0.0, 1.0), ["nan", "[0.0, 1.0]"]),
        (lambda: errors.check_range("x", 0.0, 0.0, open_low=True), ["> 0.0"]),
        (lambda: errors.check_range("x", True, 0, 2), ["True"]),
        (lambda: errors.check_count("steps", 0), ["steps", "0", ">= 1", "try 1"]),
        (lambda: errors.check_count("steps", 2.0), ["2.0", "whole number"]),
        (lambda: errors.check_divisible("height", 30, 8), ["30", "multiples of 8", "try 32"]),
        (lambda: errors.check_divisible("height", 1, 8), ["try 8"]),
        (lambda: errors.check_shape("x", (2, 3), (None, 4)), ["[2, 3]", "[any, 4]"]),
        (lambda: errors.check_shape("x", (2,), (None, 4)), ["[2]"]),
        (lambda: errors.check_known_keys("Flow", ["stps"], ["steps"]), ["stps", "try 'steps'"]),
    ],
)
def test_checks_name_the_value_and_the_nearest_legal_one(check, parts):
    with pytest.raises(errors.UsageError) as caught:
        check()
    for part in parts:
        assert part in str(caught.value)


def test_checks_accept_legal_values():
    errors.check_one_of("order", "halton", ["halton"])
    errors.check_range("x", 0.0, 0.0, 1.0)
    errors.check_range("x", 1, 0.0, 1.0)
    errors.check_count("x", 3, 1, 3)
    errors.check_divisible("x", 32, 8)
    errors.check_shape("x", (2, 4), (None, 4))
    errors.check_known_keys("Flow", ["steps"], ["steps"])


def test_importing_errors_does_not_import_torch():
    code = "import sys, blockloom.core.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
