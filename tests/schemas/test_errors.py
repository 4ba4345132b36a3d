"""Why rows fail."""

import pickle

import pytest

from schemas import ErrorCode, RowError

TRANSIENT = {"storage_unavailable", "out_of_memory", "crashed", "timed_out"}


@pytest.mark.parametrize("code", ErrorCode)
def test_a_code_is_its_lower_case_name_and_says_whether_another_try_may_help(code):
    assert code.value == str(code) == code.name.lower()
    assert code.transient == (code.value in TRANSIENT)


def test_a_row_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(RowError(ErrorCode.TRUNCATED, "cut at 50 %")))
    assert (type(error), error.code, error.message, str(error)) == (
        RowError, ErrorCode.TRUNCATED, "cut at 50 %", "cut at 50 %",
    )  # fmt: skip
