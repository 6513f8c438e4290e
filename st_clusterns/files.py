"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(content: Any, path: Path) -> None:
    """Write JSON."""
    write_text(json.dumps(content, indent=2) + "\n", path)


def write_text(content: str, path: Path) -> None:
    """Write a text file in UTF-8."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
