"""How the answers of two models differ: flips each way, McNemar's test, KL of the choices' probabilities.

None of it tells whether one is as good as the other: that is `limbeck.evals.stats.noninferiority`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from limbeck.registry.records import AnswerDifferences, Flip

if TYPE_CHECKING:
    import pandas as pd

DIAGNOSTIC_COLUMNS = (
    "response",
    "choice_logprobs",
    "target",
    "prompt_end",
)  # that `limbeck.evals.stats.retention.pair_documents` is asked for


def compare_answers(pairs: pd.DataFrame) -> AnswerDifferences:
    """Over rows of `limbeck.evals.stats.retention.pair_documents`, the student being the candidate, with COLUMNS."""
    from scipy.stats import binomtest

    ours, theirs = pairs["student"].to_numpy(), pairs["teacher"].to_numpy()
    lost = won = p_value = None
    if np.isin((ours, theirs), (0, 1)).all():
        lost, won = int((ours < theirs).sum()), int((ours > theirs).sum())
        p_value = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return AnswerDifferences(right_to_wrong=lost, wrong_to_right=won, mcnemar_p=p_value, kl=_kl(pairs))


def find_flips(pairs: pd.DataFrame, max_per_task: int) -> list[Flip]:
    """The documents where the values differ, `max_per_task` of each task, the largest difference first."""
    import pandas as pd

    apart = (pairs["student"] - pairs["teacher"]).abs()
    rows = pairs.assign(apart=apart)[apart > 0].sort_values(["apart", "doc_id"], ascending=[False, True])
    shown = pd.concat([rows[rows["task"] == task].head(max_per_task) for task in dict.fromkeys(pairs["task"])])
    texts = {
        "prompt_end": "teacher_prompt_end",
        "target": "teacher_target",
        "candidate_response": "student_response",
        "reference_response": "teacher_response",
    }
    return [
        Flip(
            task=row["task"],
            doc_id=row["doc_id"],
            candidate_value=row["student"],
            reference_value=row["teacher"],
            **{field: row[column] if isinstance(row[column], str) else None for field, column in texts.items()},
        )
        for row in shown.to_dict("records")
    ]


def _kl(pairs: pd.DataFrame) -> float | None:
    """KL(teacher || student), mean over documents, nats; None where a document's choices are not known."""
    from scipy.special import log_softmax

    ours, theirs = pairs["student_choice_logprobs"], pairs["teacher_choice_logprobs"]
    if ours.isna().any() or theirs.isna().any():
        return None
    total = 0.0
    for student, teacher in zip(ours, theirs, strict=True):
        p, q = log_softmax(np.asarray(teacher, np.float64)), log_softmax(np.asarray(student, np.float64))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(pairs)
