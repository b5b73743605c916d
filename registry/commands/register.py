"""`limbeck register`: a checkpoint or ONNX artifact that exists already becomes a version."""

from __future__ import annotations

from typing import Literal

import click

from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table, quiet_libraries


@click.command()
@click.argument("model")
@click.option("--name", required=True, help="The registered model; it is created if it does not exist.")
@click.option("--kind", type=click.Choice(["teacher", "student"]), help="Of a PyTorch model.  [default: student]")
@click.option(
    "--parent",
    metavar="MODEL",
    help="The registered teacher of a student: NAME/VERSION, or a folder with its files. The PyTorch model of an ONNX "
    "artifact is found by its manifest.",
)
@click.option("--licence", metavar="SPDX", help="Its licence.  [default: that of its README.md]")
@click.option("--data-licence", metavar="SPDX", help="The licence of its training text.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with the model.")
@format_option
def register(  # noqa: PLR0913 (one parameter per option)
    model: str,
    name: str,
    kind: Literal["teacher", "student"] | None,
    parent: str | None,
    licence: str | None,
    data_licence: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Register MODEL, a checkpoint or ONNX artifact that was made elsewhere, as a version of NAME.

    Then export it, score it with `eval --against`, promote and serve it like any other version. A PyTorch model is
    loaded once, to be sure that it can be; an ONNX artifact of `limbeck export` is verified. The files are copied.
    The same files again give the same version, and add what was unknown about it: parent and licences.
    """
    quiet_libraries()
    from limbeck.registry.catalog.lineage import made_from_ref
    from limbeck.registry.catalog.model_ref import resolve_model
    from limbeck.registry.catalog.register import Statement, describe_unknown_lineage, register_model
    from limbeck.registry.mlflow.store import Store

    store = Store()
    statement = Statement(name, kind, parent, licence, data_licence, trust_remote_code)
    registration = register_model(store, resolve_model(model, store), statement)
    version = registration.version
    if output_format == "json":
        print_json(version.model_dump(mode="json") | {"new": registration.is_new})
    else:
        columns = ["version", "kind", "precision", "parameters", "made from", "licence", "digest", ""]
        parameters = None if version.params is None else f"{version.params:,}"
        row = (version.ref, version.kind, version.precision, parameters, made_from_ref(version), version.licence)
        print_table("registered", columns, [(*row, version.digest[:12], "new" if registration.is_new else "exists")])
    for line in describe_unknown_lineage(version):
        print_status(line)
