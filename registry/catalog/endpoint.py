"""OpenAI-compatible servers: resolves a URL to a server and model, and sends requests with retries and limits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from limbeck.registry.core.errors import BadInput, Unreachable
from limbeck.registry.core.terminal import print_status
from limbeck.registry.mlflow.client import network_error_reason

if TYPE_CHECKING:
    import requests

API_KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 6
BACKOFF_S = 1.0  # before the second try; doubled before each further one
MAX_WAIT_S = 120.0
TIMEOUT_S = (10, 600)  # for the connection; for the answer
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Endpoint:
    """One model of an OpenAI-compatible server.

    Attributes:
        url: including /v1, without credentials.
        name: of the model.
        context: length in tokens; None if the server does not report it.
        num_concurrent: number of concurrent requests, at most.
    """

    url: str
    name: str
    context: int | None = None
    num_concurrent: int = 4

    @property
    def label(self) -> str:
        """The URL with the model's name, as `find_endpoint` takes it."""
        return f"{self.url}#{self.name}"


class EndpointClient:
    """Sends requests to a server, from several threads if needed.

    Args:
        url: including /v1.
        num_concurrent: number of concurrent requests, at most.
        requests_per_minute: rate limit, evenly spaced; None: no limit.
    """

    def __init__(self, url: str, num_concurrent: int = 1, requests_per_minute: float | None = None) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self.url = url
        self.num_concurrent = num_concurrent
        self._spacing = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0  # time.monotonic() from which on the next request may be sent
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._session = requests.Session()
        self._session.auth = _authorize
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=num_concurrent))

    def stop(self) -> None:
        """Give up all retries that are waiting."""
        self._stopped.set()

    def request_json(self, path: str, payload: dict[str, Any] | None = None, *, tries: int | None = None) -> Any:
        """The JSON answer to a POST of `payload`, or to a GET if it is None.

        Retries after a dropped connection, a timeout, a 5xx or a 429 (after its Retry-After).

        Args:
            tries: number of tries, at most; None for TRIES.

        Raises:
            BadInput: the server refuses the request, so a retry would not help.
            Unreachable: it does not answer, or not with JSON.
        """
        tries = TRIES if tries is None else tries
        why = "stopped"
        for number in range(tries):
            if self._stopped.wait(self._reserve_slot()):
                break
            try:
                return self._send(path, payload)
            except _TemporaryFailure as failure:
                why, pause = failure.reason, max(min(BACKOFF_S * 2**number, MAX_WAIT_S), failure.retry_after)
            if pause > MAX_WAIT_S:
                why += f"; its Retry-After is {pause:.0f} s"
                break
            if number + 1 < tries and not self._pause(pause, why):
                break
        raise Unreachable(f"{self.url} cannot be used: {why}")

    def _send(self, path: str, payload: dict[str, Any] | None) -> Any:
        """One request. Raises as `request_json`, or _TemporaryFailure if a retry may help."""
        import requests

        method = "GET" if payload is None else "POST"
        try:
            answer = self._session.request(method, f"{self.url}{path}", json=payload, timeout=TIMEOUT_S)
            if answer.ok:
                return answer.json()
        except requests.JSONDecodeError:
            raise Unreachable(f"{self.url}{path} does not answer with JSON", fix="check the URL") from None
        except requests.RequestException as error:
            raise _TemporaryFailure(network_error_reason(error)) from None
        reason = _error_text(answer)
        if answer.status_code not in TEMPORARY:
            raise _refusal_error(self.url, answer.status_code, reason)
        raise _TemporaryFailure(reason, _retry_after(answer))

    def _pause(self, seconds: float, why: str) -> bool:
        """Wait before the next try. False if the client was stopped meanwhile."""
        if seconds >= 5:
            print_status(f"{self.url}: {why}; trying again in {seconds:.0f} s")
        return not self._stopped.wait(seconds)

    def _reserve_slot(self) -> float:
        """Reserve the next slot of the rate limit. Returns the seconds until then."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._spacing
            return start - now

    def map_concurrently(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        """(index, answer) of each of `items` in the order of completion; `num_concurrent` at a time.

        After a failure, yields the answers to the requests that are running, then raises the failure.
        """
        failure: BaseException | None = None
        waiting = list(enumerate(items))[::-1]
        running: dict[Future[Answer], int] = {}
        pool = ThreadPoolExecutor(self.num_concurrent)
        try:
            while True:
                while waiting and not failure and len(running) < self.num_concurrent:
                    index, item = waiting.pop()
                    running[pool.submit(function, item)] = index
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    failure = failure or future.exception()
                    if not future.exception():
                        yield index, future.result()
        except BaseException:
            self.stop()  # nobody reads the answers any more
            raise
        finally:
            pool.shutdown(wait=False)
        if failure:
            raise failure


class _TemporaryFailure(Exception):
    """A request failed, and a retry may help."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        self.reason = reason
        self.retry_after = retry_after  # seconds, from the server


