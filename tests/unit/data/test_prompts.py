"""The shipped evaluation prompts."""

from __future__ import annotations

import pytest

from components.evaluate.prompts import prompt_templates
from model.errors import InputError


def test_there_are_25_of_each_kind_with_one_subject() -> None:
    live, thing = prompt_templates(True), prompt_templates(False)
    for templates in (live, thing):
        assert len(templates) == len(set(templates)) == 25
        assert all(template.count("{}") == 1 for template in templates)
    assert "a {} in a chef outfit" in live and "a {} in a chef outfit" not in thing
    assert "a {} on top of a mirror" in thing and "a {} on top of a mirror" not in live


def test_fewer_prompts_are_spread_over_the_list() -> None:
    everything = prompt_templates(False)
    some = prompt_templates(False, 5)
    assert some == [everything[index] for index in (0, 5, 10, 15, 20)]
    assert prompt_templates(False, 1) == everything[:1]
    for count in (0, 26):
        with pytest.raises(InputError, match="give 1 to 25"):
            prompt_templates(True, count)
