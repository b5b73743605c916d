"""TOML files as models: errors name the file, the line and the key that was probably meant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.toml import key_lines, load_toml, parse_toml


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Vessel(Strict):
    label: str
    volume: int = 1
    metal: Literal["copper", "steel"] = "copper"


class Furnace(Strict):
    fuel: str = "wood"


class Still(Strict):
    name: str
    heat: float = Field(default=0.5, ge=0, le=1)
    vessels: list[Vessel] = []
    furnace: Furnace | None = None

    @model_validator(mode="after")
    def _hot_enough(self) -> Still:
        if self.furnace and self.furnace.fuel == "ice":
            raise ValueError("ice does not burn")
        return self


TEXT = '''\
# a still
name = "alembic"
heat = 0.25

[furnace]
fuel = """
char
coal"""

[[vessels]]
label = "cucurbit"

[[vessels]]
label = "receiver"
volume = 3
'''


def error_text(text: str, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse_toml(text, Still, overrides, source_name="still.toml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_valid_file(tmp_path: Path) -> None:
    (tmp_path / "still.toml").write_text(TEXT)
    still = load_toml(tmp_path / "still.toml", Still)
    assert still.vessels[1] == Vessel(label="receiver", volume=3)
    assert still.furnace == Furnace(fuel="char\ncoal")


def test_every_key_has_its_line() -> None:
    assert key_lines(TEXT) == {
        ("name",): 2, ("heat",): 3, ("furnace",): 5, ("furnace", "fuel"): 6,
        ("vessels",): 10, ("vessels", 0): 10, ("vessels", 0, "label"): 11,
        ("vessels", 1): 13, ("vessels", 1, "label"): 14, ("vessels", 1, "volume"): 15,
    }  # fmt: skip


def test_lines_of_nested_arrays_of_tables_and_values_over_several_lines() -> None:
    text = 'a = [\n  1,\n  # "]"\n  2,\n]\n"b.c".d = { x = 1, y = 2 }\n'
    text += "[[t]]\n[t.u]\nk = 1\n[[t]]\n[[t.v]]\n[[t.v]]\nk = 2\n"
    lines = key_lines(text)
    assert lines[("a",)] == 1
    assert lines[("b.c", "d")] == 6
    assert lines[("t", 0, "u", "k")] == 9
    assert lines[("t", 1, "v", 1, "k")] == 13


def test_an_unknown_key_is_named_with_its_line_and_a_similar_key() -> None:
    message = error_text(TEXT.replace("volume = 3", "volum = 3"))
    assert "still.toml:15: unknown key vessels.1.volum; did you mean volume?" in message
    assert "label, volume, metal" in message
    assert "still.toml:5" in error_text(TEXT.replace("[furnace]", "[furnance]"))


def test_all_problems_are_reported_at_once() -> None:
    message = error_text(TEXT.replace("0.25", '"hot"').replace('label = "cucurbit"', 'metal = "cooper"'))
    assert "still.toml:3: heat: input should be a valid number" in message
    assert "'hot'" in message
    assert "still.toml:10: vessels.0.label is missing" in message
    assert "still.toml:11: vessels.0.metal" in message
    assert "did you mean 'copper'?" in message


def test_a_missing_key_at_the_top_names_the_file() -> None:
    assert "still.toml: name is missing" in error_text("heat = 0.1\n")


def test_the_message_of_a_validator_is_unchanged() -> None:
    assert "still.toml: ice does not burn" in error_text(TEXT.replace('"""\nchar\ncoal"""', '"ice"'))


def test_a_number_out_of_bounds() -> None:
    assert "still.toml:3: heat: input should be less than or equal to 1, not 25.0" in error_text(
        TEXT.replace("0.25", "25.0")
    )


def test_text_that_is_not_toml() -> None:
    assert "still.toml:2:" in error_text('name = "a"\nheat 3\n')
    assert "still.toml" in error_text('name = "a')


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "still.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(BadInput, match="byte 8 is not UTF-8"):
        load_toml(tmp_path / "still.toml", Still)
    with pytest.raises(BadInput, match=r"no such file\n.*did you mean .*still\.toml"):
        load_toml(tmp_path / "stil.toml", Still)
    with pytest.raises(BadInput):
        load_toml(tmp_path, Still)


def test_overrides_take_toml_values_and_bare_words() -> None:
    overrides = ["heat=1", "furnace.fuel=peat", "vessels.1.volume=7", 'name="a=b"', "vessels.0.metal=steel"]
    still = parse_toml(TEXT, Still, overrides)
    assert (still.heat, still.name) == (1.0, "a=b")
    assert still.furnace == Furnace(fuel="peat")
    assert [vessel.volume for vessel in still.vessels] == [1, 7]
    assert still.vessels[0].metal == "steel"
    assert parse_toml('name = "a"', Still, ["furnace.fuel=gas"]).furnace == Furnace(fuel="gas")


def test_the_error_of_an_override_names_the_override_and_no_line() -> None:
    assert "--set heet=1: unknown key heet; did you mean heat?" in error_text(TEXT, "heet=1")
    assert "--set heat=warm: heat: input should be a valid number" in error_text(TEXT, "heat=warm")
    assert "it must be KEY=VALUE" in error_text(TEXT, "heat")
    assert "not an index of a list of 2 items" in error_text(TEXT, "vessels.5.volume=1")
    assert "not a table" in error_text(TEXT, "name.first=1")
