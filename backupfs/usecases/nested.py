"""Generators that call each other without Python's stack, so that the depth of a tree is bounded by memory alone."""

from collections.abc import Generator
from typing import Any, TypeVar

Result = TypeVar("Result")

# A generator of this kind yields another one, is sent what that returned, and returns a result of its own.
Nested = Generator["Nested[Any]", Any, Result]


def run_nested(outermost: Nested[Result]) -> Result:
    """Run a generator and those it yields as if they called each other; what one raises is raised at its `yield`."""
    stack: list[Nested[Any]] = [outermost]
    result: Any = None
    raised: BaseException | None = None
    try:
        while stack:
            try:
                deeper = stack[-1].send(result) if raised is None else stack[-1].throw(raised)
            except StopIteration as end:
                stack.pop()
                result, raised = end.value, None
            except BaseException as error:
                stack.pop()
                result, raised = None, error
            else:
                stack.append(deeper)
                result, raised = None, None
    finally:
        while stack:
            stack.pop().close()
    if raised is not None:
        raise raised
    return result  # type: ignore[no-any-return]
