"""Which form of the teacher cache fits an objective."""

from __future__ import annotations

import pytest

from limbeck.distill.recipe import cache_form
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.recipe.schema import Cache, Layers, Objective

KL = Objective(divergence="forward_kl")


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"])
def test_the_sampled_form_fits_only_forward_kl(divergence: str) -> None:
    objective = Objective(divergence=divergence)  # type: ignore[arg-type]
    assert divergence in (cache_form.reason_form_unfit("sampled", objective) or "")
    assert cache_form.reason_form_unfit("topk", objective) is None
    assert cache_form.reason_form_unfit("online", objective) is None
    chosen = cache_form.choose_form(Cache(form=None), objective, 300)
    assert chosen == Form("topk", 32, 300)
    with pytest.raises(ValueError, match="average"):
        cache_form.choose_form(Cache(form="sampled"), objective, 300)


def test_the_smallest_form_that_fits_the_objective_is_chosen() -> None:
    any_form = Cache(form=None)
    assert cache_form.choose_form(any_form, KL, 300) == Form("sampled", any_form.samples, 300)
    hot = KL.model_copy(update={"temperature": 2.0})
    assert cache_form.choose_form(any_form, hot, 300) == Form("sampled", any_form.samples, 300, 2.0)
    assert cache_form.choose_form(Cache(form="topk", top_k=500), hot, 300) == Form("topk", 300, 300, 2.0)
    assert cache_form.choose_form(Cache(form="online"), KL, 300) is None
    layered = Objective(divergence="forward_kl", layers=Layers())
    assert cache_form.choose_form(any_form, layered, 300) is None  # runs online
    assert "hidden states" in (cache_form.reason_no_form_fits(Cache(form="topk"), layered) or "")
    assert cache_form.choose_form(any_form, KL, 300, endpoint=True) == Form("topk", 32, 300)
    assert "temperature" in (cache_form.reason_no_form_fits(any_form, hot, endpoint=True) or "")
    assert "endpoint" in (cache_form.reason_no_form_fits(any_form, layered, endpoint=True) or "")
    assert "most likely" in (cache_form.reason_no_form_fits(Cache(form="sampled"), KL, endpoint=True) or "")
