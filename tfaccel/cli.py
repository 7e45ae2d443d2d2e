"""The tfaccel command: parse, call, print."""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tfaccel import __version__
from tfaccel.terminal import silence_tensorflow

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])

OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

_INTERRUPTED = {"run": "Interrupted. Run it again, and it goes on from the last finished stage."}

_EPILOG = """\b
Exit codes:
  0    done
  1    the work failed (training, conversion, a worker)
  2    wrong usage or input (an unknown option, a bad recipe, a missing or damaged file)
  130  interrupted by Ctrl-C; `run` goes on where it stopped when started again
"""


class InputError(click.ClickException):
    """What the user gave cannot be used."""

    exit_code = WRONG_INPUT


@contextlib.contextmanager
def _user_input() -> Iterator[None]:
    """Whatever is wrong inside the block is wrong with what the user gave."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error)) from error


def _common(command: Command) -> Command:
    """Adds --json and --traceback to a command and turns exceptions into one message."""

    @click.option(
        "--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout."
    )
    @click.option("--traceback", is_flag=True, help="On an error, show where it came from.")
    @functools.wraps(command)
    def guarded(*args: Any, traceback: bool, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _fail(_INTERRUPTED.get(command.__name__, "Interrupted."), INTERRUPTED)
        except Exception as error:
            if traceback:
                import traceback as tracebacks

                click.echo("".join(tracebacks.format_exception(error)), err=True, nl=False)
            if isinstance(error, click.ClickException):
                raise
            _fail(f"{_first_words(error)}", _exit_code(error))

    return guarded  # type: ignore[return-value]


def _exit_code(error: Exception) -> int:
    from tfaccel.recipes.data import DataError
    from tfaccel.recipes.schema import RecipeError

    given = (RecipeError, DataError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
    return WRONG_INPUT if isinstance(error, given) else FAILED


def _first_words(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


@click.group(
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="tfaccel")
def tfaccel() -> None:
    r"""Make Keras models small and fast, and measure that they are.

    \b
    Begin with:
      tfaccel run examples/digits.yaml          teacher, student, pruned, quantized: a few minutes
      tfaccel measure runs/digits/*.tflite --data digits
      tfaccel inspect runs/digits/student.keras
      tfaccel COMMAND --help                    what each command does, with examples
    """


@tfaccel.command(epilog=_EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the run.  [default: runs/<name of the recipe>]",
)
@click.option(
    "-w",
    "--workers",
    type=click.IntRange(min=1),
    help="Horovod workers of every train stage, in place of what the recipe says.",
)
@click.option(
    "-H",
    "--hosts",
    help="Machines for them, such as a:2,b:2, by ssh; this one first.  [default: this one]",
)
@_common
def run(
    recipe: Path, output: Path | None, workers: int | None, hosts: str | None, as_json: bool
) -> None:
    r"""Run a recipe: train, shrink, export and measure, stage by stage.

    RECIPE is a YAML file. Every stage leaves a .keras and a .tflite file in the folder of the run;
    results.json, report.html and log.txt tell about all of them. Stopped and started again, a run
    goes on from the last finished stage; a changed stage is run again, with those that need it.

    \b
    Examples:
      tfaccel run examples/digits.yaml
      tfaccel run examples/digits.yaml --workers 1 --output /tmp/trial
      tfaccel run recipe.yaml --workers 4 --hosts a:2,b:2
      tfaccel run recipe.yaml --json > results.json

    \b
    A recipe:
      name: small
      data: {name: digits}       # or fashion_mnist, cifar10, path/to/data.npz
      stages:
        - {name: big, train: {architecture: cnn, epochs: 10}}
        - {name: small, distill: {teacher: big, architecture: MobileNetV2,
                                  arguments: {width: 0.35}, epochs: 20}}
        - {name: int8, quantize_aware: {model: small, epochs: 5}}
    """
    from tfaccel.recipes.reading import load_recipe

    with _user_input():
        loaded = load_recipe(recipe)
        if hosts is not None:
            from tfaccel.distributed.hosts import check_begins_here, check_hosts

            workers = check_hosts(hosts, workers)
            check_begins_here(hosts)

    from tfaccel.recipes.progress import ProgressBars
    from tfaccel.recipes.runner import run_recipe

    with ProgressBars(_console(stderr=True)) as bars:
        result = run_recipe(loaded, output, workers=workers, hosts=hosts, listener=bars)
    if as_json:
        click.echo((result.folder / "results.json").read_text(encoding="utf-8"), nl=False)
        return

    from tfaccel.reporting import make_table, summarize

    console = _console()
    console.print(make_table(result.measurements, width=console.width))
    console.print(summarize(result.measurements), highlight=False, soft_wrap=True)
    console.print(f"Report: {result.folder / 'report.html'}", highlight=False, soft_wrap=True)


@tfaccel.command(epilog=_EPILOG)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--data", help="digits, fashion_mnist, cifar10 or an .npz file: accuracy on its test split."
)
@click.option("--seed", default=0, show_default=True, help="Of the split; use the recipe's.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Also time this many.",
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=200, show_default=True, help="Timed calls."
)
@_common
def measure(
    models: tuple[Path, ...], data: str | None, seed: int, threads: int, runs: int, as_json: bool
) -> None:
    r"""Measure .tflite and .keras files: accuracy, size, latency, memory, MACs.

    \b
    Examples:
      tfaccel measure model.tflite
      tfaccel measure runs/digits/*.tflite --data digits --threads 2
      tfaccel measure model.keras --json | jq '.[0].latency_ms'
    """
    from tfaccel.measurement import measure as measure_file
    from tfaccel.recipes.data import load_data
    from tfaccel.reporting import make_table

    with _user_input():
        arrays = load_data(data, seed).test.arrays if data else None
        records = [
            measure_file(path, arrays, threads=threads, runs=runs, name=path.name)
            for path in models
        ]
    if as_json:
        _print_json([dataclasses.asdict(record) for record in records])
    else:
        console = _console()
        console.print(make_table(records, width=console.width))


@tfaccel.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    type=click.Choice(["float32", "float16", "dynamic_int8", "int8"]),
    help="How numbers are stored.  [default: the model's own, else float32]",
)
@click.option(
    "--io-dtype",
    type=click.Choice(["float32", "int8", "uint8"]),
    default="float32",
    show_default=True,
    help="Type of inputs and outputs of an int8 file.",
)
@click.option(
    "--data",
    help="digits, fashion_mnist, cifar10 or an .npz file: ranges for --scheme int8, and a check.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="Text file, one class name a line, to put inside.",
)
@_common
def export(
    model: Path,
    output: Path,
    scheme: str | None,
    io_dtype: str,
    data: str | None,
    labels: Path | None,
    as_json: bool,
) -> None:
    r"""Convert MODEL.keras to OUTPUT.tflite, and check the file against Keras.

    Masks and quantized weights are baked in, batch norm is folded. A quantization-aware model
    becomes integers by the ranges that it was trained with; a float one needs --data for int8.

    \b
    Examples:
      tfaccel export model.keras model.tflite
      tfaccel export model.keras small.tflite --scheme dynamic_int8
      tfaccel export model.keras int8.tflite --scheme int8 --data train.npz --io-dtype int8
    """
    from tfaccel.core.artifacts import load_model
    from tfaccel.recipes.data import load_data

    with _user_input():
        if output.suffix != ".tflite":
            raise ValueError(f"The output is a .tflite file, but got {str(output)!r}.")
        loaded = load_model(model)
        splits = load_data(data) if data else None
        names = labels.read_text(encoding="utf-8").splitlines() if labels else None

    from tfaccel.export import to_tflite
    from tfaccel.quantization import scheme_of

    trained = scheme_of(loaded)
    chosen = scheme or (trained.name if trained else "float32")
    if trained and chosen != trained.name:
        raise click.UsageError(f"{model} was trained for {trained.name}; leave --scheme out.")
    if chosen == "int8" and not trained and splits is None:
        raise click.UsageError(
            "--scheme int8 of a float model needs --data, to find the range of every value."
        )
    if io_dtype != "float32" and chosen != "int8":
        raise click.UsageError(f"--io-dtype {io_dtype} needs int8, but the scheme is {chosen}.")
    artifact = to_tflite(
        loaded,
        output,
        chosen,
        io_dtype=io_dtype,
        representative_data=splits.train.x[:256]
        if splits and chosen == "int8" and not trained
        else None,
        verify_data=splits.validation.x[:64] if splits else None,
        labels=names,
    )
    if as_json:
        _print_json(dataclasses.asdict(artifact))
    else:
        click.echo(f"{artifact.path}: {artifact.scheme}, {artifact.size_bytes / 1e3:,.1f} kB")


@tfaccel.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@_common
def inspect(model: Path, as_json: bool) -> None:
    r"""Show the layers of MODEL.keras and which of them each technique would touch, and why.

    \b
    Examples:
      tfaccel inspect model.keras
      tfaccel inspect model.keras --json | jq '.layers[] | select(.macs > 1e6) | .name'
    """
    from tfaccel.core.artifacts import load_model
    from tfaccel.reporting import inspect as inspect_model

    with _user_input():
        inspection = inspect_model(load_model(model))
    if as_json:
        _print_json(inspection.to_dict())
    else:
        _console().print(inspection)


@tfaccel.command(epilog=_EPILOG)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@_common
def diff(before: Path, after: Path, as_json: bool) -> None:
    r"""Show what changed from one .keras model to another, layer by layer.

    \b
    Examples:
      tfaccel diff runs/digits/student.keras runs/digits/pruned.keras
      tfaccel diff before.keras after.keras --json
    """
    from tfaccel.core.artifacts import load_model
    from tfaccel.reporting import diff as diff_models

    with _user_input():
        difference = diff_models(load_model(before), load_model(after))
    if as_json:
        _print_json(difference.to_dict())
    else:
        _console().print(difference)


@tfaccel.command("plan-cluster", epilog=_EPILOG)
@click.option("--model", type=click.Path(path_type=Path), help="A .keras file to plan for.")
@click.option("--parameters", type=float, help="Its number of weights, in place of --model.")
@click.option(
    "--compute-ms",
    type=float,
    help="A training step of one worker, milliseconds.  [default: measured here, of --model]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Of one worker."
)
@click.option(
    "--bandwidth", type=float, required=True, help="Of each worker's link, each way, Mbit/s."
)
@click.option(
    "--latency", type=float, default=0.1, show_default=True, help="Between two workers, ms."
)
@click.option(
    "--operation-ms",
    type=float,
    default=1.0,
    show_default=True,
    help="Fixed cost of a collective operation.",
)
@click.option(
    "--servers", type=click.IntRange(min=1), default=1, show_default=True, help="Parameter servers."
)
@click.option("--compressor", "chosen", multiple=True, help="Only these, and none.  [default: all]")
@click.option(
    "--most", type=click.IntRange(min=2), default=1024, show_default=True, help="Workers."
)
@_common
def plan_cluster(most: int, as_json: bool, **figures: Any) -> None:
    r"""Predict steps on a cluster: ring, tree and parameter server, with every compressor.

    Prints milliseconds of a step by number of workers, and from how many workers on another way is
    faster. Bandwidth and latency are best measured (iperf3, ping); the formulas are those of
    docs/clusters.md.

    \b
    Examples:
      tfaccel plan-cluster --parameters 5.3e6 --compute-ms 52 --bandwidth 1000
      tfaccel plan-cluster --model model.keras --batch-size 64 --bandwidth 100 --latency 0.5
      tfaccel plan-cluster --parameters 25e6 --compute-ms 300 --bandwidth 10000 --compressor dgc
    """
    from tfaccel.distributed.plan_report import (
        describe_crossovers,
        make_plan_table,
        plan_to_dict,
        worker_counts,
    )
    from tfaccel.distributed.planner import make_planner

    with _user_input():
        planner = make_planner(**figures)
    predictions, crossovers = planner.table(worker_counts(most)), planner.crossovers(most)
    if as_json:
        _print_json(plan_to_dict(planner, predictions, crossovers))
        return
    console = _console()
    console.print(make_plan_table(predictions))
    console.print(describe_crossovers(crossovers, most), highlight=False, soft_wrap=True)


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr)
    # A pipe has no width; what reads it should not get tables cut to 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def _print_json(content: Any) -> None:
    click.echo(json.dumps(content, indent=2, default=str))


def main() -> None:
    """Runs the command: the entry point that setup.cfg names."""
    if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
        silence_tensorflow()
    tfaccel()


if __name__ == "__main__":
    main()
