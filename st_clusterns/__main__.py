"""`python -m st_clusterns` is the command `st-clusterns`."""

from st_clusterns.cli import app

app(prog_name="st-clusterns")
