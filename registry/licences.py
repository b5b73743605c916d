"""What well-known licences and terms say about training a model on another's outputs.

A reading in short, no legal advice: terms change, so each entry names where to look. What is not listed is
unknown, and a recipe can say what its owner knows (`teacher.licence_allows_distillation`).
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit


class Terms(NamedTuple):
    """Whether a licence allows a student to learn from a model's outputs, on which terms, and where that is said."""

    allows: bool
    said: str
    source: str


_FREE = "it does not restrict what outputs are used for"
_SPDX = "https://spdx.org/licenses/"
_COMPETING = "outputs may not be used to develop models that compete with the provider's"
_RAIL = "a model that is distilled is a derivative: it has to pass on the use restrictions"

# By the identifiers of the Hugging Face hub, of SPDX, or a provider's name for models behind an API.
TERMS = {
    **dict.fromkeys(
        ["apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0",
         "cc-by-sa-4.0", "mpl-2.0", "lgpl-3.0", "gpl-3.0", "agpl-3.0", "odc-by", "psf-2.0"],
        Terms(True, _FREE, _SPDX),
    ),
    **dict.fromkeys(
        ["cc-by-nc-4.0", "cc-by-nc-sa-4.0"],
        Terms(True, "for purposes that are not commercial", "https://creativecommons.org/licenses/"),
    ),
    **dict.fromkeys(
        ["openrail", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m",
         "creativeml-openrail-m"],
        Terms(True, _RAIL, "https://www.licenses.ai/"),
    ),
    "llama2": Terms(
        False,
        "outputs may not be used to improve another large language model than Llama 2 and its derivatives (1.b.v)",
        "https://ai.meta.com/llama/license/",
    ),
    "llama3": Terms(
        False,
        "outputs may not be used to improve another large language model than Llama 3 and its derivatives (1.b.v)",
        "https://www.llama.com/llama3/license/",
    ),
    **{
        f"llama{version}": Terms(
            True,
            'a model trained on outputs has a name that begins with "Llama", and says "Built with Llama" (1.b.i)',
            f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
        )
        for version in ("3.1", "3.2", "3.3", "4")
    },
    "gemma": Terms(
        True,
        "a model distilled from Gemma or its outputs is a model derivative: Gemma's terms go with it (1.1, 3.1)",
        "https://ai.google.dev/gemma/terms",
    ),
    "deepseek": Terms(
        True,
        "distillation is allowed; a derivative passes on the use restrictions",
        "https://github.com/deepseek-ai/DeepSeek-LLM/blob/main/LICENSE-MODEL",
    ),
    "qwen": Terms(
        True,
        'a model trained on outputs and distributed says "Built with Qwen" or "Improved using Qwen"',
        "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE",
    ),
    "qwen-research": Terms(
        True,
        'for research alone; a model trained on outputs says "Built with Qwen" or "Improved using Qwen"',
        "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
    ),
    "tongyi-qianwen": Terms(
        False,
        "outputs may not be used to improve another large language model than Tongyi Qianwen and its derivatives",
        "https://github.com/QwenLM/Qwen/blob/main/Tongyi%20Qianwen%20LICENSE%20AGREEMENT",
    ),
    "openai": Terms(False, _COMPETING, "https://openai.com/policies/row-terms-of-use/"),
    "anthropic": Terms(False, _COMPETING, "https://www.anthropic.com/legal/commercial-terms"),
    "gemini": Terms(False, _COMPETING, "https://ai.google.dev/gemini-api/terms"),
}  # fmt: skip


# Whose terms hold for what comes from an endpoint.
HOSTS = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gemini",
}


def of_endpoint(url: str) -> str | None:
    """The name in `TERMS` of the provider behind an endpoint; None where it is none of those known."""
    return HOSTS.get(urlsplit(url).hostname or "")


def terms(licence: str | None) -> Terms | None:
    """What is known of a licence, however its name is spelt (`Apache 2.0`); None where nothing is."""
    return _BY_NAME.get(_plain(licence)) if licence else None


def allows(licence: str | None) -> bool | None:
    """Whether a licence allows training on the outputs of a model that is under it; None where that is not known."""
    known = terms(licence)
    return known.allows if known else None


def _plain(licence: str) -> str:
    return re.sub(r"licen[cs]e|version|[\s_,-]+", "", licence.lower())


_BY_NAME = {_plain(name): each for name, each in TERMS.items()}
