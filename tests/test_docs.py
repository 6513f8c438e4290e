"""The documentation says what the code does: messages, public names, Python blocks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_bert import load_model, make_sentences, save_bert

import st_clusterns
from st_clusterns import ClusterDataLoader, ClusterNSLoss, CorpusClusters
from st_clusterns.training.sentences import read_sentences

ROOT = Path(__file__).parent.parent
PACKAGE = Path(st_clusterns.__file__).parent
LEAST = 20  # characters of its own that a message has, or it would match anything
MODEL = '"sentence-transformers/all-MiniLM-L6-v2"'
RUNS = re.compile(r"<!-- runs: (\w+) -->\s*```python\n(.*?)```", re.DOTALL)
BLOCKS = {
    f"{page.stem}-{name}": code
    for page in (ROOT / "docs" / "only-sentences.md", *(ROOT / "skills").glob("*/*.md"))
    for name, code in RUNS.findall(page.read_text(encoding="utf-8"))
}


def pattern(node: ast.AST) -> str:
    """What the text that an expression makes looks like: its own characters, and anything for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return ".*?".join(map(re.escape, re.split(r"\{\w*\}", node.value)))
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left) + pattern(node.right)
    return ".*?"


def messages() -> list[re.Pattern[str]]:
    """What every text in the source looks like."""
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    found = {pattern(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))}
    return [re.compile(one, re.DOTALL) for one in found if len(one.replace(".*?", "")) >= LEAST]


def test_the_package_prints_the_messages_that_troubleshooting_explains() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    assert len(quoted) >= 25
    known = messages()
    assert not any(one.fullmatch("A message that nobody has ever written into this package.") for one in known)
    stale = [message for message in quoted if not any(one.fullmatch(message) for one in known)]
    assert not stale, "docs/troubleshooting.md quotes what the package does not print"


def test_what_is_quoted_with_values_is_what_these_values_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above cannot see what stands in the place of a value."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = Path("tickets.csv")
    for content in (b"subject,body\na title,a text\n", b"subject\n" + b"fine\n" * 10 + b"caf\xe9\n"):
        table.write_bytes(content)
        with pytest.raises(ValueError, match=r"tickets\.csv") as error:
            read_sentences(table)
        assert f"```text\n{error.value}\n```" in page
    model = load_model(save_bert(tmp_path / "bert"))
    sentences = make_sentences(60)
    for call in (
        lambda: CorpusClusters.fit(sentences, model, n_clusters=50),
        lambda: ClusterDataLoader(sentences, model, batch_size=96),
        lambda: ClusterNSLoss(model),
        lambda: ClusterNSLoss(model.bfloat16(), CorpusClusters.fit(sentences, embeddings=np.eye(60, 32))),
    ):
        with pytest.raises(ValueError, match=r"\w") as error:
            call()
        assert f"```text\n{error.value}\n```" in page


def test_every_public_name_has_an_entry() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\.\. auto\w+:: st_clusterns\.(?:\w+\.)*(\w+)$", page, re.MULTILINE)
    assert set(st_clusterns.__all__) <= set(entries), "docs/api.md has no entry for a public name"


def test_skills_have_the_front_matter_that_agents_read() -> None:
    pages = list((ROOT / "skills").glob("*/SKILL.md"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        front = re.match(r"---\nname: (.+)\ndescription: (.+)\n---\n", text)
        assert front is not None
        assert front[1] == page.parent.name
        assert len(front[2]) <= 1024  # the limit of the format


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_python_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_model(save_bert(tmp_path / "bert")).save("model")
    sentences = make_sentences(400)
    Path("tickets.txt").write_text("\n".join(sentences))
    code = BLOCKS[name].replace(MODEL, '"model"').replace("max_steps=20", "max_steps=2")
    scope = {"sentences": sentences, "questions": sentences[:64], "answers": sentences[64:128]}
    exec(compile(code, name, "exec"), scope)
