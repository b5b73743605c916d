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
prompt_lookup_option = click.option(
    "--prompt-lookup-num-tokens",
    metavar="N",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Propose up to N tokens that followed the same words before, and check them in one run; 0: none.",
)
draft_option = click.option(
    "--draft", metavar="STUDENT", help="Let this smaller model of the same vocabulary propose tokens."
)
