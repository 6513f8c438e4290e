"""The prompt encoder agrees with a slow one, depends on no batch, survives saving, and refuses what it cannot read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prompt_models import SENTENCES, SIZES, TEMPLATES, TOKENIZERS, bert_tokenizer, save_backbone, slow_prompt_embedding
from sentence_transformers import SentenceTransformer
from tiny_bert import WORDS, load_model, save_bert
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

from st_clusterns.prompt_encoder import PromptTransformer, to_standard_modules

FAMILIES = list(TOKENIZERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_backbone(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def prompt_model(
    folder: Path, template: str, remove_bias: Any = "training", side: str = "right"
) -> SentenceTransformer:
    model = SentenceTransformer(modules=[PromptTransformer(str(folder), template, remove_bias)], device="cpu")
    model.tokenizer.padding_side = side
    return model


def of_length(model: Any, count: int) -> str:
    """A sentence of so many tokens within the template."""
    text = ""
    for word in (word for word in WORDS for _ in range(2)):
        if len(model.preprocess([text])["input_ids"][0]) >= count:
            return text.strip()
        text = f"{text} {word}".strip()
    raise AssertionError


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("remove_bias", ["always", "never"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_slow_version(
    family: str, remove_bias: str, side: str, folders: dict[str, Path]
) -> None:
    model = prompt_model(folders[family], TEMPLATES[family][0], remove_bias, side)
    model.max_seq_length = 24
    sentences = [*SENTENCES, *(of_length(model, count) for count in (22, 23, 24)), " ".join(WORDS[:60])]
    lengths = [int(model.preprocess([text])["attention_mask"].sum()) for text in sentences]
    assert lengths[-1] == 24, "the last sentence must be cut"
    assert lengths.count(24) >= 2
    for template in TEMPLATES[family]:
        found = model.encode(sentences, prompt=template)
        for row, sentence in zip(found, sentences, strict=True):
            slow = slow_prompt_embedding(folders[family], template, sentence, 24, remove_bias == "always")
            np.testing.assert_allclose(row, slow, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bias_and_template_and_cut_have_an_effect(family: str, folders: dict[str, Path]) -> None:
    """A canary for the test above."""
    first, second = TEMPLATES[family]
    with_bias, without = (prompt_model(folders[family], first, when) for when in ("never", "always"))
    kept = with_bias.encode(SENTENCES)
    assert np.abs(kept - without.encode(SENTENCES)).min(axis=0).max() > 0.1
    assert np.abs(kept - with_bias.encode(SENTENCES, prompt=second)).max() > 0.1
    with_bias.max_seq_length = 16
    assert np.abs(kept - with_bias.encode(SENTENCES)).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_embedding_does_not_depend_on_its_batch(family: str, side: str, folders: dict[str, Path]) -> None:
    model = prompt_model(folders[family], TEMPLATES[family][0], "always", side)
    alone = np.concatenate([model.encode([text]) for text in SENTENCES])
    np.testing.assert_allclose(model.encode(SENTENCES, batch_size=len(SENTENCES)), alone, atol=1e-5)
    np.testing.assert_allclose(model.encode(SENTENCES[::-1], batch_size=2)[::-1], alone, atol=1e-5)


def test_a_mask_token_in_a_sentence_is_not_the_templates(folders: dict[str, Path]) -> None:
    for template in (TEMPLATES["bert"][0], '[MASK] means "{sentence}".'):
        model = prompt_model(folders["bert"], template, "always")
        features = model.preprocess(["w1 [MASK] w2", "[MASK]"])
        places = (features["input_ids"] == model.tokenizer.mask_token_id).nonzero().tolist()
        first = template.startswith("[MASK]")
        expected = [[p for p in places if p[0] == row][0 if first else -1][1] for row in range(2)]
        model[0].remove_bias = "never"
        out = model.eval()(dict(features))
        for row, place in enumerate(expected):
            assert torch.equal(out["sentence_embedding"][row], out["token_embeddings"][row, place])


@pytest.mark.parametrize("family", FAMILIES)
def test_bias_is_removed_in_training_alone_by_default(family: str, folders: dict[str, Path]) -> None:
    model = prompt_model(folders[family], TEMPLATES[family][0])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    features = model.preprocess(SENTENCES)
    rows = {mode: model.train(mode)(dict(features))["sentence_embedding"] for mode in (True, False)}
    never = torch.tensor(prompt_model(folders[family], TEMPLATES[family][0], "never").encode(SENTENCES))
    torch.testing.assert_close(rows[False], never, atol=1e-5, rtol=0)
    assert (rows[True] - never).abs().min(dim=0).values.max() > 0.1
    rows[True].sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "pooler" not in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_change_nothing(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = prompt_model(folders[family], TEMPLATES[family][1], "always")
    model.max_seq_length = 20
    model.save(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert isinstance(loaded[0], PromptTransformer)
    assert (loaded[0].template, loaded[0].remove_bias) == (TEMPLATES[family][1], "always")
    np.testing.assert_array_equal(loaded.encode(SENTENCES), model.encode(SENTENCES))


CONSUMER = """
import sys
sys.modules["st_clusterns"] = None  # not installed
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[2], model.encode(open(sys.argv[3], encoding="utf-8").read().split("\\n")))
"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_export_embeds_alike(family: str, side: str, folders: dict[str, Path]) -> None:
    model = prompt_model(folders[family], TEMPLATES[family][0], side=side)
    model.max_seq_length = 24
    sentences = [*SENTENCES, "", *(of_length(model, count) for count in (22, 23, 24)), " ".join(WORDS[:60])]
    exported = to_standard_modules(model)
    tokens = [model.preprocess([text])["input_ids"].tolist() for text in sentences]
    assert [exported.preprocess([text])["input_ids"].tolist() for text in sentences] == tokens
    np.testing.assert_allclose(exported.encode(sentences), model.encode(sentences), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_loads_without_this_package(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = prompt_model(folders[family], TEMPLATES[family][0])
    to_standard_modules(model).save(str(tmp_path / "exported"))
    (tmp_path / "texts").write_text("\n".join(SENTENCES), encoding="utf-8")
    files = [str(tmp_path / name) for name in ("exported", "rows.npy", "texts")]
    subprocess.run([sys.executable, "-c", CONSUMER, *files], check=True)
    np.testing.assert_allclose(np.load(files[1]), model.encode(SENTENCES), atol=1e-5)


def test_what_cannot_be_exported_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"remove_bias='always' cannot be expressed .*remove_bias = 'training'"):
        to_standard_modules(prompt_model(folders["bert"], TEMPLATES["bert"][0], "always"))
    with pytest.raises(ValueError, match="not a SentenceTransformer of a PromptTransformer alone"):
        to_standard_modules(load_model(save_bert(tmp_path)))


def decoder(folder: Path) -> None:
    bert_tokenizer().save_pretrained(folder)
    sizes = {**SIZES, "vocab_size": len(bert_tokenizer()), "num_key_value_heads": 1, "head_dim": 16}
    Qwen3Model(Qwen3Config(**sizes)).save_pretrained(folder)


def bert_decoder(folder: Path) -> None:
    bert_tokenizer().save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(bert_tokenizer()), is_decoder=True, **SIZES)).save_pretrained(folder)


