"""Settings of the test run."""

import os

from hypothesis import settings

# On a developer's machine hypothesis looks for new failures; the gate gives the same answer for the same code.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
