"""A teacher behind an OpenAI-compatible endpoint (vLLM, llama.cpp, `limbeck serve`, the commercial ones)."""

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
REFUSALS = 8  # of a server that has answered nothing yet: then it is no single request that is wrong
Request = dict[str, Any]


class EndpointTeacher:
    """Asks an endpoint; what it answered once is read from what was kept.

    Args:
        model: the endpoint, as `find` gives it.
        settings: how it is asked, and its prices.
        max_usd: no more is asked after so much was paid; None: no limit.

    Attributes:
        paid: tokens in and out; those of answers that were kept before are added by whoever counts them.
    """

    def __init__(
        self, model: ResolvedModel, settings: Teacher, answer_cache: AnswerCache, max_usd: float | None = None
    ) -> None:
        assert model.endpoint is not None
        self.endpoint: Endpoint = model.endpoint
        self.settings, self.answer_cache, self.max_usd = settings, answer_cache, max_usd
        self.client = EndpointClient(self.endpoint.url, settings.num_concurrent, settings.requests_per_minute)
        self.paid_tokens = [0, 0]
        self.refusals: list[str] = []  # what was said of requests that were refused and passed over
        self.answer_count = 0  # requests, by this object
        self._lock = threading.Lock()
        self._max_tokens_key = "max_tokens"  # what this server calls the most new tokens

    @property
    def label(self) -> str:
        return self.endpoint.label

    @property
    def usd(self) -> float:
        """Dollars for what was paid."""
        return self.settings.usd(*self.paid_tokens)

    def request(self, path: str, payload: dict[str, Any]) -> Request:
        """All that an answer depends on."""
        return {"url": self.endpoint.url, "path": path, "payload": {"model": self.endpoint.name, **payload}}

    def ask_all(
        self, requests: Sequence[Request], read: Callable[[Any], T], *, skip_refused: bool = False
    ) -> Iterator[tuple[int, T]]:
        """(number, what `read` makes of the answer) of each request, as they come; ends early after `max_usd`.

        Args:
            skip_refused: go on after a request that is refused, as for its length or what it says.

        Raises:
            BadInput: the server refuses a request. Unreachable: it does not answer; or what `read` raises.
        """

        def ask(request: Request) -> tuple[T] | None:
            digest = json_digest(request)
            if (answer := self.answer_cache.get(digest)) is None:
                if self.max_usd is not None and self.usd >= self.max_usd:
                    return None
                with self.answer_cache.request_lock(digest):
                    if (answer := self.answer_cache.get(digest)) is None:  # another process may have been quicker
                        try:
                            answer = self._post(request)
                        except BadInput as error:
                            if not skip_refused or self._gives_up(error):
                                raise
                            return None
                        read(answer)  # what cannot be read is not kept
                        self.answer_cache.add({digest: answer})
                        self._pay(answer)
            return (read(answer),)

        for number, answer in self.client.map_concurrently(ask, requests):
            if answer is not None:
                yield number, answer[0]

    def _gives_up(self, error: BadInput) -> bool:
        with self._lock:
            self.refusals.append(error.message)
            return self.answer_count == 0 and len(self.refusals) >= REFUSALS

    def _post(self, request: Request) -> Any:
        payload = dict(request["payload"])
        payload[self._max_tokens_key] = payload.pop("max_tokens")
        try:
            return self.client.request_json(request["path"], payload)
        except BadInput as error:
            # OpenAI's newer models know it by this name only, and say so.
            if self._max_tokens_key == "max_completion_tokens" or "max_completion_tokens" not in error.message:
                raise
            self._max_tokens_key = "max_completion_tokens"
            return self._post(request)

    def _pay(self, answer: Any) -> None:
        usage = answer.get("usage") or {}
        with self._lock:
            self.answer_count += 1
            for place, name in enumerate(("prompt_tokens", "completion_tokens")):
                self.paid_tokens[place] += int(usage.get(name) or 0)


def find(teacher: Teacher, recipe_folder: Path, store: Store) -> ResolvedModel:
    """The model that an endpoint serves, asked for its name; its folder says where it is, and has its tokenizer.

    Raises:
        BadInput: a URL or tokenizer that cannot be used, a model that is not served.
        Unreachable: the server does not answer.
    """
    tokenizer = None
    if teacher.tokenizer is None:
        found = endpoint.find_endpoint(teacher.model, teacher.num_concurrent)
    else:
        named = recipe_folder / teacher.tokenizer
        text = str(named) if named.is_dir() else teacher.tokenizer
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
