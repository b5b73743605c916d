"""How to use a version: Limbeck commands, and lines of Python."""

from __future__ import annotations

import shlex

from limbeck.registry.records import Version


def command_snippets(version: Version) -> list[str]:
    """The commands that export, score, serve or promote a version."""
    ref = shlex.quote(version.ref)
    if version.kind == "onnx":
        return [
            f"limbeck generate {ref} PROMPT",
            f"limbeck serve {ref}",
            f"limbeck deploy {ref} --output DIR",
            f"limbeck promote {ref} --alias production",
        ]
    score = f"limbeck eval {ref} --tasks TASK,... --against {shlex.quote(version.teacher or 'TEACHER')}"
    return [score] if version.engine == "endpoint" else [f"limbeck export {ref} --precision fp32,int8-weight", score]


def python_snippets(version: Version) -> dict[str, list[str]]:
    """Library -> lines of Python that complete a prompt; empty for an endpoint.

    They fetch the files from the MLflow server of `MLFLOW_TRACKING_URI`.
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
            "from limbeck.runtime import Runtime  # from Limbeck; needs only onnxruntime and tokenizers",
            *fetch,
            "runtime = Runtime.load(Path(folder))",
            "print(runtime.generate(['def main('], max_new_tokens=32)[0].text)",
        ],
        "optimum": [
            "# in an environment with optimum-onnx, which needs transformers 4",
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
