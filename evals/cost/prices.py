"""Prices of machine hours and of API tokens, from a TOML file that the user owns.

    [machines."our server"]
    match = "EPYC 9654"         # a regular expression, searched for in the machine's description
    cores = 8                   # optional: the price is for 8 physical cores, and scales with their number
    usd_per_hour = 0.42
    date = 2026-11-24
    source = "invoice of October"

    [apis."a-model"]
    usd_per_million_input_tokens = 2.5
    usd_per_million_output_tokens = 10.0
    date = 2026-11-24
    source = "contract"

The user's entries come first, then those of `prices.toml`, which ships with Limbeck. Every figure in dollars names the
price that it uses.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, Self

import click
from pydantic import Field, field_validator

from limbeck.registry.core import toml
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Frozen

DEFAULT_PRICES = Path(__file__).with_name("prices.toml")
PLACEHOLDER = "no price known"


class _Dated(Frozen):
    """When and where a price was found."""

    date: date
    source: str = Field(min_length=1)


class MachineEntry(_Dated):
    """The hourly price of machines whose description matches a regular expression."""

    match: str
    usd_per_hour: float = Field(gt=0, allow_inf_nan=False)
    cores: int | None = Field(default=None, ge=1)

    @field_validator("match")
    @classmethod
    def _compiles(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"{match!r} is not a regular expression: {error}") from None
        return match


class ApiEntry(_Dated):
    """The price of an API model."""

    usd_per_million_input_tokens: float = Field(ge=0, allow_inf_nan=False)
    usd_per_million_output_tokens: float = Field(ge=0, allow_inf_nan=False)


class Price(NamedTuple):
    """A machine's hourly price and its description: name, dollars, date and source."""

    usd_per_hour: float
    description: str

    @property
    def is_placeholder(self) -> bool:
        """Whether this is the shipped price for machines without a known one."""
        return self.description.startswith(PLACEHOLDER)


class ApiPrice(NamedTuple):
    """An API model's price per million input and output tokens, and its description."""

    usd_per_million_input_tokens: float
    usd_per_million_output_tokens: float
    description: str


class Prices(Frozen):
    """Prices by name. The first machine that matches is used."""

    machines: dict[str, MachineEntry] = {}
    apis: dict[str, ApiEntry] = {}

    @classmethod
    def load(cls, path: Path | str | None = None, usd_per_hour: float | None = None) -> Self:
        """The prices of the user's file, if any, followed by those that ship with Limbeck.

        Args:
            path: the user's file.
            usd_per_hour: the price of every machine; it overrides both files.

        Raises:
            BadInput: a file with an error (with its line and key); a price that is not above zero.
        """
        files = [toml.load_toml(file, cls) for file in (path, DEFAULT_PRICES) if file is not None]
        machines: dict[str, MachineEntry] = {}
        if usd_per_hour is not None:
            check_price(usd_per_hour)
            own = MachineEntry(match="", usd_per_hour=usd_per_hour, date=date.today(), source="--usd-per-hour")
            machines["your price"] = own
        apis: dict[str, ApiEntry] = {}
        for prices in files:
            machines |= {name: machine for name, machine in prices.machines.items() if name not in machines}
            apis |= {name: api for name, api in prices.apis.items() if name not in apis}
        return cls(machines=machines, apis=apis)

    def machine_price(self, machine: str) -> Price:
        """The price of a machine, described as by `describe_hardware`; text after a semicolon is ignored.

        Raises BadInput if no entry matches.
        """
        hardware = machine.partition(";")[0]
        cores = re.search(r", (\d+) cores\b", hardware)
        for name, entry in self.machines.items():
            if not re.search(entry.match, hardware):
                continue
            dollars, scale = entry.usd_per_hour, ""
            if entry.cores and cores and int(cores[1]) != entry.cores:
                dollars *= int(cores[1]) / entry.cores
                scale = f" x {cores[1]}/{entry.cores} cores"
            return Price(dollars, _describe_price(f"{name}{scale}", f"{dollars:.4g} USD/h", entry))
        raise BadInput(f"there is no price for this machine: {hardware}", fix="give one with --usd-per-hour")

    def api_price(self, model: str) -> ApiPrice:
        """The price of an API model. Raises BadInput, with a similar name, if it has none."""
        if entry := self.apis.get(model):
            per_input, per_output = entry.usd_per_million_input_tokens, entry.usd_per_million_output_tokens
            dollars = f"{per_input:g} and {per_output:g} USD per 1M tokens in and out"
            return ApiPrice(per_input, per_output, _describe_price(model, dollars, entry))
        near = difflib.get_close_matches(model, self.apis, n=1)
        raise BadInput(
            f"there is no price for {model!r}",
            fix=f"did you mean {near[0]}?" if near else f'put [apis."{model}"] in a file of prices: --prices FILE',
        )


def check_price(usd_per_hour: float) -> None:
    """Raise BadInput for a price that is not a finite number above zero."""
    if not (math.isfinite(usd_per_hour) and usd_per_hour > 0):
        raise BadInput(f"a price of {usd_per_hour:g} dollars an hour", fix="give one above 0 with --usd-per-hour")


def _describe_price(name: str, dollars: str, entry: _Dated) -> str:
    if (
        entry.source == "--usd-per-hour"
    ):  # without today's date, so that the same price has the same description tomorrow
        return f"{name}, {dollars} (--usd-per-hour)"
    return f"{name}, {dollars} ({entry.date}, {entry.source})"


def price_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options `--prices` (parameter `prices_file`) and `--usd-per-hour` to a command."""
    prices_option = click.option(
        "--prices",
        "prices_file",
        type=click.Path(path_type=Path),
        envvar="LIMBECK_PRICES",
        show_envvar=True,
        help="A TOML file with your prices; they come before those in evals/cost/prices.toml.",
    )
    usd_per_hour_option = click.option(
        "--usd-per-hour",
        type=float,
        envvar="LIMBECK_USD_PER_HOUR",
        show_envvar=True,
        help="The price of this machine; it overrides all files.",
    )
    return prices_option(usd_per_hour_option(command))
