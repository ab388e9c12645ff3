"""The threads beside the main one: order, errors, and that nothing hangs or piles up."""

from collections.abc import Iterator

import pytest

from causalvae.errors import VideoError
from causalvae.pipeline import Behind, ahead


def counted(seen: list[int], *, breaks_at: int = 99) -> Iterator[int]:
    for number in range(10):
        if number == breaks_at:
            raise VideoError("breaks off")
        seen.append(number)
        yield number


def test_pieces_come_in_order_and_one_is_made_ahead() -> None:
    seen: list[int] = []
    pieces = ahead(counted(seen))
    assert next(pieces) == 0
    assert list(pieces) == list(range(1, 10))
    assert seen == list(range(10))


def test_an_error_comes_after_the_pieces_before_it() -> None:
    pieces = ahead(counted([], breaks_at=2))
    assert [next(pieces), next(pieces)] == [0, 1]
    with pytest.raises(VideoError, match="breaks off"):
        next(pieces)


def test_closing_early_makes_no_more_than_one_piece_ahead() -> None:
    seen: list[int] = []
    pieces = ahead(counted(seen))
    next(pieces)
    pieces.close()
    assert len(seen) <= 3


def test_calls_are_made_in_order_and_all_before_the_end() -> None:
    made: list[int] = []
    with Behind() as behind:
        for number in range(20):
            behind.call(lambda number=number: made.append(number))
    assert made == list(range(20))


def test_an_error_of_a_call_leaves_with_the_next_one_or_at_the_end() -> None:
    def fail() -> None:
        raise VideoError("in a call")

    def work(*, later: int) -> None:
        with Behind() as behind:
            behind.call(fail)
            for _ in range(later):
                behind.call(lambda: None)

    for later in (0, 1):
        with pytest.raises(VideoError, match="in a call"):
            work(later=later)


def test_an_error_outside_is_not_hidden_by_one_of_a_call() -> None:
    def fail() -> None:
        raise VideoError("in a call")

    def work() -> None:
        with Behind() as behind:
            behind.call(fail)
            raise KeyError

    with pytest.raises(KeyError):
        work()
