"""What a test needs and this machine has not."""

import os
from typing import NoReturn

import pytest


def not_tested(complaint: str, *, whole_file: bool = False) -> NoReturn:
    """Skip, in words that say what was not tried and how it would be. In CI that is a failure: there all is tried."""
    if os.environ.get("CI"):
        pytest.fail(complaint, pytrace=False)
    pytest.skip(complaint, allow_module_level=whole_file)
