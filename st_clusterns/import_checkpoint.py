"""Convert a checkpoint of the authors' code (github.com/djz233/ClusterNS) to a sentence-transformers model.

The layout: `config.json`, `pytorch_model.bin` or `model.safetensors`, and the tokenizer's files. The weights are those
of a `BertForCL` or `RobertaForCL`: the encoder under `bert.` or `roberta.`, the training-only head `mlp.dense.*`, and
the centroids `cluster.*`. It does not say whether the model was trained with a template: a preset does.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from st_clusterns.citations import CLUSTERNS
from st_clusterns.files import write_text
from st_clusterns.losses.presets import find_preset
from st_clusterns.prompt_encoder import PromptTransformer, to_standard_modules

FAMILIES = ("bert", "roberta")
HEAD = "mlp.dense."
DROPPED = ("cluster.", "lm_head.")  # of training alone: the centroids, and the head of the masked language model
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # older transformers saved them
CARD = """
## Origin

Converted by `st-clusterns import-checkpoint` from a checkpoint of the authors' code
([djz233/ClusterNS](https://github.com/djz233/ClusterNS)), as `{preset}`, whose published mean of the seven STS tests is
{average}. {reads} The head of training is kept as the encoder's pooler, which the embeddings do not use.

```bibtex{citation}```
"""


def import_checkpoint(
    source: str | Path, output: str | Path, preset: str, template: str | None = None, standard: bool = False
) -> SentenceTransformer:
    """Convert a checkpoint and save it with a card; return the model.

    Without a template, the embedding is the [CLS] token's hidden state. With one it is the mask token's, in a
    `PromptTransformer`. The training-only head becomes the encoder's pooler, as SimCSE's converter has it, which the
    embeddings do not use.

    Args:
        source: the folder of the checkpoint.
        output: a folder that does not exist yet.
        preset: the published row that the checkpoint is of, one of `st_clusterns.PRESETS`. It has the template.
        template: another template than the preset's first one, see `st_clusterns.prompt_encoder`.
        standard: whether a prompt model is saved in modules of sentence-transformers alone (`to_standard_modules`).

    Raises:
        FileExistsError: if `output` exists.
        FileNotFoundError: if the weights, the config or the tokenizer are missing.
        ValueError: if weights are unknown, missing or of another shape, all of them named, or the preset is of another
            family.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise FileExistsError(f"output={str(output)!r} exists already: choose another folder, or remove it first.")
    row = find_preset(preset)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source / 'config.json'} is missing: {str(source)!r} is no checkpoint.")
    config = AutoConfig.from_pretrained(source)
    wanted = "roberta" if "roberta" in row.model else "bert"
    if config.model_type != wanted:
        raise ValueError(
            f"preset={preset!r} is a {wanted} model, {source / 'config.json'} is of {config.model_type!r}."
        )
    network = AutoModel.from_config(config)
    network.load_state_dict(convert_weights(read_weights(source), network.state_dict(), config.model_type))
    if not any((source / name).is_file() for name in VOCABULARIES):  # transformers would make an empty tokenizer
        raise FileNotFoundError(f"{str(source)!r} has no {', '.join(VOCABULARIES)}: copy the tokenizer of {row.model}.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    template = template or (row.templates[0] if row.templates else None)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = published_encoder(folder, template)
    if template and standard:
        model = to_standard_modules(model)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(str(partial))
    reads = f"It reads a sentence within `{template}`." if template else "The embedding is the [CLS] token's."
    card = CARD.format(preset=preset, average=row.average, reads=reads, citation=CLUSTERNS)
    page = partial / "README.md"
    write_text(page.read_text(encoding="utf-8") + card, page)
    os.replace(partial, output)
    return model


def published_encoder(name: str, template: str | None = None) -> SentenceTransformer:
    """Make a model that embeds as the paper does: by the mask token of a template, or by the [CLS] token without one.

    Args:
        name: the BERT or RoBERTa, by its name on the hub or path.
        template: the text around a sentence (`PromptTransformer`).
    """
    if template:
        return SentenceTransformer(modules=[PromptTransformer(name, template)])
    transformer = Transformer(name)
    config = transformer.config
    positions = config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)
    transformer.max_seq_length = min(transformer.max_seq_length, positions)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "cls")])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint; FileNotFoundError if there are none."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        return dict(load_file(safe))
    if pickled.is_file():
        return dict(torch.load(pickled, map_location="cpu", weights_only=True))
    raise FileNotFoundError(f"{str(folder)!r} holds neither model.safetensors nor pytorch_model.bin.")


def convert_weights(found: dict[str, Tensor], expected: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return the encoder's weights by their names in transformers; a ValueError names all that do not fit."""
    converted, unknown = {}, []
    for name, value in found.items():
        inner = name.removeprefix(f"{family}.")
        if name.startswith(HEAD):
            converted[f"pooler.dense.{name.removeprefix(HEAD)}"] = value
        elif inner != name and inner.startswith("pooler."):
            continue  # of the model that the training began with; it was not trained
        elif inner != name and inner in expected:
            converted[inner] = value
        elif not (name.startswith(DROPPED) or inner in BUFFERS):
            unknown.append(name)
    missing = [_name_in_source(name, family) for name in expected if name not in converted]
    shapes: dict[str, Any] = {
        _name_in_source(name, family): f"{tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in converted.items()
        if name in expected and value.shape != expected[name].shape
    }
    problems = {"unknown": unknown, "missing": missing, "of another shape": [f"{n}: {s}" for n, s in shapes.items()]}
    if any(problems.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"The weights are not those of a {family} checkpoint of ClusterNS ({told}).")
    return {name: value.float() for name, value in converted.items()}


def _name_in_source(name: str, family: str) -> str:
    return name.replace("pooler.dense.", HEAD) if name.startswith("pooler.") else f"{family}.{name}"
