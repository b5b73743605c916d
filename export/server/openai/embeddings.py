"""The route POST /v1/embeddings: texts as vectors of length 1, off unless the server was started with `--embeddings`.

The API is https://platform.openai.com/docs/api-reference/embeddings. Fields that it does not have are ignored.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, MaxLen, MinLen
from fastapi import FastAPI, Request

from limbeck.export.server.hot_swap import ServedModel
from limbeck.export.server.openai.completions import TokenIds, encode_prompt
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.http import cancel_on_disconnect, check_model, warn_of_unknown_fields

MAX_TEXTS = 2048  # as OpenAI


@dataclass(kw_only=True)
class EmbeddingRequest:
    """The body of POST /v1/embeddings."""

    input: str | Annotated[list[str], MinLen(1), MaxLen(MAX_TEXTS)] | TokenIds | Annotated[list[TokenIds], MinLen(1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None  # default: float
    dimensions: Annotated[int, Ge(1)] | None = None  # only the size that the model has
    user: str | None = None  # accepted and ignored

    def texts(self) -> list[str] | list[list[int]]:
        """The texts: as such, or as token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return self.input  # type: ignore[return-value]


def add_embedding_routes(api: FastAPI, served: ServedModel) -> None:
    """Add the route. A request keeps the artifact that is served when it arrives."""

    @api.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        await warn_of_unknown_fields(request, body)
        check_model(served, body.model)
        pooling = served.embeddings
        if pooling is None:
            message = "this server gives no embeddings: start it with --embeddings mean or --embeddings last"
            raise APIError(400, message, code="embeddings_off")
        if len(body.texts()) > MAX_TEXTS:
            raise APIError(400, f"input has {len(body.texts())} texts; the most are {MAX_TEXTS}", "input")
        scheduler = served.current().scheduler
        prompts = await asyncio.to_thread(
            lambda: [encode_prompt(scheduler.runtime, text, 0, "input") for text in body.texts()]
        )
        vectors = await cancel_on_disconnect(request, scheduler.embeddings(prompts, pooling))
        if body.dimensions not in (None, len(vectors[0])):
            raise APIError(400, f"dimensions: this model's embeddings have {len(vectors[0])}", "dimensions")
        tokens = sum(map(len, prompts))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encode(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": served.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _encode(vector: np.ndarray, encoding: str | None) -> str | list[float]:
    """A vector as a list, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
