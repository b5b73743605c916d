"""How the answers of two models differ: flips in each direction, McNemar's test, KL of the choices' probabilities.

None of this shows whether one model is as good as the other: see `limbeck.evals.stats.noninferiority`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from limbeck.registry.records import AnswerDifferences, Flip

if TYPE_CHECKING:
    import pandas as pd

# The columns that `limbeck.evals.stats.retention.pair_documents` must include for the functions of this module.
DIAGNOSTIC_COLUMNS = ("response", "choice_logprobs", "target", "prompt_end")


def compare_answers(pairs: pd.DataFrame) -> AnswerDifferences:
    """How the answers of two models differ; the student is the candidate. Fields that do not apply are None.

    Args:
        pairs: rows of `pair_documents` with DIAGNOSTIC_COLUMNS.
    """
    from scipy.stats import binomtest

    candidate, reference = pairs["student"].to_numpy(), pairs["teacher"].to_numpy()
    lost = won = p_value = None
    if np.isin((candidate, reference), (0, 1)).all():
        lost, won = int((candidate < reference).sum()), int((candidate > reference).sum())
        p_value = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return AnswerDifferences(right_to_wrong=lost, wrong_to_right=won, mcnemar_p=p_value, kl=_mean_kl(pairs))


def find_flips(pairs: pd.DataFrame, max_per_task: int) -> list[Flip]:
    """The documents whose values differ, at most `max_per_task` of each task, the largest difference first."""
    import pandas as pd

    difference = (pairs["student"] - pairs["teacher"]).abs()
    rows = pairs.assign(difference=difference)[difference > 0]
    rows = rows.sort_values(["difference", "doc_id"], ascending=[False, True])
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


def _mean_kl(pairs: pd.DataFrame) -> float | None:
    """KL(teacher || student), mean over documents, nats; None if the choices of a document are unknown."""
    from scipy.special import log_softmax

    students, teachers = pairs["student_choice_logprobs"], pairs["teacher_choice_logprobs"]
    if students.isna().any() or teachers.isna().any():
        return None
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        log_p, log_q = log_softmax(np.asarray(teacher, np.float64)), log_softmax(np.asarray(student, np.float64))
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return total / len(pairs)
