"""What to do with a version: commands of Limbeck, and lines of Python that need none of it."""

from __future__ import annotations

import shlex

from limbeck.registry.records import Version


def command_snippets(version: Version) -> list[str]:
    """The commands that make something of a version."""
    ref = shlex.quote(version.ref)
    if version.kind == "onnx":
        return [
            f"limbeck generate {ref} PROMPT",
            f"limbeck serve {ref}",
            f"limbeck deploy {ref} --output DIR",
            f"limbeck promote {ref} --alias production",
        ]
    score = f"limbeck eval {ref} --tasks TASK,... --against {shlex.quote(version.teacher or 'TEACHER')}"
    return [score] if version.engine == "endpoint" else [f"limbeck export {ref} --precision fp32,int8", score]


def python_snippets(version: Version) -> dict[str, list[str]]:
    """Library -> lines of Python that complete a prompt; none of an endpoint.

    The files are found through MLflow: `MLFLOW_TRACKING_URI` says where.
    """
    if version.engine == "endpoint":
        return {}
    uri = repr(f"models:/{version.ref}")
    fetch = ["from mlflow.artifacts import download_artifacts", "", f"folder = download_artifacts({uri})"]
    complete = "print(generate('def main(', max_new_tokens=32)[0]['generated_text'])"
    if version.kind != "onnx":
        load = ["from transformers import pipeline", *fetch, "generate = pipeline('text-generation', model=folder)"]
        return {"transformers": [*load, complete]}
    return {
        "onnxruntime": [
            "from pathlib import Path",
            "from limbeck.runtime import Runtime  # of Limbeck; needs onnxruntime and tokenizers alone",
            *fetch,
            "runtime = Runtime.load(Path(folder))",
            "print(runtime.generate(['def main('], max_new_tokens=32)[0].text)",
        ],
        "optimum": [
            "from optimum.onnxruntime import ORTModelForCausalLM",
            "from transformers import AutoTokenizer, pipeline",
            *fetch,
            "model = ORTModelForCausalLM.from_pretrained(folder)",
            "generate = pipeline('text-generation', model=model, tokenizer=AutoTokenizer.from_pretrained(folder))",
            complete,
        ],
        "mlflow": [
            "import mlflow",
            "",
            f"model = mlflow.pyfunc.load_model({uri})",
            "print(model.predict({'prompt': ['def main(']}, params={'max_new_tokens': 32}))",
        ],
    }
