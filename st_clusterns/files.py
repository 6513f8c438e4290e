"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def write_json(content: Any, path: Path) -> None:
    """Write JSON."""
    write_text(json.dumps(content, indent=2) + "\n", path)


def write_text(content: str, path: Path) -> None:
    """Write a text file in UTF-8."""
    with written_whole(path) as partial:
        partial.write_text(content, encoding="utf-8")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file to write, which gets its name if nothing has failed; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    os.replace(partial, path)


def write_array(array: npt.NDArray[Any], path: Path) -> None:
    """Write an array as a `.npy` file."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the name without its content
    os.replace(partial, path)
