"""The `aga` command: its overview, and the signatures of what makes, judges and converts models.

Heavy imports happen inside the commands; agatool/commands.py has the commands that use a trained model.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from agatool import __version__
from agatool import commands as _commands  # noqa: F401  (registers the other commands)
from agatool.errors import UsageError
from agatool.options import (
    DATA,
    MODELS,
    SEARCH,
    WORDS,
    Checkpoint,
    DataDir,
    Dataset,
    Device,
    DeviceOption,
    Direction,
    Json,
    Mask,
    Precision,
    PrecisionOption,
    Preset,
    Quiet,
    Root,
    Score,
    Tail,
    app,
    reporting,
)  # fmt: skip


def main() -> None:
    """Entry point of the console script and of `python -m agatool`."""
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        _overview()
    else:
        app()


def _overview() -> None:
    """What `aga --help` says, drawn without Typer: its help page imports a Markdown and a syntax library first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    out = Console(highlight=False)
    out.print(f"\n [bold]Usage:[/] aga [OPTIONS] COMMAND [ARGS]...\n\n {app.info.help}\n")
    panels: dict[str, list[tuple[str, str]]] = {title: [] for title in (DATA, MODELS, WORDS, SEARCH)}
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        summary = (command.callback.__doc__ or "").partition("\n")[0]
        panels[str(command.rich_help_panel)].append((name, escape(summary)))
    panels["Options"] = [
        ("--help, -h", "This page; `aga COMMAND --help` shows a command's options and examples."),
        ("--version", "Show the version and exit."),
        ("--install-completion", "Set up completion for this shell."),
        ("--show-completion", "Show that completion, to copy or adapt it."),
    ]
    for title, rows in panels.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True, min_width=20)
        for row in rows:
            table.add_row(*row)
        out.print(Panel(table, title=title, title_align="left", border_style="dim"))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aga {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=DATA)
