"""Fixtures for the tests of every room: small real models, an empty store in its own state folder, the command."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

from limbeck.registry.core.digest import folder_digest
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Cost

# Set before any Hugging Face import: a test that reaches for a hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two test processes on two cores: one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
# The same examples in each run, and no time limit for one: no test fails by chance.
hypothesis.settings.register_profile("limbeck", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("limbeck")


def pytest_collection_finish() -> None:
    """Hide the objects of imported modules, hundreds of thousands, from garbage collections.

    transformers' trainer collects garbage before every run, which takes half a second with them.
    """
    gc.freeze()


TEXT = [
    "def add(a, b):\n    return a + b\n",
    "class Vessel:\n    def __init__(self, volume):\n        self.volume = volume\n",
    "for i in range(10):\n    print(i, 'drops of spirit')\n",
    "The quick brown fox jumps over the lazy dog. \u00c0 bient\u00f4t, caf\u00e9!\n",
    "import os\nimport sys\n\nif __name__ == '__main__':\n    sys.exit(os.EX_OK)\n",
]

_BLOCKS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=128)  # fmt: skip
SIZES = {
    "llama": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True),
    "qwen2": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True),
    "qwen3": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
                  num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=128),
    # Attention with a window, soft caps, position biases, and a model with a state instead.
    "mistral": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=128, sliding_window=24),
    "gemma2": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                   num_key_value_heads=2, max_position_embeddings=128, final_logit_softcapping=3.0),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    # Experts, a gated delta rule, short convolutions, and keys and values of an earlier layer.
    "qwen3_moe": _BLOCKS | dict(head_dim=8, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2),
    "qwen3_5_text": _BLOCKS | dict(head_dim=16, layer_types=["linear_attention", "full_attention"],
                                   linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                                   linear_value_head_dim=8),
    "lfm2": _BLOCKS | dict(layer_types=["conv", "full_attention"]),
    "gemma4_text": _BLOCKS | dict(num_hidden_layers=4, num_kv_shared_layers=2, head_dim=8, global_head_dim=16,
                                  layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=24,
                                  hidden_size_per_layer_input=8, vocab_size_per_layer_input=300),
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 300 tokens that adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


def make_cost(usd: float) -> Cost:
    """The cost of a small model, at `usd` dollars per million tokens."""
    return Cost(
        params=1000,
        disk_bytes=4000,
        peak_rss_bytes=10_000,
        prefill_tokens_per_s=1e4,
        decode_tokens_per_s=300.0,
        p50_ms=20.0,
        p95_ms=30.0,
        usd_per_million_tokens=usd,
        usd_per_hour=1.0,
        prompt_tokens=64,
        new_tokens=64,
        requests=20,
        threads=1,
        machine="a test",
        protocol=2,
    )


def make_model(folder: Path, tokenizer_folder: Path, model_type: str, seed: int = 0, **changes: object) -> Path:
    """A randomly initialised causal LM of `model_type` with its tokenizer, saved in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {"vocab_size": len(tokenizer)} | SIZES[model_type] | changes
    config = AutoConfig.for_model(model_type, **ids, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # The usual initialisation gives nearly uniform logits; tests need distinct ones.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), tokenizer_folder, "llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen2"), tokenizer_folder, "qwen2")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("gpt2"), tokenizer_folder, "gpt2")


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("neox"), tokenizer_folder, "gpt_neox")


@pytest.fixture(scope="session")
def optimum_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function that returns a checkpoint's fp32 artifact with optimum's graph. Tests must not change it.

    An export takes seconds: the first test process that needs one makes it for all.
    """
    from filelock import FileLock

    from limbeck.export.artifact.export import export_onnx

    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "optimum"
    shared.mkdir(exist_ok=True)

    def export(model: Path) -> Path:
        folder = shared / folder_digest(model)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                export_onnx(model, folder, engine="optimum")
        return folder

    return export


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database as `Store` creates it; tests copy it, since its migrations take seconds."""
    from sqlalchemy import Engine, event

    # No test needs the data after a power cut, and waiting for the disk is most of the time of a small test.
    event.listen(Engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    folder = tmp_path_factory.mktemp("database")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Store()
    gc.freeze()  # MLflow's modules were imported just now, see `pytest_collection_finish`
    return folder / "mlflow.db"


@pytest.fixture(scope="session", autouse=True)
def _default_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A state folder for tests that use no fixture for it, so that they do not write into the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@contextmanager
def new_workspace(folder: Path, database: Path) -> Iterator[pytest.MonkeyPatch]:
    """Within it, LIMBECK_HOME is `folder`, a new workspace with this empty database."""
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield patch


@pytest.fixture
def limbeck_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this test, which does not exist yet; the current folder is empty."""
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def store(limbeck_home: Path, empty_database: Path) -> Store:
    """An empty tracking store for this test."""
    limbeck_home.mkdir()
    shutil.copy(empty_database, limbeck_home / "mlflow.db")
    return Store()


class Result(NamedTuple):
    """The result of a command: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def limbeck(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a `limbeck` command line in this process: `limbeck("models", "list")`. Use `store` beside it."""

    def run(*args: object) -> Result:
        from limbeck.cli import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        printed = capsys.readouterr()
        return Result(int(stopped.value.code or 0), printed.out, printed.err)

    return run
