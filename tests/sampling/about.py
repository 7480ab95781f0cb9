"""The metadata of a sampled video, as any player or picture viewer reads it."""

import json
from pathlib import Path
from typing import Any

import av
from PIL import Image


def read_about(path: Path) -> dict[str, Any]:
    """The comment of an mp4, a gif or a png."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return json.loads(container.metadata["comment"])
    with Image.open(path) as image:
        return json.loads(image.info["comment"])