def find_endpoint(text: str, num_concurrent: int = 4) -> Endpoint:
    """The endpoint of `http://HOST:PORT/v1#NAME`; without a name, that of the only model that it serves.

    Raises:
        BadInput: a URL with credentials or a query, or a model that is not served.
        Unreachable: the server does not answer.
    """
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query or not parts.hostname:
        raise BadInput(
            f"{url_without_secrets(text)}: the URL of an endpoint needs a host, and has no password or query",
            fix=f"give http://HOST:PORT/v1, and the API key in {API_KEY_VARIABLE}",
        )
    url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/completions')}"
    served = _served_models(EndpointClient(url))
    if not parts.fragment and len(served) != 1:
        raise BadInput(
            f"{url} serves {len(served)} models", fix=f"name one: {url}#NAME; {_describe_served_models(served)}"
        )
    name = parts.fragment or next(iter(served))
    if name not in served:
        raise BadInput(f"{url} does not serve {name!r}", fix=_describe_served_models(served))
    return Endpoint(url, name, served[name], num_concurrent)


def url_without_secrets(text: str) -> str:
    """A URL without user, password and query, which may be secret."""
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _served_models(server: EndpointClient) -> dict[str, int | None]:
    """Name -> context in tokens of the models that a server has; None if it does not report it, unlike vLLM."""
    answer = server.request_json("/models", tries=2)
    try:
        return {str(model["id"]): model.get("max_model_len") for model in answer["data"]}
    except (TypeError, KeyError, AttributeError):
        raise Unreachable(
            f"{server.url}/models is not a list of models", fix="check that the URL ends in /v1"
        ) from None


def _describe_served_models(names: dict[str, Any]) -> str:
    return f"it serves {', '.join(list(names)[:8]) or 'none'}"


def _authorize(request: Any) -> Any:
    """Add the API key from the environment. Without this, requests would take a password from ~/.netrc."""
    key = os.environ.get(API_KEY_VARIABLE)
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _error_text(answer: requests.Response) -> str:
    """The status and message of an error answer, without the API key."""
    try:
        body = answer.json()
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = answer.text.strip() or answer.reason or ""
    key = os.environ.get(API_KEY_VARIABLE)
    if key:
        text = text.replace(key, "***")
    return f"{answer.status_code} {text[:300]}".strip()


def _refusal_error(url: str, status: int, why: str) -> BadInput:
    if status in (401, 403):
        return BadInput(f"{url} refuses the API key: {why}", fix=f"set {API_KEY_VARIABLE} to the server's key")
    return BadInput(f"{url} refuses the request: {why}")


def _retry_after(answer: requests.Response) -> float:
    """Seconds of the Retry-After header, in both of its forms; 0 without one."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return float(Retry().parse_retry_after(answer.headers["Retry-After"]))
    except (KeyError, InvalidHeader):
        return 0.0
