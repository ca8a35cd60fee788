"""Hypothesis in the tests: the same examples every time, as slow as the machine makes them. For
others, `HYPOTHESIS_PROFILE=explore pytest tests`."""

import os

from hypothesis import settings

settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
