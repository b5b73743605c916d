"""`limbeck generate`: complete one prompt and report the speed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from limbeck.export.commands.options import device_option, draft_option, prompt_lookup_option, threads_option
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table, quiet_libraries

if TYPE_CHECKING:
    from limbeck.export.commands.locate import FoundArtifact
    from limbeck.export.runtime.sampling import Sampling

COLUMNS = ["model", "engine", "digest", "new tokens", "load", "prefill", "decode"]


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="At most N tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token each time.")
@click.option("--top-k", type=int, help="Sample from the K most likely tokens.")
@click.option("--top-p", type=float, help="Sample from the most likely tokens that together have this probability.")
@click.option("--min-p", type=float, help="Sample from tokens with at least this share of the highest probability.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1 makes repeated tokens less likely.")
@click.option("--seed", type=int, help="Makes sampling reproducible.")
@click.option("--stop", multiple=True, help="Stop before this text; can be repeated.")
@click.option("--parse-special", is_flag=True, help="Special tokens in PROMPT are tokens, not text.")
@prompt_lookup_option
@draft_option
@click.option("--against", metavar="TEACHER", help="Complete the same prompt with this model too, to compare speed.")
@threads_option
@device_option
@format_option
def generate(
    model: str,
    prompt: str | None,
    against: str | None,
    parse_special: bool,
    threads: int | None,
    device: Literal["cpu", "cuda"],
    output_format: str,
    **settings: Any,
) -> None:
    """Complete PROMPT (or standard input) with MODEL, and report the speed.

    An ONNX artifact runs in the torch-free runtime, a PyTorch model in transformers. The digest of the files is
    checked first. With --prompt-lookup-num-tokens or --draft, MODEL checks several proposed tokens in one run; in fp32
    the text is the same without, else it may differ where two tokens are nearly as likely.
    """
    quiet_libraries()
    from limbeck.export.artifact.complete import Proposals
    from limbeck.export.commands.locate import find_artifact, find_onnx_artifact
    from limbeck.export.runtime.sampling import Sampling

    lookup, draft = settings.pop("prompt_lookup_num_tokens"), settings.pop("draft")
    request = Sampling(**settings)
    if prompt is None:
        prompt = sys.stdin.read()
    names = [model, against] if against else [model]
    options = {"threads": threads, "device": device, "parse_special": parse_special}
    found = [find_artifact(name) for name in names]
    proposals = None
    if lookup or draft:
        if found[0].engine != "onnxruntime":
            raise BadInput(f"{model} is a PyTorch model, which checks no proposed tokens", fix="export it first")
        proposals = Proposals(lookup)
        if draft:
            student = find_onnx_artifact(draft)
            proposals = Proposals(lookup, student.path, student.digest)
    own_options = options | ({"proposals": proposals} if proposals else {})
    results = [_complete(found[0], prompt, request, own_options)]
    results += [_complete(other, prompt, request, options) for other in found[1:]]
    if output_format == "json":
        print_json(results)
        return
    print(prompt + results[0]["text"])
    print_table("", COLUMNS, map(_speed_row, results))
    if length := results[0]["acceptance_length"]:
        faster = results[0]["speculative_speedup"]
        print_status(
            f"proposed tokens: {length:.1f} tokens for each run that checked them"
            + (f", {faster:.2f} times as fast as one at a time" if faster else "")
        )


def _complete(found: FoundArtifact, prompt: str, sampling: Sampling, options: dict[str, Any]) -> dict[str, Any]:
    """Return one entry of the JSON output."""
    from limbeck.export.artifact.complete import complete_onnx, complete_torch

    complete = complete_onnx if found.engine == "onnxruntime" else complete_torch
    done = complete(found.path, prompt, sampling, digest=found.digest, **options)
    speeds = {"prefill_tokens_per_s": done.prefill_tokens_per_s, "decode_tokens_per_s": done.decode_tokens_per_s}
    return {"model": found.name, "engine": found.engine, **asdict(done), **speeds}


def _speed_row(result: dict[str, Any]) -> tuple[Any, ...]:
    decode = result["decode_tokens_per_s"]
    return (
        result["model"],
        result["engine"],
        result["digest"][:12],
        result["new_tokens"],
        f"{result['load_s']:.2f} s",
        f"{result['prefill_tokens_per_s']:,.0f} tok/s",
        decode and f"{decode:,.0f} tok/s",
    )
