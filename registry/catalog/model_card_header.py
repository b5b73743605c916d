"""The YAML header of a model card, which the Hugging Face hub and programs read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from limbeck.registry.core.markdown import one_line
from limbeck.registry.records import Scorecard, Version

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

MAX_TASKS = 100  # with results
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # a hub id, or NAME/VERSION
# The hub's identifiers of licences; another licence is `other`, with its name.
LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-4.0 cc-by-nc-nd-4.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-2.0 creativeml-openrail-m ecl-2.0
epl-2.0 eupl-1.2 gemma gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
"""


def model_card_yaml(version: Version, scorecard: Scorecard | None, recipe: Mapping[str, str]) -> str:
    """The fields as YAML, without the lines `---` around them.

    Args:
        version: of which model.
        scorecard: for the evaluation results; None for none.
        recipe: the parameters of the run that made the version.
    """
    from huggingface_hub import ModelCardData

    onnx = version.kind == "onnx"
    library = {"torch": "transformers", "onnxruntime": "onnx"}.get(version.engine)
    is_distilled = version.kind != "teacher" and version.control is None
    fields: dict[str, Any] = _licence_fields(version.licence) | {
        "base_model": _hub_name(version.base_model) or _hub_name(version.parent),
        "base_model_relation": "quantized" if onnx and version.precision != "fp32" else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [
            "limbeck",
            *(["distillation"] if is_distilled else []),
            *(["onnx", one_line(version.precision)] if onnx else []),
        ],
        "model_name": one_line(version.ref),
        "eval_results": list(_results(scorecard)) if scorecard else None,
    }
    dataset = _hub_name(recipe.get("data.path")) if recipe.get("data.source") == "dataset" else None
    fields["datasets"] = [dataset] if dataset else None
    fields = {name: value for name, value in fields.items() if value is not None}
    return ModelCardData(**fields).to_yaml(original_order=list(fields)) + "\n"


def _licence_fields(licence: str | None) -> dict[str, Any]:
    if licence is None:
        return {"license": "unknown"}
    known = one_line(licence).lower()
    return {"license": known} if known in LICENCES.split() else {"license": "other", "license_name": one_line(licence)}


def _hub_name(text: str | None) -> str | None:
    """The text if it is a hub id or NAME/VERSION, else None, for example for a folder."""
    return text if text and HUB_NAME.fullmatch(text) else None


def _results(scorecard: Scorecard) -> Iterator[EvalResult]:
    relative = scorecard.relative
    for task, result in list(scorecard.tasks.items())[:MAX_TASKS]:
        args = {"documents": result.documents} | ({} if result.stderr is None else {"stderr": _short(result.stderr)})
        yield _result(task, result.task_hash, result.metric, result.metric, result.value, args)
        retention = relative.task_retention.get(task) if relative else None
        if relative and retention:
            interval = {"low": _short(retention.low), "high": _short(retention.high)}
            args = interval | {"confidence": retention.confidence}
            name = f"retention against {relative.teacher}"
            yield _result(task, result.task_hash, "retention", name, retention.value, args)


def _result(task: str, revision: str, metric: str, name: str, value: float, args: dict[str, Any]) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=one_line(task),
        dataset_name=one_line(task),
        dataset_revision=one_line(revision),
        metric_type=one_line(metric),
        metric_name=one_line(name),
        metric_value=_short(value),
        metric_args=args,
    )


def _short(value: float) -> float:
    """Rounded to six digits."""
    return float(f"{value:.6g}")
