"""The text-chunk loss equals KL divergences of two outcomes, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from limbeck.distill.losses import text_chunks
from limbeck.distill.losses.chunked_head import LazyLogits
from limbeck.distill.recipe.schema import Objective


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_the_divergence_equals_that_of_two_coins(temperature: float) -> None:
    log_p, log_q = -torch.rand(2, 50, dtype=torch.float64).mul(3).exp() + 0.9
    log_q.requires_grad_()
    got = text_chunks.divergence(log_p, log_q, temperature)
    p, q = ((x / temperature).exp() for x in (log_p, log_q))
    wanted = temperature * kl_divergence(Bernoulli(probs=p), Bernoulli(probs=q))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    one, other = (torch.autograd.grad(each.sum(), log_q, retain_graph=True)[0] for each in (got, wanted))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert float(text_chunks.divergence(log_p, log_p, temperature).abs().max()) == 0


def test_the_divergence_of_certain_chunks_is_finite() -> None:
    certain, unlikely = torch.tensor([0.0, 0.0, -1e4]), torch.tensor([-1e4, 0.0, 0.0])
    for temperature in (1.0, 100.0):
        assert text_chunks.divergence(certain.double(), unlikely.double(), temperature).isfinite().all()


@pytest.mark.parametrize(("labels", "temperature"), [(0.0, 1.0), (0.0, 100.0), (0.3, 10.0)])
def test_the_loss_equals_a_plain_one(labels: float, temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    rows = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)[:, :5]
    numbers = torch.tensor([[1, 1, 2, 0, 3], [1, 0, 1, 2, 0], [0, 0, 0, 0, 1]])
    stored = torch.tensor([[0, -2.5, -0.5, 0, -4], [0, 0, -1.5, -0.1, 0], [0, 0, 0, 0, -3]])
    ids = torch.randint(20, (9,))
    objective = Objective(divergence="chunks", labels=labels, temperature=temperature)
    student = LazyLogits(hidden, weight)
    loss = text_chunks.loss(student, ids, rows, {"chunks": numbers, "logprobs": stored}, objective)
    got = torch.autograd.grad(loss, (hidden, weight))

    own = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(9), ids]
    places = {tuple(place): number for number, place in enumerate(rows.nonzero().tolist())}
    total = -labels * own.sum()
    for row in range(3):
        for chunk in range(1, int(numbers[row].max()) + 1):
            at = [column for column in range(5) if numbers[row, column] == chunk]
            log_q = sum(own[places[row, column]] for column in at)
            log_p = stored[row, at].double().sum()
            coins = [Bernoulli(probs=(x / temperature).exp()) for x in (log_p, log_q)]
            total = total + (1 - labels) * temperature * kl_divergence(*coins)
    wanted = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
