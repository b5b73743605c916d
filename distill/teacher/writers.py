"""Teachers that answer prompts: a local model, in batches, and an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from limbeck.distill.data.blocks import start_token_id
from limbeck.distill.data.filters import Answer
from limbeck.distill.data.prompts import THINK_START, Prompt, prompt_messages, render_chat_prompt
from limbeck.distill.models import loading
from limbeck.distill.models.sampling import TextSampler
from limbeck.distill.recipe.schema import Generate
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.distill.teacher.endpoint import EndpointTeacher
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.checkpoints.load import load_config, load_model
from limbeck.registry.core.errors import BadInput, Unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = dict[str, Any]
SAMPLING_KEYS = {"max_new_tokens", "temperature", "top_p", "stop"}


class TeacherWriter(Protocol):
    """A teacher that answers prompts.

    Attributes:
        refusals: messages of the refused requests that were skipped.
    """

    @property
    def refusals(self) -> list[str]: ...

    def request(self, prompt: Prompt, seed: int) -> Request | None:
        """The request for an answer, with everything that it depends on; None if the prompt is too long."""

    def ask(self, requests: Mapping[str, Request], cached_tokens: tuple[int, int]) -> Iterator[int]:
        """Answer requests, given by digest, and store the answers; yields the number of new ones as they are done.

        Ends early if a limit on dollars is reached.

        Args:
            cached_tokens: tokens in and out of the answers that are already stored.
        """

    def answer(self, stored: Any) -> Answer:
        """Parse a stored answer."""


class LocalWriter:
    """A local teacher; see `TeacherWriter`. The model is loaded when the first answer is needed.

    Args:
        by_chat: prompts go through the tokenizer's chat template.
    """

    def __init__(
        self,
        teacher: ResolvedModel,
        tokenizer: PreTrainedTokenizerBase,
        generate: Generate,
        by_chat: bool,
        answer_cache: AnswerCache,
        trust_remote_code: bool = False,
    ) -> None:
        self.teacher, self.tokenizer, self.generate = teacher, tokenizer, generate
        self.by_chat, self.answer_cache = by_chat, answer_cache
        self.trust_remote_code = trust_remote_code
        self.refusals: list[str] = []
        config = load_config(teacher.path, trust_remote_code)
        self.context = getattr(config.get_text_config(), "max_position_embeddings", None)

    def request(self, prompt: Prompt, seed: int) -> Request | None:
        """See `TeacherWriter.request`."""
        opening = ""
        if self.by_chat:
            text = render_chat_prompt(self.tokenizer, prompt_messages(prompt, self.generate.system_prompt), prompt.path)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if text.rstrip().endswith(THINK_START):  # the template opens the reasoning, but it belongs to the answer
                opening = THINK_START + text.rpartition(THINK_START)[2]
        else:
            ids = [start_token_id(self.tokenizer), *self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]]
        if self.context and len(ids) + self.generate.max_new_tokens > self.context:
            return None
        return {
            "teacher": self.teacher.digest,
            "ids": ids,
            "opening": opening,
            "seed": seed if self.generate.temperature else 0,
            **self.generate.model_dump(include=SAMPLING_KEYS),
        }

    def ask(self, requests: Mapping[str, Request], cached_tokens: tuple[int, int]) -> Iterator[int]:
        """See `TeacherWriter.ask`. Batches hold prompts of similar length."""
        if not requests:
            return
        writer = TextSampler(
            self._load_teacher(),
            self.tokenizer,
            vocab_size=loading.vocabulary_size(self.tokenizer),
            **self.generate.model_dump(include=SAMPLING_KEYS),
        )
        # A batch is stored as a whole, so that after a kill the rest falls into the same batches as without one.
        order = sorted(requests, key=lambda digest: (len(requests[digest]["ids"]), digest))
        for start in range(0, len(order), self.generate.batch_size):
            batch = order[start : start + self.generate.batch_size]
            batch_requests = [requests[digest] for digest in batch]
            answers = writer.answers(
                [each["ids"] for each in batch_requests], [each["seed"] for each in batch_requests]
            )
            to_store = {
                digest: answer._replace(text=request["opening"] + answer.text)._asdict()
                for digest, request, answer in zip(batch, batch_requests, answers, strict=True)
            }
            self.answer_cache.add(to_store)
            yield len(batch)

    def _load_teacher(self) -> PreTrainedModel:
        """The teacher on its device; in bfloat16 on a GPU that supports it."""
        import torch

        model = load_model(self.teacher.path, self.trust_remote_code)
        torch.nn.Module.to(model, loading.device())
        if loading.device() == "cuda" and torch.cuda.is_bf16_supported():
            torch.nn.Module.to(model, torch.bfloat16)
        return model

    def answer(self, stored: Any) -> Answer:
        """See `TeacherWriter.answer`."""
        return Answer(**stored)


class EndpointWriter:
    """A teacher behind an endpoint; see `TeacherWriter`. Each answer is one request, so that none is paid twice.

    Args:
        tokenizer: of the served model, to skip prompts that are too long for it; None if it is unknown.
        by_chat: use /chat/completions, else /completions.
    """

    def __init__(
        self,
        teacher: EndpointTeacher,
        tokenizer: PreTrainedTokenizerBase | None,
        generate: Generate,
        by_chat: bool,
    ) -> None:
        self.teacher, self.tokenizer, self.generate, self.by_chat = teacher, tokenizer, generate, by_chat
        self.path = "/chat/completions" if by_chat else "/completions"
        self.needs_logprobs = generate.filter.min_logprob is not None

    def request(self, prompt: Prompt, seed: int) -> Request | None:
        """See `TeacherWriter.request`."""
        context = self.teacher.endpoint.context
        if context is not None and self.tokenizer is not None:
            messages = [turn["content"] for turn in prompt_messages(prompt, self.generate.system_prompt)]
            text = "".join(messages) if self.by_chat else prompt.text
            if len(self.tokenizer.encode(text)) + self.generate.max_new_tokens > context:
                return None
        return self.teacher.request(self.path, self._payload(prompt, seed))

    def _payload(self, prompt: Prompt, seed: int) -> dict[str, Any]:
        # Explicit values, since a server may have defaults of its own for a model.
        payload: dict[str, Any] = {
            "max_tokens": self.generate.max_new_tokens,
            "temperature": self.generate.temperature,
            "top_p": self.generate.top_p,
        }
        if self.generate.temperature:
            payload["seed"] = seed
        if self.generate.stop:
            payload["stop"] = list(self.generate.stop)
        if self.by_chat:
            payload["messages"] = prompt_messages(prompt, self.generate.system_prompt)
        else:
            payload["prompt"] = prompt.text
        if self.needs_logprobs:
            payload["logprobs"] = True if self.by_chat else 1
        return payload

    def ask(self, requests: Mapping[str, Request], cached_tokens: tuple[int, int]) -> Iterator[int]:
        """See `TeacherWriter.ask`.

        Raises BadInput if the endpoint returns no log-probabilities and a filter needs them; this costs one token.
        """
        if not requests:
            return
        self.teacher.paid_tokens = list(cached_tokens)
        if self.needs_logprobs:
            self._probe(next(iter(requests.values())))
        for _ in self.teacher.ask_all(list(requests.values()), self.answer, skip_refused=True):
            yield 1
        if self.teacher.refusals and not self.teacher.answer_count:
            raise BadInput(f"every request was refused, such as: {self.teacher.refusals[0]}")

    @property
    def refusals(self) -> list[str]:
        """See `TeacherWriter.refusals`."""
        return self.teacher.refusals

    def _probe(self, request: Request) -> None:
        short = {"path": self.path, "payload": {**request["payload"], "max_tokens": 1}}
        (answer,) = self.teacher.ask_all([short], self.answer)
        if answer[1].logprob is None:
            raise BadInput(
                f"{self.teacher.label} returns no log-probabilities, which generate.filter.min_logprob needs",
                fix="leave min_logprob out, or use a server that returns them",
            )

    def answer(self, stored: Any) -> Answer:
        """See `TeacherWriter.answer`. Raises Unreachable if the response has no answer."""
        try:
            choice = stored["choices"][0]
            text = _message_text(choice["message"]) if self.by_chat else str(choice["text"] or "")
        except (TypeError, KeyError, IndexError):
            raise Unreachable(f"{self.teacher.label} answers without a choice: {str(stored)[:200]}") from None
        usage = stored.get("usage") or {}
        output = int(usage.get("completion_tokens") or 0)
        return Answer(
            text,
            tokens=output or len(text.split()),  # words, if the server does not count tokens
            finished=choice.get("finish_reason") == "stop",
            logprob=_mean_logprob(choice.get("logprobs") or {}),
            input_tokens=int(usage.get("prompt_tokens") or 0),
            output_tokens=output,
        )


def _message_text(message: Mapping[str, Any]) -> str:
    """A chat answer, with the reasoning that some servers (vLLM, DeepSeek) return in a field of its own."""
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    content = str(message.get("content") or "")
    return f"{THINK_START}\n{str(thoughts).strip()}\n</think>\n\n{content}" if thoughts else content


def _mean_logprob(logprobs: Mapping[str, Any]) -> float | None:
    """The mean log-probability of a choice's tokens, in the form of either API; None if there are none."""
    values = [token.get("logprob") for token in logprobs.get("content") or []]  # chat
    values = values or list(logprobs.get("token_logprobs") or [])
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