@reporting
def prepare(
    dataset: Dataset = "sample",
    root: Root = None,
    out: Annotated[Path | None, typer.Option(help="Prepared folder to write; default data/NAME.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Annotation file, where it has another name.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bert-base-uncased or a folder; default a vocabulary trained on the captions.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=100, help="Of the vocabulary that is trained.")] = 8000,
    val_fraction: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Share of the train persons held out where there is no val split.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of the val split, and of the sample's people.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when anything has to be dropped.")] = False,
    identities: Annotated[
        int | None, typer.Option(min=8, help="People to render, divided 15:1:3.", rich_help_panel="Sample data set")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images a person.", rich_help_panel="Sample data set")] = 4,
    caption_noise: Annotated[
        float,
        typer.Option(min=0, max=1, help="Chance that an attribute word is wrong.", rich_help_panel="Sample data set"),
    ] = 0.1,
    quiet: Quiet = False,
) -> None:
    """Check a raw data set and write the prepared folder that the other commands read.

    Examples:

      aga prepare --dataset rstpreid --root ~/RSTPReid

      aga prepare --dataset sample --identities 200 --out data/small
    """
    from agatool import console
    from agatool.data.annotations import dataset_key
    from agatool.data.prepare import nowhere, prepare_sample, raw_folder, sample_spec
    from agatool.data.prepare import prepare as prepare_raw

    name = dataset_key(dataset)
    folder = out or Path("data") / name
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "vocab_size": vocab_size, "val_fraction": val_fraction, "strict": strict
    }  # fmt: skip
    raw = root or raw_folder(name)
    if name == "sample" and root is None:
        spec = sample_spec(identities, images=images, seed=seed, caption_noise=caption_noise)
        prepared = prepare_sample(folder, spec, **options)
    elif raw is None:
        raise nowhere(name, folder)
    else:
        prepared = prepare_raw(name, raw, folder, annotations=annotations, seed=seed, **options)
    columns = ["persons", "images", "captions"]
    counts = prepared.info["counts"]
    rows = [[split, *(f"{counts[split].get(column, 0):,}" for column in columns)] for split in counts]
    console.table(f"{prepared.name}, prepared in {prepared.folder}", ["split", *columns], rows)


@app.command(rich_help_panel=MODELS)
@reporting
def train(
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "-d",
            rich_help_panel="Data",
            help="sample (default), cuhk-pedes, icfg-pedes, rstpreid, rasa, ufine6926 or custom.",
        ),
    ] = None,
    data: DataDir = None,
    root: Root = None,
    preset: Annotated[
        Preset | None, typer.Option(help="tiny: a CPU will do. small, base: a GPU.", rich_help_panel="Model")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="scratch, shipped, a model folder or ALBEF.pth. Default: shipped for the sample, else scratch.",
            rich_help_panel="Model",
        ),
    ] = None,
    image_model: Annotated[
        str | None, typer.Option(help="A timm ViT by name, for --init scratch.", rich_help_panel="Model")
    ] = None,
    image_weights: Annotated[
        str | None, typer.Option(help="Its weights: a file, or `hub`.", rich_help_panel="Model")
    ] = None,
    text_model: Annotated[
        str | None, typer.Option(help="A BERT: a folder, or a hub name.", rich_help_panel="Model")
    ] = None,
    mask: Annotated[
        Mask | None,
        typer.Option(
            help="Which words MLM masks: AGM's attention (default), random or content words.",
            rich_help_panel="Training",
        ),
    ] = None,
    no_tem: Annotated[
        bool, typer.Option("--no-tem", help="Without the Text Enrichment Module.", rich_help_panel="Training")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, rich_help_panel="Training")] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop here, whatever --epochs says.", rich_help_panel="Training")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, rich_help_panel="Training")] = None,
    seed: Annotated[int | None, typer.Option(min=0, rich_help_panel="Training")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file such as a run's config.toml.", rich_help_panel="Configuration")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Any configuration key; may be repeated.",
            rich_help_panel="Configuration",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the configuration and stop.", rich_help_panel="Configuration")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="One step; print the cost; write nothing.", rich_help_panel="Configuration"),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/NAME.", rich_help_panel="Run folder")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out (default: the newest).", rich_help_panel="Run folder"),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel="Run folder")
    ] = False,
    device: Annotated[
        Device | None, typer.Option(help="auto is CUDA where there is one.", rich_help_panel="Machine")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="auto is bf16 on CUDA, fp32 on a CPU.", rich_help_panel="Machine")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model, choose its best epoch on val, and evaluate it on test.

    Examples:

      aga train --dataset sample

      aga train --dataset rstpreid --root ~/RSTPReid --preset base --init ALBEF.pth

      aga train --dataset sample --init scratch --set masking.ratio=0.25 --out runs/ratio25
    """  # fmt: skip
    from agatool import console
    from agatool.config import plan_run, to_toml
    from agatool.data.annotations import dataset_key
    from agatool.runs import claim, fresh_run, newest_run

    name = dataset_key(dataset) if dataset else _name_of(data)
    folder = out or (newest_run(name or "") if resume else None)
    if resume and folder is None:
        raise UsageError("There is no run to resume below runs/", "Give its folder with --out.")
    stored = folder / "config.toml" if resume and folder else None
    if stored is not None and not stored.is_file():
        raise UsageError(f"There is no run to resume in {folder}", "Leave out --resume, or give another --out.")
    given = {
        "preset": preset, "data.dataset": name, "data.dir": str(data) if data else None, "train.init": init,
        "model.image_model": image_model, "train.image_weights": image_weights, "train.text_model": text_model,
        "train.epochs": epochs, "train.max_steps": max_steps, "train.batch_size": batch_size, "train.seed": seed,
        "train.device": device, "train.precision": precision,
        "masking.strategy": mask, "tem.enabled": False if no_tem else None,
    }  # fmt: skip
    settings = plan_run(given, config, overrides or (), stored)
    if print_config:
        console.result(to_toml(settings).rstrip())
        return
    if dry_run:
        _dry_run(settings, root)
        return
    folder = folder or fresh_run(settings.data.dataset)
    claim(folder, resume, overwrite)
    if settings.data.dataset != "sample" and settings.preset == "tiny" and preset is None and not resume:
        console.info("Preset tiny, made for a CPU; the size that papers report is --preset base.")

    from agatool.data.prepare import find_data

    prepared = find_data(settings.data.dataset, Path(settings.data.dir), root)

    from agatool.train import run

    _show_metrics(run(settings, prepared, folder, resume), folder, json_)


def _name_of(data: Path | None) -> str | None:
    """Of which data set the folder given as --data was prepared; None where that is not known yet."""
    if data is None or not (data / "dataset.json").is_file():
        return None
    from agatool.data.prepare import prepared_name

    return prepared_name(data)


def _dry_run(settings: Any, root: Path | None) -> None:
    """Show what a run would cost; data that is not prepared yet is prepared in a folder that goes away again."""
    import tempfile

    from agatool import console
    from agatool.cost import estimate
    from agatool.data.prepare import find_data

    name, folder = settings.data.dataset, Path(settings.data.dir)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = find_data(name, folder if folder.exists() else Path(scratch) / name, root)
        console.table("Cost of a run; nothing was written", ["", "as measured"], estimate(settings, prepared))


@app.command("eval", rich_help_panel=MODELS)
@reporting
def evaluate(
    checkpoint: Checkpoint = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Default: what the model was trained on.")
    ] = None,
    data: DataDir = None,
    root: Root = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    rerank: Annotated[
        int | None,
        typer.Option(min=0, help="Candidates re-ranked by ITM, 0: cosine alone. Default: the run's, or 128."),
    ] = None,
    direction: Annotated[Direction, typer.Option(help="Text-to-image, image-to-text or both.")] = Direction.both,
    score: Annotated[
        Score | None,
        typer.Option(help="What candidates are sorted by; itm: as published. Default: the run's, or posterior."),
    ] = None,
    tail: Annotated[
        Tail | None,
        typer.Option(help="Order past the candidates; reference: as published. Default: the run's, or itc."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.csv and queries.csv; default the run's folder.")
    ] = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model: R@1/5/10, mAP and mINP with 95 % intervals, by cosine and re-ranked.

    Examples:

      aga eval

      aga eval --checkpoint runs/sample --split val --rerank 32

      aga eval --checkpoint runs/rstpreid --dataset cuhk-pedes --root ~/CUHK-PEDES
    """
    from agatool.runs import evaluation_plan, find_model

    model_folder = find_model(checkpoint)
    given = {"rerank": rerank, "score": score and score.value, "tail": tail and tail.value, "batch_size": batch_size}
    plan = evaluation_plan(model_folder, dataset, data, split, given, out)

    from agatool.checkpoint import load
    from agatool.data.prepare import find_data

    model = load(model_folder)  # before the data, which may take minutes to prepare
    prepared = find_data(plan.dataset, plan.data, root)

    from agatool.retrieval import DIRECTIONS
    from agatool.train import evaluate_model

    directions = [name for name in DIRECTIONS if direction in (name, Direction.both)]

    outcome = evaluate_model(model, model_folder, prepared, split, plan.config, directions, device, precision, plan.out)
    _show_metrics(outcome, plan.out, json_)


