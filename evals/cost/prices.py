"""What an hour of a machine and a million tokens of an API cost: a TOML file that the user owns.

    [machines."our server"]
    match = "EPYC 9654"         # a regular expression, looked for in the machine's own words
    cores = 8                   # optional: the price is that of 8 physical cores, and goes up and down with them
    usd_per_hour = 0.42
    date = 2026-11-24
    source = "invoice of October"

    [apis."a-model"]
    usd_per_million_input_tokens = 2.5
    usd_per_million_output_tokens = 10.0
    date = 2026-11-24
    source = "contract"

Its entries are looked at first, then those of `prices.toml`, which comes with Limbeck. Every figure in dollars
says which of them it used.
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
    """Where a price is from."""

    date: date
    source: str = Field(min_length=1)


class MachineEntry(_Dated):
    """The price of an hour of a machine."""

    match: str
    usd_per_hour: float = Field(gt=0, allow_inf_nan=False)
    cores: int | None = Field(default=None, ge=1)

    @field_validator("match")
    @classmethod
    def _compiles(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"{match!r} is no regular expression: {error}") from None
        return match


class ApiEntry(_Dated):
    """The price of a model behind an API."""

    usd_per_million_input_tokens: float = Field(ge=0, allow_inf_nan=False)
    usd_per_million_output_tokens: float = Field(ge=0, allow_inf_nan=False)


class Price(NamedTuple):
    """Dollars an hour, and in words whose price that is."""

    usd_per_hour: float
    description: str

    @property
    def is_placeholder(self) -> bool:
        return self.description.startswith(PLACEHOLDER)


class ApiPrice(NamedTuple):
    """Dollars per million tokens that go in and come out, and in words whose price that is."""

    usd_per_million_input_tokens: float
    usd_per_million_output_tokens: float
    description: str


class Prices(Frozen):
    """Prices by name; of the machines the first that matches counts."""

    machines: dict[str, MachineEntry] = {}
    apis: dict[str, ApiEntry] = {}

    @classmethod
    def load(cls, path: Path | str | None = None, usd_per_hour: float | None = None) -> Self:
        """The user's file, where given, before the one that comes with Limbeck.

        Args:
            usd_per_hour: a price for any machine, before all of them.

        Raises:
            BadInput: with file, line and key; a price that is not above zero.
        """
        several = [toml.load_toml(file, cls) for file in (path, DEFAULT_PRICES) if file is not None]
        machines: dict[str, MachineEntry] = {}
        if usd_per_hour is not None:
            check_price(usd_per_hour)
            own = MachineEntry(match="", usd_per_hour=usd_per_hour, date=date.today(), source="--usd-per-hour")
            machines["your price"] = own
        apis: dict[str, ApiEntry] = {}
        for prices in several:
            machines |= {name: machine for name, machine in prices.machines.items() if name not in machines}
            apis |= {name: api for name, api in prices.apis.items() if name not in apis}
        return cls(machines=machines, apis=apis)

    def machine_price(self, machine: str) -> Price:
        """The price of a machine, as in `registry.core.machine.hardware` (what follows a ; is left out)."""
        words = machine.partition(";")[0]
        cores = re.search(r", (\d+) cores\b", words)
        for name, found in self.machines.items():
            if not re.search(found.match, words):
                continue
            dollars, scale = found.usd_per_hour, ""
            if found.cores and cores and int(cores[1]) != found.cores:
                dollars *= int(cores[1]) / found.cores
                scale = f" x {cores[1]}/{found.cores} cores"
            return Price(dollars, _describe_price(f"{name}{scale}", f"{dollars:.4g} USD/h", found))
        raise BadInput(f"there is no price for this machine: {words}", fix="give one with --usd-per-hour")

    def api_price(self, model: str) -> ApiPrice:
        """The price of an API model. Raises BadInput, with near names, where it has none."""
        if found := self.apis.get(model):
            dollars = (found.usd_per_million_input_tokens, found.usd_per_million_output_tokens)
            return ApiPrice(
                *dollars, _describe_price(model, "{:g} and {:g} USD per 1M tokens in and out".format(*dollars), found)
            )
        near = difflib.get_close_matches(model, self.apis, n=1)
        raise BadInput(
            f"there is no price for {model!r}",
            fix=f"did you mean {near[0]}?" if near else f'put [apis."{model}"] in a file of prices: --prices FILE',
        )


def check_price(usd_per_hour: float) -> None:
    """Raise BadInput for a price that is not above zero."""
    if not (math.isfinite(usd_per_hour) and usd_per_hour > 0):
        raise BadInput(f"a price of {usd_per_hour:g} dollars an hour", fix="give one above 0 with --usd-per-hour")


def _describe_price(name: str, dollars: str, entry: _Dated) -> str:
    if entry.source == "--usd-per-hour":  # today's: a date would make the same price another one tomorrow
        return f"{name}, {dollars} (--usd-per-hour)"
    return f"{name}, {dollars} ({entry.date}, {entry.source})"


def price_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--prices` and `--usd-per-hour` of a command: its `prices_file` and `usd_per_hour`."""
    by_file = click.option(
        "--prices",
        "prices_file",
        type=click.Path(path_type=Path),
        envvar="LIMBECK_PRICES",
        show_envvar=True,
        help="Your prices of machines, TOML; looked at before those in evals/prices.toml.",
    )
    by_hand = click.option(
        "--usd-per-hour",
        type=float,
        envvar="LIMBECK_USD_PER_HOUR",
        show_envvar=True,
        help="The price of the machine, before any file.",
    )
    return by_file(by_hand(command))
