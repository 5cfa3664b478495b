"""Embedders: unit vectors of path texts, for RAIN's similarity update between siblings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.types import Got, HostCall, Want
from raindecode.errors import EvaluatorError
from raindecode.search.context import SearchContext

# Mean state of the last prompt tokens, one per request: read once, since a request that is paused loses its slots.
_centers: WeakKeyDictionary[Ledger, Tensor] = WeakKeyDictionary()


@dataclass(frozen=True)
class Paths:
    """Suffixes of one token path, each a text to embed: from a search node's first token to the rollout's end.

    Attributes:
        branch: the path with the rollout at its end.
        starts: ascending positions in the path.
        texts: the suffixes as text.
    """

    branch: Branch
    starts: list[int]
    texts: Callable[[], list[str]]


class Embedder(Protocol):
    """Turns path texts into unit vectors."""

    def dimension(self, context: SearchContext) -> int:
        """Length of the vectors."""
        ...

    def embed(self, context: SearchContext, paths: Paths) -> Generator[Any, Any, Tensor]:
        """[len(paths.starts), dimension] float32, rows of length 1."""
        ...


@dataclass(frozen=True)
class HiddenStates:
    """The language model's own mean final hidden state over the tokens of a path. Costs no extra forward.

    Where several models are mixed, the first of them whose weight is not 0.

    Attributes:
        center: subtract the mean state of the prompt's last tokens before normalising. Raw hidden states all point the
            same way (cosines near 1 between any two texts), which would make every sibling look alike.
    """

    center: bool = True
    _CENTER_TOKENS = 16

    def dimension(self, context: SearchContext) -> int:
        return int(context.first_model.config.get_text_config().hidden_size)

    def embed(self, context: SearchContext, paths: Paths) -> Generator[Any, Any, Tensor]:
        wants = [Want(paths.branch, pool_from=paths.starts)]
        request, ids = context.ledger.origin, context.request.prompt_ids
        if self.center and request not in _centers:
            branch = context.open_first(ids)
            wants.append(Want(branch, pool_from=[max(0, len(ids) - self._CENTER_TOKENS)]))
        answers: list[Got] = yield wants
        for want, answer in zip(wants[1:], answers[1:], strict=True):
            want.branch.release()
            assert answer.pooled is not None
            _centers[request] = answer.pooled
        pooled = answers[0].pooled
        assert pooled is not None
        if self.center:
            pooled = pooled - _centers[request]
        return unit_rows(pooled)


@dataclass(frozen=True, eq=False)  # hashed by identity: a function of your own need not be hashable
class TextEmbedder:
    """A function of your own: texts -> vectors. Called once for all texts that are ready, of all requests."""

    function: Callable[[list[str]], Any]
    size: int

    def dimension(self, context: SearchContext) -> int:
        return self.size

    def embed(self, context: SearchContext, paths: Paths) -> Generator[Any, Any, Tensor]:
        try:
            rows: Sequence[Any] = yield HostCall(self._rows, paths.texts())
        except GeneratorExit:
            raise
        except Exception as error:
            raise EvaluatorError(f"the embedder failed: {type(error).__name__}: {error}") from error
        return unit_rows(torch.from_numpy(np.stack(rows)))

    def _rows(self, texts: list[str]) -> list[Any]:
        vectors = np.asarray(self.function(texts), dtype=np.float32)
        if vectors.shape != (len(texts), self.size) or not np.isfinite(vectors).all():
            raise ValueError(
                f"it returned shape {vectors.shape}; allowed: finite numbers of shape ({len(texts)}, {self.size})"
            )
        return list(vectors)


def sentence_transformer(name: str = "sentence-transformers/all-MiniLM-L6-v2") -> TextEmbedder:
    """The published encoder, when the package sentence-transformers and its model are there.

    Raises:
        ImportError: sentence-transformers is not installed (pip install 'rainkernels[embed]').
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(name)
    return TextEmbedder(
        lambda texts: model.encode(texts, normalize_embeddings=True), int(model.get_sentence_embedding_dimension())
    )


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero."""
    norms = vectors.float().norm(dim=-1, keepdim=True)
    unit: Tensor = vectors.float() / norms.clamp_min(1e-12)
    return unit.contiguous()
