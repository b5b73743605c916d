"""Artifacts whose tokenizer has a chat template."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.export.export_helpers import rewrite_manifest

BOS = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ArtifactWithTemplate = Callable[..., Path]


def copy_with_template(artifact: Path, torch_model: Path, folder: Path, template: Any, in_config: bool = False) -> Path:
    """Copy an artifact to `folder` with a chat template, in a file of its own or within tokenizer_config.json.

    Its tokenizer also puts a BOS token before each text, as the template does.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    shutil.copytree(artifact, folder)
    tokenizer = AutoTokenizer.from_pretrained(torch_model)
    tokenizer.bos_token = BOS
    begin = (BOS, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "t", save_jinja_files=not in_config)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (folder / "t" / name).exists():
            shutil.copy(folder / "t" / name, folder)
    shutil.rmtree(folder / "t")
    rewrite_manifest(folder)
    return folder
