"""Options that several commands of this room share."""

from __future__ import annotations

import click

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads per operator. [default: the physical cores]"
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda needs the extra `gpu`.",
)
