"""The real clips that some tests use: $LATTE_TEST_CLIPS, by default beside the repository; skipped where absent."""

import os
from pathlib import Path

import pytest

CLIPS = Path(os.environ.get("LATTE_TEST_CLIPS", "../shared/clips"))
needs_clips = pytest.mark.skipif(
    not (CLIPS / "captions.jsonl").is_file(), reason=f"no real clips at {CLIPS}; set LATTE_TEST_CLIPS to their folder"
)
