"""`limbeck compare`."""

from __future__ import annotations

import click

from registry.terminal import format_option, print_json, print_table


@click.command()
@click.argument("a")
@click.argument("b")
@format_option
def compare(a: str, b: str, output: str) -> None:
    """Hold the scored version A against B, document by document. No model runs.

    The difference is A - B, with its 95% interval: paired by document, clustered by file.
    """
    from evals.compare import compare as run
    from registry.store import Store

    found = run(Store(), a, b)
    if output == "json":
        print_json([{**row._asdict(), "difference": row.difference.model_dump()} for row in found])
        return
    rows = []
    for row in found:
        sure = row.difference
        between = f"{sure.value:+.4f} [{sure.low:+.4f}, {sure.high:+.4f}]"
        rows.append((row.task, row.metric, f"{row.a:.4f}", f"{row.b:.4f}", between, row.better or "not settled"))
    print_table("", ["task", "metric", a, b, "difference, paired", "better"], rows)
