"""OpenAI-compatible servers: which server and model a URL means, and how one is asked."""

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
LONGEST_WAIT_S = 120.0
TIMEOUT_S = (10, 600)  # to connect; to answer
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(frozen=True)
class Endpoint:
    """One model of an OpenAI-compatible server.

    Attributes:
        url: up to and with /v1; no credentials are in it.
        name: the model's. context: its most tokens, where the server tells.
        num_concurrent: the most requests at a time.
    """

    url: str
    name: str
    context: int | None = None
    num_concurrent: int = 4

    @property
    def label(self) -> str:
        """The URL with the model's name, as it can be given again."""
        return f"{self.url}#{self.name}"


class EndpointClient:
    """Asks a server, from several threads where need be.

    Args:
        url: up to and with /v1. num_concurrent: the most requests at a time.
        requests_per_minute: the most requests that are sent, evenly spaced; None: no limit.
    """

    def __init__(self, url: str, num_concurrent: int = 1, requests_per_minute: float | None = None) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self.url = url
        self.num_concurrent = num_concurrent
        self._spacing = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0  # when the next request may be sent
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._session = requests.Session()
        self._session.auth = _authorize
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=num_concurrent))

    def stop(self) -> None:
        """Let requests that wait for another try give up."""
        self._stopped.set()

    def request_json(self, path: str, payload: dict[str, Any] | None = None, *, tries: int | None = None) -> Any:
        """The JSON that the server answers to a POST of `payload`, or to a GET where there is none.

        What may pass is tried again: a dropped connection, a timeout, a 5xx or a 429 (after the time that its
        Retry-After says).

        Raises:
            BadInput: the server refuses the request; trying again would not help.
            Unreachable: it does not answer, or not with JSON.
        """
        import requests

        tries = TRIES if tries is None else tries
        why = "stopped"
        for number in range(tries):
            pause = min(BACKOFF_S * 2**number, LONGEST_WAIT_S)
            if self._stopped.wait(self._seconds_until_turn()):
                break
            try:
                method = "GET" if payload is None else "POST"
                answer = self._session.request(method, f"{self.url}{path}", json=payload, timeout=TIMEOUT_S)
                if answer.ok:
                    return answer.json()
                why = _error_text(answer)
                if answer.status_code not in TEMPORARY:
                    raise _refusal_error(self.url, answer.status_code, why)
                pause = max(pause, _retry_after(answer))
            except requests.JSONDecodeError:
                raise Unreachable(f"{self.url}{path} does not answer with JSON", fix="check the URL") from None
            except requests.RequestException as error:
                why = network_error_reason(error)
            if pause > LONGEST_WAIT_S:
                why += f"; it asks to wait {pause:.0f} s"
                break
            if number + 1 < tries:
                if pause >= 5:
                    print_status(f"{self.url}: {why}; trying again in {pause:.0f} s")
                if self._stopped.wait(pause):
                    break
        raise Unreachable(f"{self.url} cannot be asked: {why}")

    def _seconds_until_turn(self) -> float:
        """Seconds until a request may be sent; the place in line is taken."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._spacing
            return start - now

    def map_concurrently(self, ask: Callable[[Q], A], items: Sequence[Q]) -> Iterator[tuple[int, A]]:
        """(number, answer) of each of `items`, as they come; `num_concurrent` at a time.

        After a failure what is under way is waited for and given; then the failure is raised.
        """
        failed: BaseException | None = None
        waiting = iter(enumerate(items))
        running: dict[Future[A], int] = {}
        pool = ThreadPoolExecutor(self.num_concurrent)
        try:
            while True:
                while not failed and len(running) < self.num_concurrent and (following := next(waiting, None)):
                    running[pool.submit(ask, following[1])] = following[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    failed = failed or future.exception()
                    if not future.exception():
                        yield number, future.result()
        except BaseException:
            self.stop()  # nobody waits for another try
            raise
        finally:
            pool.shutdown(wait=False)
        if failed:
            raise failed


def find_endpoint(text: str, num_concurrent: int = 4) -> Endpoint:
    """The endpoint that `http://HOST:PORT/v1#NAME` means; without a name, the only model that it serves.

    Raises:
        BadInput: a URL with credentials or a query in it, or a model that is not served.
        Unreachable: the server does not answer.
    """
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query or not parts.hostname:
        raise BadInput(
            f"{url_without_secrets(text)}: the URL of an endpoint has a host, and no password or query in it",
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
    """A URL without what may be secret in it."""
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _served_models(server: EndpointClient) -> dict[str, int | None]:
    """The names of the models that a server has, and their contexts where it tells them, as vLLM does."""
    answer = server.request_json("/models", tries=2)
    try:
        return {str(model["id"]): model.get("max_model_len") for model in answer["data"]}
    except (TypeError, KeyError, AttributeError):
        raise Unreachable(f"{server.url}/models is no list of models", fix="check that the URL ends in /v1") from None


def _describe_served_models(names: dict[str, Any]) -> str:
    return f"it serves {', '.join(list(names)[:8]) or 'none'}"


def _authorize(request: Any) -> Any:
    """The API key, from the environment only; set here, since requests would rather take one from ~/.netrc."""
    if key := os.environ.get(API_KEY_VARIABLE):
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _error_text(answer: requests.Response) -> str:
    """What an error answer says, without the key."""
    try:
        body = answer.json()
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = answer.text.strip() or answer.reason or ""
    key = os.environ.get(API_KEY_VARIABLE)
    return f"{answer.status_code} {(text.replace(key, '***') if key else text)[:300]}".strip()


def _refusal_error(url: str, status: int, why: str) -> BadInput:
    if status in (401, 403):
        return BadInput(f"{url} refuses the API key: {why}", fix=f"set {API_KEY_VARIABLE} to the server's key")
    return BadInput(f"{url} refuses the request: {why}")


def _retry_after(answer: requests.Response) -> float:
    """Seconds that the server asks to wait; both of the header's forms."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return float(Retry().parse_retry_after(answer.headers["Retry-After"]))
    except (KeyError, InvalidHeader):
        return 0.0
