"""Stub models whose features carry their embeddings: most tests run in milliseconds and need no weights."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from sentence_transformers import SentenceTransformer
from tiny_bert import load_model, save_bert
from torch import Tensor, nn
from two_processes import TwoProcesses

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


class StubModel(nn.Module):
    """Stands in for a SentenceTransformer: a feature dict holds the embeddings, dropout makes the second view."""

    def __init__(self, dimension: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.dimension = dimension
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def get_embedding_dimension(self) -> int:
        return self.dimension

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        return {"sentence_embedding": self.dropout(features["embedding"])}


@pytest.fixture
def stub() -> StubModel:
    return StubModel()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def model(bert: Path) -> SentenceTransformer:
    return load_model(bert)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    processes = TwoProcesses(tmp_path_factory.mktemp("group"))
    yield processes
    processes.stop()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
