"""The `limbeck` command: a table of contents of the program. Imports a command's module only when it is called."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module

import click

from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.core.extras import install_command

# Threads that spin for long while they wait block a core that another process needs. Training tokens per second on 2
# cores, both idle / one busy: 35,000 / 10,000 by default, 33,000 / 16,000 with this, 28,000 / 19,000 without spinning.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

Table = dict[str, tuple["str | Table", str]]

# command -> (module:object, its line in `--help`)
MODELS: Table = {
    "list": ("limbeck.registry.commands.models:list_", "The versions of NAME, or of all models."),
    "show": ("limbeck.registry.commands.models:show", "Everything recorded about a version."),
    "lineage": ("limbeck.registry.commands.models:lineage", "The tree from teacher to served artifact."),
    "card": ("limbeck.registry.commands.models:card", "The model card of a version, as Markdown."),
    "diff": ("limbeck.evals.commands.diff:diff", "Compare two versions: recipe, scores, cost."),
    "sbom": ("limbeck.registry.commands.sbom:sbom", "The SBOM of a version: print, store, sign, verify."),
    "history": ("limbeck.registry.commands.history:history", "The alias moves of NAME, from its ledger."),
    "copy": ("limbeck.registry.commands.copy:copy", "Copy a version with its evidence to another tracking store."),
}
TASKS: Table = {
    "make": ("limbeck.evals.commands.tasks:make", "Make lm-eval tasks from held-out text."),
    "check": ("limbeck.evals.commands.tasks:check", "Find what is wrong with tasks before anything is scored."),
}
KEYS: Table = {
    "new": ("limbeck.registry.commands.keys:new", "Make a private key in a file."),
    "show": ("limbeck.registry.commands.keys:show", "Print a public key, as a line for a file of trusted keys."),
}
POLICY: Table = {
    "check": (
        "limbeck.registry.commands.policy:check",
        "Describe what a policy requires; with --model, apply it to a version.",
    ),
}
WEBHOOKS: Table = {
    "list": ("limbeck.registry.commands.webhooks:list_", "The webhooks of the server."),
    "add": ("limbeck.registry.commands.webhooks:add", "Have the server send a notice to an address after an event."),
    "remove": ("limbeck.registry.commands.webhooks:remove", "Remove a webhook."),
    "test": ("limbeck.registry.commands.webhooks:test", "Have the server send an example notice now."),
}
# or (the table of a group, its line in `--help`)
COMMANDS: Table = {
    "quickstart": ("limbeck.quickstart.cli:quickstart", "Run the whole loop with what this machine has."),
    "data": ("limbeck.distill.commands.distill:data", "Write a recipe's train and held-out text."),
    "distill": ("limbeck.distill.commands.distill:distill", "Distil a teacher into the students of a recipe."),
    "cache": ("limbeck.distill.commands.cache:cache", "The teacher caches of this machine: list, verify, prune."),
    "export": (
        "limbeck.export.commands.export:export",
        "Export PyTorch models to ONNX variants, compared with PyTorch.",
    ),
    "register": (
        "limbeck.registry.commands.register:register",
        "Register a checkpoint or ONNX artifact that exists already.",
    ),
    "tasks": (TASKS, "Make and check lm-eval tasks."),
    "eval": (
        "limbeck.evals.commands.eval:evaluate",
        "Score models with lm-eval, quality and cost relative to a teacher.",
    ),
    "compare": (
        "limbeck.evals.commands.compare:compare",
        "Compare one scored version with another, document by document.",
    ),
    "leaderboard": (
        "limbeck.evals.commands.leaderboard:leaderboard",
        "Rank the versions of a model by cost and quality.",
    ),
    "verdict": (
        "limbeck.evals.commands.verdict:verdict",
        "Is the giant a waste here? One page with the answer.",
    ),
    "models": (MODELS, "Browse the registry."),
    "promote": ("limbeck.registry.commands.gate:promote", "Move an alias to a version that passes the policy."),
    "rollback": ("limbeck.registry.commands.gate:rollback", "Move an alias back to its previous version."),
    "policy": (POLICY, "Check a policy."),
    "protect": ("limbeck.registry.commands.gate:protect", "Let an alias move only under one policy."),
    "request": ("limbeck.registry.commands.approvals:request", "Request that an alias may point at a version."),
    "approve": ("limbeck.registry.commands.approvals:approve", "Approve a request, after printing the gate decision."),
    "reject": ("limbeck.registry.commands.approvals:reject", "Reject a request."),
    "requests": ("limbeck.registry.commands.approvals:requests", "List the open requests."),
    "keys": (KEYS, "The key that signs SBOMs and approvals."),
    "deploy": ("limbeck.export.commands.deploy:deploy", "Copy a verified, self-contained bundle."),
    "serve": ("limbeck.export.commands.serve:serve", "Serve an ONNX model over OpenAI-compatible HTTP."),
    "generate": ("limbeck.export.commands.generate:generate", "Complete a prompt and report the speed."),
    "webhooks": (WEBHOOKS, "Webhooks: notices of what happens to models."),
    "ui": ("limbeck.web.cli:ui", "The registry as web pages: look, compare, promote, roll back."),
    "backup": ("limbeck.registry.commands.backup:backup", "Write the workspace into one file."),
    "restore": ("limbeck.registry.commands.backup:restore", "Make the workspace from a backup."),
    "doctor": (
        "limbeck.registry.commands.doctor:doctor",
        "Check the installation, the machine and the registry.",
    ),
}

# Which extra of the distribution the commands of a module need. `serve` and `deploy` need less than the rest of export.
EXTRAS = {
    "limbeck.distill": "train",
    "limbeck.evals": "eval",
    "limbeck.export": "export",
    "limbeck.export.commands.deploy": "serve",
    "limbeck.export.commands.serve": "serve",
    "limbeck.quickstart": "all",
    "limbeck.registry": "registry",
    "limbeck.registry.commands.register": "export",
    "limbeck.web": "web",
}


class LazyGroup(click.Group):
    """A group that imports each command from its room only when it is called."""

    command_table: Table = COMMANDS

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.command_table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.command_table:
            return None
        where, line = self.command_table[cmd_name]
        if not isinstance(where, str):
            group = LazyGroup(cmd_name, help=line)
            group.command_table = where
            return group
        module, name = where.split(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table only: `--help` must not import a room.
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.command_table.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.command_table, n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None


@click.group(cls=LazyGroup)
@click.version_option(package_name="limbeck")
def cli() -> None:
    """Turn a large language model into the cheapest small one that provably keeps its quality, and ship it.

    A MODEL is a local folder or .gguf file, a Hugging Face hub id, NAME/VERSION, NAME@ALIAS, an MLflow models:/ URI, or
    BASE+ADAPTER: a MODEL and the folder of a LoRA adapter for it.
    State lives in .limbeck/ (LIMBECK_HOME moves it); MLFLOW_TRACKING_URI points at a shared MLflow server.
    """


def main(args: list[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done, 1 a gate or check failed, 2 bad input, 130 stopped by Ctrl-C."""
    try:
        code = cli.main(args, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except LimbeckError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        line = missing_package(sys.argv[1:] if args is None else args, error.name or "")
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        print("  make room, or move the state with LIMBECK_HOME, and run the same command again", file=sys.stderr)
        sys.exit(2)


def missing_package(args: list[str], module: str) -> str | None:
    """What to say if the command of `args` cannot import `module`; None if that is no package of an extra."""
    command, address = _named_command(args)
    room = max((name for name in EXTRAS if f"{address}.".startswith(f"{name}.")), key=len, default="")
    install = install_command(module, EXTRAS.get(room, ""))
    return install and f"`{command}` needs {module}, which is not installed: {install}"


def _named_command(args: list[str]) -> tuple[str, str]:
    """The command that `args` begin with, as a user types it, and its module."""
    words, table = ["limbeck"], COMMANDS
    for word in args:
        if word not in table:
            break
        words.append(word)
        target = table[word][0]
        if isinstance(target, str):
            return " ".join(words), target.partition(":")[0]
        table = target
    return " ".join(words), ""


if __name__ == "__main__":
    main()
