"""Intervals of the figures of quality, and what exceeds a limit."""

from __future__ import annotations

import numpy as np

from limbeck.export.artifact.quality import Document, estimate_quality, exceeded_figures
from limbeck.registry.records import Estimate
from tests.export.export_helpers import Exported


def make_documents(count: int, seed: int) -> list[Document]:
    """Documents whose tokens share a level of KL: the mean over documents is 0.02."""
    dice = np.random.default_rng(seed)
    levels = dice.exponential(0.02, count)
    return [Document(dice.exponential(level, 100), 95, 300.0, 300.0 * (1 + level / 3)) for level in levels]


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """A test that took tokens as independent would hold it in 1 case of 4."""
    held = [
        estimate.low <= 0.02 <= estimate.high
        for estimate in (estimate_quality(make_documents(24, seed))["mean_kl"] for seed in range(60))
    ]
    assert np.mean(held) >= 0.85


def test_figures_are_those_of_all_tokens() -> None:
    documents = make_documents(5, 0)
    quality = estimate_quality(documents)
    kl = np.concatenate([document.kl for document in documents])
    assert quality["mean_kl"].value == kl.mean()
    assert quality["p99_kl"].value == np.quantile(kl, 0.99)
    assert quality["top1_agreement"].value == 0.95
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in quality.values())


def test_the_bad_end_of_the_interval_decides(llama: Exported) -> None:
    parity = llama.variants[0].parity
    quality = {
        "mean_kl": Estimate(value=0.02, low=0.01, high=0.03),
        "top1_agreement": Estimate(value=0.9, low=0.85, high=0.95),
    }

    def exceeded(mean_kl: float, top1_agreement: float) -> list[str]:
        limits = {"mean_kl": mean_kl, "top1_agreement": top1_agreement}
        return exceeded_figures(parity.model_copy(update={"quality": quality, "limits": limits}))

    assert exceeded(0.03, 0.85) == []
    assert exceeded(0.029, 0.85) == ["mean_kl"]
    assert exceeded(0.03, 0.86) == ["top1_agreement"]
    nan = {"mean_kl": Estimate(value=np.nan, low=np.nan, high=np.nan)}
    nothing = parity.model_copy(update={"quality": nan, "limits": {"mean_kl": 1.0}})
    assert exceeded_figures(nothing) == ["mean_kl"]
