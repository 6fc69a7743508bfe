"""`ludwig-peft`: what Ludwig's own command line has no place for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Helpers around `ludwig train` for language models.")
console = Console()
if not console.is_terminal:
    console.width = 250  # rich would cut tables for a file or a pipe to 80 columns
problems = Console(stderr=True)


@app.command()
def check(config: Annotated[Path, typer.Argument(help="A YAML file with model_type: llm.")]) -> None:
    """Validate a config: unknown keys, wrong values and options that cannot take effect, without loading a model."""
    from ludwig_peft_plugin.register import register

    register()
    from ludwig.error import ConfigValidationError
    from ludwig.schema.model_types.base import ModelConfig
    from ludwig.utils.data_utils import load_yaml

    from ludwig_peft_plugin.commands.check import adapter_rows
    from ludwig_peft_plugin.errors import PluginError

    try:
        config_obj: Any = ModelConfig.from_dict(load_yaml(str(config)))
    except (ConfigValidationError, PluginError, OSError) as error:
        problems.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    table = Table(title=f"{config} is valid", show_header=False)
    table.add_row("base model", config_obj.base_model)
    for row in adapter_rows(config_obj):
        table.add_row(*row)
    table.add_row("quantisation", f"{config_obj.quantization.bits} bit" if config_obj.quantization else "none")
    table.add_row("dataset", str(config_obj.dataset or config_obj.training_set or "given on the command line"))
    table.add_row("exports", ", ".join(entry.format for entry in config_obj.export) or "none")
    console.print(table)


@app.command()
def estimate(
    config: Annotated[Path, typer.Option("--config", "-c", help="A YAML file with model_type: llm.")],
    gpu: Annotated[
        str | None, typer.Option(help="The GPU's memory, as 24GiB; by default that of this machine's GPU.")
    ] = None,
    row_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest row of the data; by default the config's limit.")
    ] = None,
    target_share: Annotated[
        float, typer.Option(min=0, max=1, help="The part of a row's tokens that carries loss.")
    ] = 1.0,
    model_config: Annotated[
        Path | None, typer.Option(help="A config.json that describes the base, where base_model cannot be reached.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Estimate the GPU memory of training, the largest batch that fits and what to change, without loading weights."""
    import json
    import logging

    from ludwig_peft_plugin.register import register

    register()
    from ludwig.error import ConfigValidationError

    from ludwig_peft_plugin.errors import PluginError
    from ludwig_peft_plugin.estimate.gpu import local_gpu, parse_size
    from ludwig_peft_plugin.estimate.report import opened_config, report
    from ludwig_peft_plugin.estimate.show import show

    logging.getLogger("ludwig_peft_plugin").setLevel(logging.WARNING)
    try:
        available = local_gpu() if gpu is None else parse_size(gpu)
        with opened_config(config, model_config) as config_obj:
            result = report(config_obj, gpu=available, row_tokens=row_tokens, target_share=target_share)
    except (ConfigValidationError, PluginError, OSError) as error:
        problems.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        show(result, str(config), console)


@app.command()
def schema(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("ludwig_llm.schema.json"),
) -> None:
    """Write the JSON schema with which an editor completes and checks YAMLs of language models."""
    from ludwig_peft_plugin.register import register

    register()
    from ludwig_peft_plugin.config.editor_schema import write_schema

    write_schema(path)
    console.print(f"Wrote {path}. In VS Code (YAML extension), begin a config with:")
    console.print(f"# yaml-language-server: $schema={path.name}", markup=False)


@app.command()
def methods(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML whose base, and adapter options, are counted.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", "--base-model", help="The base on which parameters are counted.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapter types: what they train, where they work and what they are good for."""
    import json

    from ludwig_peft_plugin.register import register

    register()
    from ludwig.error import ConfigValidationError
    from ludwig.utils.data_utils import load_yaml

    from ludwig_peft_plugin.commands import methods as command
    from ludwig_peft_plugin.errors import PluginError

    try:
        given = load_yaml(str(config)) if config is not None else {}
        base = base_model or given.get("base_model") or "tiny-llama-python"
        found = command.methods(base, given)
    except (ConfigValidationError, PluginError, OSError) as error:
        problems.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(command.as_json(found), indent=2))
    else:
        command.show(found, base, console)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file with model_type: llm and a dataset.")],
    methods: Annotated[str, typer.Option(help="Adapter types with commas between them, or `all`.")],
    out: Annotated[Path, typer.Option(help="Folder of the report; a comparison that is there goes on.")] = Path(
        "results/compare"
    ),
    overrides: Annotated[
        Path | None, typer.Option(help="A YAML of options by method, as `bottleneck: {reduction_factor: 8}`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The random seed of every run.")] = 42,
    at_once: Annotated[int, typer.Option("--jobs", min=1, help="How many to train at a time, over all GPUs.")] = 1,
) -> None:
    """Train several adapter types on one dataset, each in its own process, and report loss, memory and time."""
    from ludwig_peft_plugin.register import register

    register()
    from ludwig.error import ConfigValidationError
    from ludwig.utils.data_utils import load_yaml

    from ludwig_peft_plugin.commands.compare import compare as run
    from ludwig_peft_plugin.errors import PluginError

    try:
        given = load_yaml(str(overrides)) if overrides is not None else {}
        names = methods.split(",")
        results = run(
            load_yaml(str(config)),
            names,
            out,
            title=config.stem,
            overrides=given,
            seed=seed,
            at_once=at_once,
            console=console,
        )
    except (ConfigValidationError, PluginError, OSError) as error:
        problems.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    console.print(f"Wrote {out / 'report.md'}, report.json and report.svg.", markup=False, highlight=False)
    failures = [result.method for result in results if result.error is not None]
    if failures:
        problems.print(f"{len(failures)} failed: {', '.join(failures)}", style="red", markup=False)
        raise typer.Exit(1)


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def predict(
    context: typer.Context,
    adapter: Annotated[str | None, typer.Option(help="The adapter that answers; `base` for none.")] = None,
) -> None:
    """Run `ludwig predict` with one of several adapters; all other arguments are Ludwig's."""
    _run_ludwig("predict", adapter, context.args)


@app.command(context_settings=PASSED_ON)
def evaluate(
    context: typer.Context,
    adapter: Annotated[str | None, typer.Option(help="The adapter that answers; `base` for none.")] = None,
) -> None:
    """Run `ludwig evaluate` with one of several adapters; all other arguments are Ludwig's."""
    _run_ludwig("evaluate", adapter, context.args)


def _run_ludwig(command: str, adapter: str | None, arguments: list[str]) -> None:
    from ludwig_peft_plugin.commands.predict import run_ludwig
    from ludwig_peft_plugin.errors import PluginError

    try:
        run_ludwig(command, adapter, arguments)
    except PluginError as error:
        problems.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


@app.command()
def info() -> None:
    """Show whether the plugin is active, and the versions it found and supports."""
    from ludwig_peft_plugin import __version__, _autoload, versions

    table = Table(title=f"ludwig-peft-plugin {__version__}")
    for heading in ("", "installed", "supported"):
        table.add_column(heading)
    for name, supported in versions.SUPPORTED.items():
        table.add_row(name, versions.installed(name) or "-", supported)
    console.print(table)
    state = "on" if _autoload.is_enabled() else "off (LUDWIG_PEFT_PLUGIN=0)"
    console.print(f"Loading by itself when Ludwig is imported: {state}")


if __name__ == "__main__":
    app()
