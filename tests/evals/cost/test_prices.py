"""Prices: the user's file overrides the shipped one, and each figure names the price that it uses."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.evals.cost.prices import DEFAULT_PRICES, Prices
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import describe_hardware
from tests import ROOT

USER_PRICES = """\
[machines."our server"]
match = "EPYC 9\\\\d+"
usd_per_hour = 0.5
cores = 8
date = 2026-01-02
source = "invoice of October"

[machines.laptop]
match = "apple m\\\\d"
usd_per_hour = 0.05
date = 2026-01-02
source = "bought"

[apis."gpt-4o"]
usd_per_million_input_tokens = 1
usd_per_million_output_tokens = 2
date = 2026-01-02
source = "contract"
"""


@pytest.fixture
def user_prices(tmp_path: Path) -> Path:
    file = tmp_path / "prices.toml"
    file.write_text(USER_PRICES)
    return file


def test_the_users_prices_come_first(user_prices: Path) -> None:
    prices = Prices.load(user_prices)
    eight = prices.machine_price("AMD EPYC 9654, 8 cores, Linux x86_64; torch 2, transformers 4")
    assert eight == (0.5, "our server, 0.5 USD/h (2026-01-02, invoice of October)")
    two = prices.machine_price("AMD EPYC 9654, 2 cores, Linux x86_64")
    assert two.usd_per_hour == pytest.approx(0.125)
    assert two.description == "our server x 2/8 cores, 0.125 USD/h (2026-01-02, invoice of October)"
    assert prices.api_price("gpt-4o")[:2] == (1, 2)
    assert "contract" in prices.api_price("gpt-4o").description
    # Other prices come from the shipped file.
    assert prices.machine_price("Intel Xeon, 4 cores, NVIDIA H100 80GB HBM3, Linux x86_64").usd_per_hour == 6.88
    assert prices.api_price("gpt-4o-mini")[:2] == (0.15, 0.6)
    # The engine's versions do not belong to the machine.
    assert prices.machine_price("a processor, 1 cores; EPYC 9654").is_placeholder


def test_a_price_on_the_command_line_overrides_the_files(user_prices: Path) -> None:
    prices = Prices.load(user_prices, usd_per_hour=3)
    assert prices.machine_price("AMD EPYC 9654, 2 cores") == (3, "your price, 3 USD/h (--usd-per-hour)")


def test_the_shipped_prices_are_packaged_and_match_machines() -> None:
    prices = Prices.load()
    assert list(prices.machines)[-1] == "no price known"  # it matches every machine
    assert prices.machine_price(describe_hardware()).usd_per_hour > 0
    found = prices.machine_price("an unknown processor, 2 cores, Linux x86_64")
    assert found.is_placeholder
    assert found.usd_per_hour == 0.1
    for machine, dollars in {
        "AMD EPYC 7J13, 30 cores, NVIDIA A100-SXM4-80GB, Linux x86_64": 3.43,
        "Intel(R) Xeon(R), 24 cores, NVIDIA A100-SXM4-40GB, Linux x86_64": 2.74,
        "AMD EPYC 7R32, 2 cores, NVIDIA A10G, Linux x86_64": 1.006,
        "AMD EPYC 7R13, 2 cores, NVIDIA L4, Linux x86_64": 0.805,
        "AMD EPYC 7R13, 2 cores, NVIDIA L40S, Linux x86_64": 0.1,
        "Intel(R) Xeon(R) Platinum 8488C, 4 cores, Linux x86_64": 2 * 0.1785,
    }.items():
        assert prices.machine_price(machine).usd_per_hour == pytest.approx(dollars), machine
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packaged = pyproject["tool"]["setuptools"]["package-data"]
    assert DEFAULT_PRICES.name in packaged["limbeck.evals.cost"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "bought"\n', "", r"prices.toml:8: machines.laptop.source is missing"),
        ("0.05", "-1", r"prices.toml:10: machines.laptop.usd_per_hour: input should be greater than 0, not -1"),
        ("0.05", "inf", r"prices.toml:10: machines.laptop.usd_per_hour: input should be a finite number"),
        ("apple m", "apple (", r"prices.toml:9: machines.laptop.match: .* is not a regular expression"),
        ("cores = 8", "core = 8", r"prices.toml:4: unknown key machines.our server.core; did you mean cores"),
        ("2026-01-02", '"soon"', r"prices.toml:5: machines.our server.date: input should be a valid date"),
        ("[machines.laptop]", "[machine.laptop]", r"prices.toml:8: unknown key machine; did you mean machines"),
        ("= 1\n", "= -1\n", r"prices.toml:15: apis.gpt-4o.usd_per_million_input_tokens"),
    ],
)
def test_an_error_in_a_file_is_reported_with_its_line(old: str, new: str, message: str, user_prices: Path) -> None:
    assert old in USER_PRICES
    user_prices.write_text(USER_PRICES.replace(old, new, 1))
    with pytest.raises(BadInput, match=message):
        Prices.load(user_prices)


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_price_must_be_above_zero(price: float) -> None:
    with pytest.raises(BadInput, match="dollars an hour"):
        Prices.load(usd_per_hour=price)


def test_a_missing_price_is_reported(user_prices: Path) -> None:
    with pytest.raises(BadInput, match="no price for 'gpt-5o'") as error:
        Prices.load(user_prices).api_price("gpt-5o")
    assert "gpt-4o" in str(error.value.fix)
    with pytest.raises(BadInput, match="no price for this machine: a"):
        Prices().machine_price("a; b")


def test_eval_prints_which_price_it_used(
    limbeck: Callable[..., Any],
    limbeck_home: Path,
    onnx_llama: Path,
    text_tasks: Path,
    user_prices: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ("eval", onnx_llama, "--tasks", "text_next_line", "--include-path", text_tasks, "--limit", 2)
    result = limbeck(*command)
    assert result.code == 0
    assert f"dollars: {Prices.load().machine_price(describe_hardware()).description}\n" in result.err
    user_prices.write_text(USER_PRICES.replace('"apple m\\\\d"', '""'))
    result = limbeck(*command, "--prices", user_prices)
    assert "dollars: laptop, 0.05 USD/h (2026-01-02, bought)" in result.err
    monkeypatch.setenv("LIMBECK_PRICES", str(user_prices))
    result = limbeck(*command)
    assert "dollars: laptop, 0.05 USD/h" in result.err
    result = limbeck(*command, "--usd-per-hour", 2)
    assert "dollars: your price, 2 USD/h (--usd-per-hour)" in result.err
    result = limbeck(*command, "--prices", user_prices.with_name("price.toml"))
    assert result.code == 2
    assert "no such file" in result.err
