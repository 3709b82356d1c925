"""What holds for every use case."""

from collections.abc import Iterator

import pytest

from tests.processes import children_of_this_process


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = children_of_this_process()
    yield
    assert children_of_this_process() == before
