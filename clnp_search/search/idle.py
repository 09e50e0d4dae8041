"""What a finished run has in a cluster's place: nothing is left for Ray to do, whose start takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from clnp_search.search.tuning import Program

T = TypeVar("T")


class NoCluster:
    """For a program that asks for no packs."""

    def share(self, inputs: Any) -> None:
        """Nothing: nobody reads them."""

    def beside(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function."""
        function(*arguments)

    def train(self, program: Program[T], *_: Any) -> T:
        """The program's result."""
        try:
            next(program)
        except StopIteration as end:
            return end.value
        raise RuntimeError("a finished run asks for training")
