"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run and machine, and no time limit: what else a shared machine does
# at that moment is nobody's bug. `pytest --hypothesis-profile explore` looks for new examples.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")
