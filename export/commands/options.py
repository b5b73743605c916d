"""Options that several commands of this room take."""

from __future__ import annotations

import click

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="For one operator. [default: the physical cores]"
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda wants the extra `gpu`.",
)
