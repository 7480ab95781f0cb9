"""mosaicml-streaming, the real library, in a process of its own.

It requires numpy < 2.2 and transformers < 5, so `make` installs it, without its dependencies, in a separate folder next
to the other packages; its vision part, which needs torchvision, is left out. Elsewhere: pip install --no-deps --target
FOLDER mosaicml-streaming and the packages listed with it in the Makefile, and set LATTE_MOSAIC to the folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("LATTE_MOSAIC", Path(sys.prefix) / "mosaic"))
needs_mosaic = pytest.mark.skipif(
    not (FOLDER / "streaming").is_dir(),
    reason=f"no mosaicml-streaming at {FOLDER}; run `make venv` or set LATTE_MOSAIC",
)
_BEGIN = """
import hashlib, json, sys, types
sys.path.append(sys.argv[1])
sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
import streaming
streaming.base.util.clean_stale_shared_memory()
args = json.loads(sys.argv[2])

def told(value):
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value.item() if hasattr(value, "item") else value

def read(folder):
    data = streaming.StreamingDataset(local=folder, batch_size=1, validate_hash=args.get("validate_hash"))
    return [{name: told(value) for name, value in data[n].items()} for n in range(len(data))]
"""


def in_mosaic(script: str, **args: Any) -> Any:
    """Run a script that finds `streaming`, `args` and `read`, and sets `result`; what it set, through JSON."""
    whole = f"{_BEGIN}\n{script}\nprint(json.dumps(result))"
    command = [sys.executable, "-c", whole, str(FOLDER), json.dumps(args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
