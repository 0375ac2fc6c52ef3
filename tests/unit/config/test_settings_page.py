"""docs/settings.md states every default and every range, and they are those of the code."""

from __future__ import annotations

from settings_page import PAGE, settings_page


def test_the_page_of_every_setting_is_that_of_the_code():
    assert PAGE.read_text() == settings_page(), "run `python tests/settings_page.py`"
