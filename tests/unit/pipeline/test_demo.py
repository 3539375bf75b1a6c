"""What the demonstration says of itself at its end."""

from pathlib import Path

import pytest

from pipeline.demo import DemoOutcome
from pipeline.run import ConceptResult


@pytest.mark.parametrize(
    ("last", "good"),
    [
        (ConceptResult("teapot", "trained", "1", promoted=True), True),
        (ConceptResult("teapot", "already", "1"), True),
        (ConceptResult("teapot", "trained", "2", promoted=False), False),
        (ConceptResult("teapot", "failed"), False),
    ],
)
def test_it_is_good_where_training_would_be(last: ConceptResult, good: bool) -> None:
    first = ConceptResult("fox", "trained", "1", promoted=True)
    assert DemoOutcome(Path(), {}, [first, last]).all_good is good
