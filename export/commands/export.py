"""`limbeck export` and `generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from limbeck.export.commands.options import device_option, threads_option
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import (
    format_option,
    print_json,
    print_status,
    print_table,
    progress_bar,
    quiet_libraries,
)

if TYPE_CHECKING:
    from limbeck.export.artifact.variants import Variant
    from limbeck.export.commands.locate import FoundArtifact
    from limbeck.export.quantize.quantize import QuantizationSettings
    from limbeck.export.runtime.sampling import Sampling
    from limbeck.registry.catalog.model_ref import ResolvedModel


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--precision", help="Comma-separated. [default: fp32,int8; on cuda fp16,int4]")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What is to run the variants.",
)
@click.option("--to", type=click.Path(path_type=Path), help="A folder for DIR/fp32, DIR/int8; nothing is registered.")
@click.option("--texts", type=click.Path(path_type=Path), help="Held-out text to compare on: JSON lines with a text.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text to quantize by, likewise. [default: the text that a version was trained on, else --texts]",
)
@click.option(
    "--max-change",
    type=click.FloatRange(min=0),
    default=0.01,
    show_default=True,
    help="Share by which the bits per byte of int4 may grow: parts of the model get 8 bits until they do not.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@format_option
def export(
    models: tuple[str, ...],
    precision: str | None,
    device: Literal["cpu", "cuda"],
    to: Path | None,
    texts: Path | None,
    calibration: Path | None,
    max_change: float,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Export each MODEL to ONNX, and hold every variant against PyTorch on held-out text.

    The precisions are fp32, fp16, int8 (activations quantized as it runs), int8-static (calibrated beforehand),
    int8-weight and int4 (weights alone, in blocks chosen by measurement).

    The variants of a registered version are registered as versions of the same name; those of a folder or hub
    id go to FOLDER-onnx/. An fp32 graph that does not give what PyTorch gives is refused (exit code 1).
    """
    quiet_libraries()
    from limbeck.export.artifact.export import parse_precisions
    from limbeck.export.artifact.variants import quantization_settings, read_texts
    from limbeck.export.quantize.quantize import check_device
    from limbeck.registry.catalog.model_ref import resolve_models

    precisions = parse_precisions((precision or ("fp32,int8" if device == "cpu" else "fp16,int4")).split(","))
    check_device(precisions, device)
    documents = read_texts(texts) if texts else None
    found = [model for model in resolve_models(models) if model.engine == "torch"]
    if not found:
        raise BadInput(f"{', '.join(models)}: an ONNX artifact already", fix="export the PyTorch model it came from")
    if to and len(found) > 1:
        raise BadInput(f"--to takes one model, not {len(found)}", fix="export them one by one")
    settings = [
        quantization_settings(model.version, calibration=calibration, texts=texts, device=device, max_change=max_change)
        for model in found
    ]
    variants = []
    with progress_bar() as bar:
        task = bar.add_task("export", total=len(found), rate="")
        for model, how in zip(found, settings, strict=True):
            variants += _export(model, precisions, documents, how, to, trust_remote_code)
            bar.advance(task)
    if output_format == "json":
        print_json([variant.to_json() for variant in variants])
        return
    columns = ["variant", "of", "precision", "MB", "largest logprob diff", "KL", "top-1", "bits/byte", "greedy", ""]
    print_table("ONNX variants against PyTorch", columns, map(_variant_row, variants))


def _export(
    model: ResolvedModel,
    precisions: list[str],
    texts: list[str] | None,
    settings: QuantizationSettings,
    output_folder: Path | None,
    trust_remote_code: bool,
) -> list[Variant]:
    from limbeck.export.artifact.variants import export_folder, export_version

    if model.version and output_folder is None:
        from limbeck.registry.mlflow.store import Store

        return export_version(
            Store(),
            model.version,
            precisions,
            texts,
            settings,
            report=print_status,
            trust_remote_code=trust_remote_code,
        )
    if output_folder is None:
        folder = Path(model.label)
        local = folder.is_dir()
        output_folder = model.path.with_name(model.path.name + "-onnx") if local else Path(folder.name + "-onnx")
    return export_folder(
        model.path, output_folder, precisions, texts, settings, report=print_status, trust_remote_code=trust_remote_code
    )


def _variant_row(variant: Variant) -> tuple[Any, ...]:
    parity = variant.parity
    row = (variant.model, variant.parent, variant.precision, f"{variant.bytes / 1e6:.1f}")
    if parity is None:
        return (*row, None, None, None, None, None, None)
    change = parity.bits_per_byte - parity.bits_per_byte_reference
    return (
        *row,
        f"{parity.max_logprob_diff:.1e}",
        f"{parity.mean_kl:.1e}",
        f"{parity.top1_agreement:.1%}",
        f"{parity.bits_per_byte:.3f} ({change:+.3f})",
        "same" if parity.greedy_identical else "differs",
        "new" if variant.new else "was there",
    )


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="The most to add.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-k", type=int, help="Draw from so many of the likeliest tokens.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that hold this probability together.")
@click.option("--min-p", type=float, help="Draw from tokens with this share of the likeliest's probability.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1 shuns tokens that were there.")
@click.option("--seed", type=int, help="The same draws each time.")
@click.option("--stop", multiple=True, help="End before this text; can be given again.")
@click.option("--beside", metavar="TEACHER", help="Another model to complete the same prompt, for its speed.")
@threads_option
@device_option
@format_option
def generate(
    model: str,
    prompt: str | None,
    beside: str | None,
    threads: int | None,
    device: Literal["cpu", "cuda"],
    output_format: str,
    **sampling: Any,
) -> None:
    """Complete PROMPT (or what stands on stdin) with MODEL, and tell the speed.

    An ONNX artifact runs in the torch-free runtime, a torch model through transformers. The files' digest is
    checked first.
    """
    quiet_libraries()
    from limbeck.export.commands.locate import find_artifact
    from limbeck.export.runtime.sampling import Sampling

    request = Sampling(**sampling)
    if prompt is None:
        prompt = sys.stdin.read()
    results = [_complete(find_artifact(name), prompt, request, threads, device) for name in (model, beside) if name]
    if output_format == "json":
        print_json(results)
        return
    print(prompt + results[0]["text"])
    columns = ["model", "engine", "digest", "new tokens", "load", "prefill", "decode"]
    print_table("", columns, map(_speed_row, results))


def _complete(
    found: FoundArtifact, prompt: str, sampling: Sampling, threads: int | None, device: Literal["cpu", "cuda"]
) -> dict[str, Any]:
    from limbeck.export.artifact.complete import complete_onnx, complete_torch

    complete = complete_onnx if found.engine == "onnxruntime" else complete_torch
    done = complete(found.path, prompt, sampling, threads=threads, device=device, digest=found.digest)
    speeds = {"prefill_tokens_per_s": done.prefill_tokens_per_s, "decode_tokens_per_s": done.decode_tokens_per_s}
    return {"model": found.name, "engine": found.engine, **asdict(done), **speeds}


def _speed_row(done: dict[str, Any]) -> tuple[Any, ...]:
    decode = done["decode_tokens_per_s"]
    return (
        done["model"],
        done["engine"],
        done["digest"][:12],
        done["new_tokens"],
        f"{done['load_s']:.2f} s",
        f"{done['prefill_tokens_per_s']:,.0f} tok/s",
        decode and f"{decode:,.0f} tok/s",
    )
