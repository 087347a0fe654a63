"""Property tests of this room draw the same examples every time, and may take their time on a busy machine."""

from hypothesis import settings

settings.register_profile("data", deadline=None, derandomize=True)
settings.load_profile("data")
