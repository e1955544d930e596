"""Which form of a graph serves which call."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from engines.specialised import Specialised
from engines.variant import Bounds

FREE: Bounds = {"batch": (1, 1, None)}
ONE: Bounds = {"batch": (4, 4, 4)}


class Opener:
    """Remembers what was opened; a form is its own size."""

    def __init__(self) -> None:
        self.opened: list[int | None] = []

    def __call__(self, sizes: Mapping[str, int] | None) -> int | None:
        self.opened.append(None if sizes is None else sizes["batch"])
        return self.opened[-1]


@pytest.fixture
def opener() -> Opener:
    return Opener()


def test_bounds_of_one_size_have_a_form_and_the_rest_another(opener: Opener) -> None:
    forms = Specialised([ONE, FREE], opener)
    assert [forms.any(), forms.of(0, {"batch": 4}), forms.of(1, {"batch": 7}), forms.of(None)] == [4, 4, None, None]
    assert opener.opened == [4, None]


def test_the_first_sizes_within_free_bounds_have_forms_of_their_own(opener: Opener) -> None:
    forms = Specialised([FREE], opener, own=2)
    assert [forms.of(0, {"batch": size}) for size in (2, 1, 2, 3, 1, 4)] == [2, 1, 2, None, 1, None]
    assert opener.opened == [2, 1, None]


def test_a_size_of_the_bounds_is_none_of_these(opener: Opener) -> None:
    forms = Specialised([ONE, FREE], opener, own=1)
    assert [forms.of(0, {"batch": 4}), forms.of(1, {"batch": 5}), forms.of(1, {"batch": 6})] == [4, 5, None]


def test_renewed_the_last_form_is_open_and_all_sizes_keep_theirs(opener: Opener) -> None:
    forms = Specialised([FREE], opener, own=2)
    forms.renew()
    assert opener.opened == []  # nothing was in use
    for size in (1, 2, 3, 2):
        forms.of(0, {"batch": size})
    opener.opened.clear()
    forms.renew()
    assert opener.opened == [2]
    assert [forms.of(0, {"batch": size}) for size in (3, 1, 2)] == [None, 1, 2]


def test_a_form_that_fails_to_open_is_tried_again() -> None:
    attempts = []

    def opener(sizes: Mapping[str, int] | None) -> str:
        attempts.append(sizes)
        if len(attempts) == 1:
            raise ValueError("no memory")
        return "opened"

    forms = Specialised([FREE], opener, own=1)
    with pytest.raises(ValueError, match="no memory"):
        forms.of(0, {"batch": 1})
    assert forms.of(0, {"batch": 1}) == "opened"
