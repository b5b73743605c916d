"""`limbeck export`: PyTorch models to ONNX variants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

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
    from limbeck.export.artifact.variants import ExportOptions, Variant
    from limbeck.registry.catalog.model_ref import ResolvedModel

COLUMNS = ["variant", "of", "precision", "MB", "largest logprob diff", "KL", "top-1", "bits/byte", "greedy", ""]


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--precision", help="Comma-separated list. [default: fp32,int8-weight; with --device cuda fp16,int8-weight]"
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="The device that will run the variants.",
)
@click.option(
    "--output",
    "output_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write to DIR/fp32, DIR/int8-weight and so on, and register nothing.",
)
@click.option("--texts", type=click.Path(path_type=Path), help="Held-out text for parity: JSON lines with a text.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text to quantize with, in the same format. [default: the version's training text, else --texts]",
)
@click.option(
    "--max-change",
    type=click.FloatRange(min=0),
    help="Your own limit of the relative increase of bits per byte, such as 0.05, instead of the precision's limits.",
)
@click.option(
    "--engine",
    type=click.Choice(["fused", "optimum"]),
    help="What makes the graph. [default: fused, or optimum if the model has no fused graph]",
)
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with the model.")
@format_option
def export(  # noqa: PLR0913 (one parameter per option)
    models: tuple[str, ...],
    precision: str | None,
    device: Literal["cpu", "cuda"],
    output_folder: Path | None,
    texts: Path | None,
    calibration: Path | None,
    max_change: float | None,
    engine: Literal["fused", "optimum"] | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Export each MODEL to ONNX, and compare every variant with PyTorch on held-out text.

    The precisions are fp32, fp16, int8-weight and int4 (weights of 8 or 4 bits, in blocks).

    A fused graph has onnxruntime's fused operators and is faster. optimum exports more models; its packages are
    installed beside the environment when they are first needed, or by `limbeck doctor --install-optimum`.

    The variants of a registered version are registered as versions of the same name. Those of other models
    go to FOLDER-onnx/. A variant that differs from PyTorch by more than the limits of its precision is refused (exit
    code 1): see "Ship it" in the README.
    """
    quiet_libraries()
    from limbeck.export.artifact.variants import ExportOptions
    from limbeck.export.quantize.precisions import parse_precisions
    from limbeck.export.quantize.settings import held_out_texts, quantization_settings
    from limbeck.registry.catalog.model_ref import resolve_models

    precisions = parse_precisions(
        (precision or ("fp32,int8-weight" if device == "cpu" else "fp16,int8-weight")).split(",")
    )
    torch_models = [model for model in resolve_models(models) if model.engine == "torch"]
    if not torch_models:
        raise BadInput(f"{', '.join(models)}: an ONNX artifact already", fix="export the PyTorch model it came from")
    if output_folder and len(torch_models) > 1:
        raise BadInput(f"--output takes one model, not {len(torch_models)}", fix="export them one by one")
    settings = [
        quantization_settings(
            model.version,
            calibration=calibration,
            texts=texts,
            device=device,
            max_change=max_change,
            report=print_status,
        )
        for model in torch_models
    ]
    variants = []
    with progress_bar() as bar:
        task = bar.add_task("export", total=len(torch_models), rate="")
        for model, quantization in zip(torch_models, settings, strict=True):
            options = ExportOptions(held_out_texts(texts, quantization.texts), quantization, trust_remote_code, engine)
            variants += _export_model(model, precisions, output_folder, options)
            bar.advance(task)
    if output_format == "json":
        print_json([variant.to_json() for variant in variants])
        return
    print_table("ONNX variants against PyTorch", COLUMNS, map(_variant_row, variants))


def _export_model(
    model: ResolvedModel, precisions: list[str], output_folder: Path | None, options: ExportOptions
) -> list[Variant]:
    """Export to the registry if `model` is a registered version and no folder is given, else to a folder."""
    from limbeck.export.artifact.variants import export_folder, export_version

    if model.version and output_folder is None:
        from limbeck.registry.mlflow.store import Store

        return export_version(Store(), model.version, precisions, options)
    return export_folder(model.path, output_folder or _default_output_folder(model), precisions, options)


def _default_output_folder(model: ResolvedModel) -> Path:
    """FOLDER-onnx or FILE-onnx beside a local folder or file; in the current folder for a hub id."""
    given = Path(model.label).expanduser()
    if given.exists():
        given = given.resolve()
        return given.with_name((given.stem if given.is_file() else given.name) + "-onnx")
    return Path(given.name + "-onnx")


def _variant_row(variant: Variant) -> tuple[Any, ...]:
    parity = variant.parity
    change = parity.bits_per_byte - parity.bits_per_byte_reference
    return (
        variant.model,
        variant.parent,
        variant.precision,
        f"{variant.bytes / 1e6:.1f}",
        f"{parity.max_logprob_diff:.1e}",
        f"{parity.mean_kl:.1e}",
        f"{parity.top1_agreement:.1%}",
        f"{parity.bits_per_byte:.3f} ({change:+.3f})",
        "same" if parity.greedy_identical else "differs",
        ("new" if variant.new else "exists") + (", above limits" if parity.is_above_limits else ""),
    )
