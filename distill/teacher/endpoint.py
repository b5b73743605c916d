"""A teacher behind an OpenAI-compatible endpoint: vLLM, llama.cpp, `limbeck serve`, or a commercial API."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.registry.catalog import endpoint
from limbeck.registry.catalog.endpoint import Endpoint, EndpointClient
from limbeck.registry.catalog.model_ref import ENDPOINT, TEXT_FILES, ResolvedModel, resolve_model
from limbeck.registry.core.digest import MANIFEST, file_digest, folder_digest, json_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import atomic_write, home

if TYPE_CHECKING:
    from limbeck.distill.recipe.schema import Teacher
    from limbeck.registry.mlflow.store import Store

T = TypeVar("T")
MAX_REFUSALS = 8  # refused requests before the first answer: then the fault is not in a single request
Request = dict[str, Any]


class EndpointTeacher:
    """Sends requests to an endpoint, and reads answers that are already stored from the answer cache.

    Args:
        model: the endpoint, from `resolve_endpoint`.
        settings: the recipe's `[teacher]`: rate limits and prices.
        max_usd: send no request after this much was paid; None: no limit.

    Attributes:
        paid_tokens: tokens in and out. It begins at 0; callers add the tokens of answers stored before.
        refusals: messages of the refused requests that were skipped.
        answer_count: requests that this object had answered.
    """

    def __init__(
        self, model: ResolvedModel, settings: Teacher, answer_cache: AnswerCache, max_usd: float | None = None
    ) -> None:
        assert model.endpoint is not None
        self.endpoint: Endpoint = model.endpoint
        self.settings, self.answer_cache, self.max_usd = settings, answer_cache, max_usd
        self.client = EndpointClient(self.endpoint.url, settings.num_concurrent, settings.requests_per_minute)
        self.paid_tokens = [0, 0]
        self.refusals: list[str] = []
        self.answer_count = 0
        self._lock = threading.Lock()
        self._max_tokens_key = "max_tokens"  # this server's name of the parameter

    @property
    def label(self) -> str:
        return self.endpoint.label

    @property
    def usd(self) -> float:
        """The dollars of the paid tokens."""
        return self.settings.usd(*self.paid_tokens)

    def request(self, path: str, payload: dict[str, Any]) -> Request:
        """A request with everything that its answer depends on."""
        return {"url": self.endpoint.url, "path": path, "payload": {"model": self.endpoint.name, **payload}}

    def ask_all(
        self, requests: Sequence[Request], parse: Callable[[Any], T], *, skip_refused: bool = False
    ) -> Iterator[tuple[int, T]]:
        """Yield (number of the request, `parse(answer)`) in the order of the answers; ends early after `max_usd`.

        Args:
            parse: an answer that it raises for is not stored.
            skip_refused: skip a request that the server refuses, for its length or its content.

        Raises:
            BadInput: the server refuses a request.
            Unreachable: it does not answer; or what `parse` raises.
        """

        def ask(request: Request) -> tuple[T] | None:
            answer = self.answer_cache.get(json_digest(request))
            if answer is None:
                answer = self._send(request, parse, skip_refused)
            return None if answer is None else (parse(answer),)

        for number, answer in self.client.map_concurrently(ask, requests):
            if answer is not None:
                yield number, answer[0]

    def _send(self, request: Request, parse: Callable[[Any], Any], skip_refused: bool) -> Any | None:
        """Send a request that has no stored answer; None if the money is spent or the request is skipped."""
        if self.max_usd is not None and self.usd >= self.max_usd:
            return None
        digest = json_digest(request)
        with self.answer_cache.request_lock(digest):
            answer = self.answer_cache.get(digest)
            if answer is not None:  # another process was faster
                return answer
            try:
                answer = self._post(request)
            except BadInput as error:
                if not skip_refused or self._refuses_everything(error):
                    raise
                return None
            parse(answer)
            self.answer_cache.add({digest: answer})
            self._count_payment(answer)
            return answer

    def _refuses_everything(self, error: BadInput) -> bool:
        """Record a refusal; whether there are so many that no request is going to be answered."""
        with self._lock:
            self.refusals.append(error.message)
            return self.answer_count == 0 and len(self.refusals) >= MAX_REFUSALS

    def _post(self, request: Request) -> Any:
        payload = dict(request["payload"])
        payload[self._max_tokens_key] = payload.pop("max_tokens")
        try:
            return self.client.request_json(request["path"], payload)
        except BadInput as error:
            # OpenAI's newer models accept only this name, and their error message contains it.
            if self._max_tokens_key == "max_completion_tokens" or "max_completion_tokens" not in error.message:
                raise
            self._max_tokens_key = "max_completion_tokens"
            return self._post(request)

    def _count_payment(self, answer: Any) -> None:
        usage = answer.get("usage") or {}
        with self._lock:
            self.answer_count += 1
            for place, name in enumerate(("prompt_tokens", "completion_tokens")):
                self.paid_tokens[place] += int(usage.get(name) or 0)


def resolve_endpoint(teacher: Teacher, recipe_folder: Path, store: Store) -> ResolvedModel:
    """Resolve the model that an endpoint serves, as a folder with its address and the tokenizer of the recipe.

    Raises:
        BadInput: a URL or tokenizer that cannot be used, or a model that the endpoint does not serve.
        Unreachable: the server does not answer.
    """
    tokenizer = None
    if teacher.tokenizer is None:
        found = endpoint.find_endpoint(teacher.model, teacher.num_concurrent)
    else:
        named = recipe_folder / teacher.tokenizer
        text = str(named) if named.exists() else teacher.tokenizer
        model = resolve_model(teacher.model, store, tokenizer=text, num_concurrent=teacher.num_concurrent)
        assert model.endpoint is not None
        found, tokenizer = model.endpoint, model.path
    files = [path for pattern in TEXT_FILES for path in tokenizer.glob(pattern)] if tokenizer else []
    files = [path for path in files if path.name not in (MANIFEST, ENDPOINT) and ".index." not in path.name]
    key = json_digest([found.label, {path.name: file_digest(path) for path in files}])
    folder = home() / "endpoints" / key[:16]
    if not (folder / ENDPOINT).exists():
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            for path in files:
                shutil.copy(path, temporary / path.name)
            (temporary / ENDPOINT).write_text(json.dumps({"url": found.url, "name": found.name}) + "\n")
    return ResolvedModel(folder, folder_digest(folder), found.label, None, "endpoint", found)
