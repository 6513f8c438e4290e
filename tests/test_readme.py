"""The README's Python runs as it stands, on a tiny model; its commands name options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_bert import load_model, make_sentences, save_bert
from typer.testing import CliRunner

from st_clusterns.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- runs: (\w+) -->\s*```python\n(.*?)```", README, re.DOTALL))
MODEL = '"sentence-transformers/all-MiniLM-L6-v2"'


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["example", "trainer"])
def test_python_block_runs_and_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # fit writes checkpoints/ here
    load_model(save_bert(tmp_path / "bert")).save("model")
    assert MODEL in BLOCKS[name]
    code = BLOCKS[name].replace(MODEL, '"model"').replace("max_steps=20", "max_steps=3")
    scope: dict[str, object] = {"sentences": make_sentences(400)}
    exec(compile(code, f"README.md, {name}", "exec"), scope)
    before, after = load_model(tmp_path / "bert").state_dict(), scope["model"].state_dict()  # type: ignore[attr-defined]
    assert any((before[key] != after[key]).any() for key in before), "nothing was trained"


def test_commands_name_options_that_exist() -> None:
    commands = [line.split("st-clusterns ", 1)[1].split() for line in README.splitlines() if "st-clusterns " in line]
    commands = [words for words in commands if words[0] in ("train", "report", "quickstart", "audit")]
    assert {words[0] for words in commands} == {"train", "report", "quickstart", "audit"}
    for words in commands:
        usage = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        for option in (word for word in words if word.startswith("--")):
            assert option in usage, f"README names {option} of {words[0]}"