@app.command(rich_help_panel=MODELS)
@reporting
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run or evaluation folders; tests are against the first.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; default RUN/report.html, for several runs ./report.html.")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's report.html again, or set several runs side by side with paired tests.

    Examples:

      aga report runs/sample

      aga report runs/random runs/agm --out agm.html
    """
    from agatool import compare_runs, console

    written = compare_runs.report(runs, out)
    if json_:
        comparisons = [row._asdict() for row in written.comparisons]
        console.result_json({"report": str(written.path), "comparisons": comparisons, "unpaired": written.unpaired})
        return
    if written.comparisons:
        console.table("Paired tests, percentage points", *compare_runs.comparison_rows(written.comparisons))
    elif written.unpaired:
        console.warn(f"{written.unpaired} So there is nothing to pair.")
    console.result(str(written.path))


@app.command(rich_help_panel=MODELS)
@reporting
def convert(
    source: Annotated[Path, typer.Argument(help="An ALBEF or RaSa checkpoint: .pth or .safetensors.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    config: Annotated[
        Path | None, typer.Option(help="JSON with what tensors do not tell: numbers of heads. Default width / 64.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Its vocabulary: bert-base-uncased, a folder or a file.")
    ] = None,
    with_teacher: Annotated[
        bool, typer.Option("--with-teacher", help="Keep the momentum copy for training on.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder OUT.")] = False,
    quiet: Quiet = False,
) -> None:
    """Turn a reference checkpoint into a model folder that every command takes.

    Examples:

      aga convert ALBEF.pth models/albef --tokenizer bert-base-uncased

      aga convert rasa_cuhk.pth models/rasa --with-teacher
    """
    from agatool import console
    from agatool.convert import convert as convert_checkpoint
    from agatool.convert import report

    converted = convert_checkpoint(source, out, config, with_teacher, tokenizer, overwrite)
    report(converted)
    for why, names in converted.left_out.items():
        console.info(f"left out, {why}: {len(names)} tensors")
    size = sum(p.numel() for p in converted.model.parameters())
    console.result(f"{out}: {size:,} parameters, images {converted.model.config.image_size}")


def _show_metrics(outcome: Any, folder: Path, as_json: bool) -> None:
    from agatool import console
    from agatool.report import metric_rows, metric_table

    table = metric_table(outcome.metrics)
    if as_json:
        console.result_json({"folder": str(folder), "metrics": table.to_dict("records"), "seconds": outcome.seconds})
        return
    console.table("Metrics in percent, with 95 % intervals", *metric_rows(table))
    console.info(f"Written: {folder}/metrics.csv, queries.csv, report.html")