GOOD = TEMPLATES["bert"][0]
BAD = {
    "no place": (GOOD.replace("{sentence}", "it"), None, r"template=.* must hold \{sentence\} exactly once"),
    "two places": (GOOD + " {sentence}", None, r"template=.* must hold \{sentence\} exactly once"),
    "no mask": (GOOD.replace("[MASK]", "it"), None, r"must hold the mask token, \[MASK\] or \[MASK\], exactly once"),
    "two masks": (GOOD + " [MASK]", None, r"must hold the mask token, .* exactly once"),
    "no mask token": (GOOD, lambda f: save_backbone("bert", f, mask_token=None), "tokenizer has no mask token"),
    "short table": (GOOD, lambda f: save_backbone("bert", f, positions=10), "10 tokens, .* no room .* 10 positions"),
    "short table, RoBERTa": (
        TEMPLATES["roberta"][0],
        lambda f: save_backbone("roberta", f, positions=12),
        "[0-9]+ tokens, .* no room .* 10 positions",
    ),
    "decoder": (GOOD, decoder, "Qwen3Model is a decoder"),
    "BERT as a decoder": (GOOD, bert_decoder, "BertModel is a decoder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    template, save, message = BAD[case]
    if save is not None:
        save(tmp_path)
    with pytest.raises(ValueError, match=message):
        PromptTransformer(str(folders["bert"] if save is None else tmp_path), template)


def test_bad_settings_of_a_good_model(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="remove_bias='sometimes' must be one of training, always, never"):
        PromptTransformer(str(folders["bert"]), GOOD, "sometimes")  # type: ignore[arg-type]
    model = prompt_model(folders["bert"], GOOD)
    with pytest.raises(ValueError, match=re.escape("template='query: ' must hold {sentence}")):
        model.encode("w1", prompt="query: ")
    model.max_seq_length = 10
    with pytest.raises(ValueError, match="max_seq_length=10"):
        model.encode("w1")
