"""The plots are drawn to scale, and long curves are thinned."""

from __future__ import annotations

import re

import pytest

from limbeck.registry.records import Estimate
from limbeck.web.views import plots


def test_a_curve_is_drawn_to_scale() -> None:
    svg = plots.draw_curves("loss", [plots.Series("loss", [(0, 4.0), (10, 2.0), (20, 3.0)])])
    (x0, y0), (x1, y1), (x2, y2) = [
        (float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    ]
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.2)
    assert y1 > y2 > y0


def test_an_interval_is_drawn_to_scale() -> None:
    svg = plots.draw_interval(Estimate(value=0.5, low=0.25, high=1.0), 0.0, 1.0, marks=(0.0,))
    assert re.findall(r'd="M([\d.]+) ', svg) == ["4.0", "52.0", "100.0"]
    assert "H196.0" in svg
    assert "0.5, between 0.25 and 1" in svg


def test_a_long_curve_is_thinned_but_keeps_its_last_point() -> None:
    points = [(step, float(step)) for step in range(10_001)]
    svg = plots.draw_curves("x", [plots.Series("x", points)])
    assert svg.count("<circle") <= plots.MAX_POINTS + 1
    assert "step 10,000: 10000" in svg
