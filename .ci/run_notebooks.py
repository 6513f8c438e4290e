"""Execute every notebook in memory; fail on an error, and on a notebook stored with its outputs."""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_SECONDS = 900  # that one cell may take, on a slow machine


def is_clean(notebook: nbformat.NotebookNode) -> bool:
    """Return whether no code cell has an output or an execution count."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return not any(cell.outputs or cell.execution_count is not None for cell in cells)


def main() -> None:
    """Check all notebooks, in the order of their names."""
    folder = Path(__file__).parent.parent / "notebooks"
    notebooks = {path.name: nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))}
    if not notebooks:
        sys.exit(f"There are no notebooks in {folder}.")
    stored = [name for name, notebook in notebooks.items() if not is_clean(notebook)]
    if stored:
        sys.exit(f"Stored with outputs: {', '.join(stored)}. Clear all outputs and save.")
    for name, notebook in notebooks.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as cwd:
            client = NotebookClient(
                notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": cwd}}
            )
            try:
                client.execute(env={**os.environ, "TMPDIR": cwd})  # what it writes leaves the disk with it
            except CellExecutionError as error:
                sys.exit(f"{name} failed:\n{error}")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
