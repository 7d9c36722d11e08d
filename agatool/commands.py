"""The commands that use a trained model: words (enrich, compare-masks, visualize-attention) and search."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agatool.errors import UsageError
from agatool.options import (
    SEARCH,
    WORDS,
    Checkpoint,
    DataDir,
    Device,
    DeviceOption,
    IndexCheckpoint,
    Json,
    Mask,
    Precision,
    PrecisionOption,
    Quiet,
    Root,
    app,
    reporting,
)  # fmt: skip

if TYPE_CHECKING:
    from agatool.data.prepare import Prepared


class Decode(StrEnum):
    """How a word is chosen from the MLM's distribution."""

    argmax = "argmax"
    top_k = "top-k"
    sample = "sample"


class Mode(StrEnum):
    """What a heatmap shows."""

    words = "words"
    masked = "masked"


class Method(StrEnum):
    """How a heatmap is made."""

    attention = "attention"
    norm = "norm"
    gradcam = "gradcam"
    occlusion = "occlusion"


class Format(StrEnum):
    """Of pictures."""

    png = "png"
    pdf = "pdf"
    svg = "svg"


OptionalDataset = Annotated[str | None, typer.Option("--dataset", "-d", help="Default: what the model was trained on.")]
Split = Annotated[str, typer.Option(help="train, val or test.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote there.")]


@app.command(rich_help_panel=WORDS)
@reporting
def enrich(
    file: Annotated[Path, typer.Argument(help="Captions in any format that `aga prepare` reads.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default enriched/NAME.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where image paths start; default beside FILE.")] = None,
    checkpoint: Checkpoint = None,
    strategy: Annotated[Mask, typer.Option(help="Which words are masked.")] = Mask.attention,
    ratio: Annotated[float, typer.Option(min=0.01, max=1, help="Share of a caption's words that are masked.")] = 0.25,
    decode: Annotated[Decode, typer.Option(help="How a word is chosen.")] = Decode.argmax,
    top_k: Annotated[int, typer.Option(min=1, help="For --decode top-k.")] = 5,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the MLM's distribution.")] = 1.0,
    min_probability: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Replace a word only when the model is surer than this. Default 0.985."),
    ] = None,
    variants: Annotated[int, typer.Option(min=1, help="Enriched captions for each caption.")] = 1,
    views: Annotated[int, typer.Option(min=1, help="Images of the same person to look at, its own included.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    text_only: Annotated[bool, typer.Option("--text-only", help="Without images.")] = False,
    truth: Annotated[Path | None, typer.Option(help="truth/captions.csv of rendered people.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: DeviceOption = Device.auto,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when a caption had to stay as it was.")] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite captions: mask words, fill them in with what the model sees in the image, and list every edit.

    Examples:

      aga enrich captions.json

      aga enrich data_captions.json --image-root imgs --min-probability 0.999 --out enriched/careful
    """
    from agatool import console
    from agatool.enrich import default_out, summary_rows
    from agatool.enrich import enrich as enrich_file
    from agatool.enriching import EnrichConfig
    from agatool.runs import find_model

    config = EnrichConfig(
        strategy=strategy.value, ratio=ratio, decode=decode.value, top_k=top_k, temperature=temperature,
        variants=variants, views=views, seed=seed, text_only=text_only, batch_size=batch_size,
        **({} if min_probability is None else {"min_probability": min_probability}),
    )  # fmt: skip
    folder = out or default_out(file)
    done = enrich_file(find_model(checkpoint), file, folder, config, image_root, truth, device.value, overwrite, strict)
    if json_:
        console.result_json({"folder": str(done.folder), "kept": done.kept, "summary": done.summary})
        return
    console.table(f"Enriched captions in {done.folder}", ["", "value"], summary_rows(done.summary))


@app.command("compare-masks", rich_help_panel=WORDS)
@reporting
def compare_masks(
    checkpoint: Checkpoint = None,
    dataset: OptionalDataset = None,
    data: DataDir = None,
    root: Root = None,
    split: Split = "test",
    ratio: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of a caption's words that are masked.")
    ] = 0.25,
    draws: Annotated[int, typer.Option(min=1, help="Masks drawn for each caption and strategy.")] = 3,
    limit: Annotated[int, typer.Option(min=0, help="Captions at the most, spread over the split; 0: all.")] = 1000,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Such as masking.aggregation=last.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Train every arm and compare what they reach.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, for --train.")] = 3,
    arms: Annotated[
        str | None, typer.Option(help="Such as random,attention+tem, for --train; default all five.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run, for --train.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("masks"),
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Does attention choose better words than chance? What each strategy masks, and how much the picture helps.

    Examples:

      aga compare-masks

      aga compare-masks --checkpoint runs/sample --ratio 0.4 --out masks40

      aga compare-masks --train --seeds 3 --max-steps 100 --out ablation

      aga compare-masks --train --arms random,attention+tem
    """
    from agatool import console
    from agatool.compare_masks import compare_masks as compare
    from agatool.compare_masks import mask_rows, masking_of
    from agatool.data.prepare import find_data
    from agatool.runs import evaluation_plan, find_model

    model = find_model(checkpoint)
    plan = evaluation_plan(model, dataset, data, split, {}, out)
    if train:
        from agatool.ablation import ARMS, ablation_rows, find_arms, run_ablation
        from agatool.config import plan_run

        chosen = ARMS if arms is None else find_arms(arms)  # before minutes of preparing data
    prepared = find_data(plan.dataset, plan.data, root)
    if train:
        given = {
            "data.dataset": plan.dataset, "data.dir": str(plan.data), "train.max_steps": max_steps,
            "train.device": device, "train.precision": precision,
        }  # fmt: skip
        table = run_ablation(plan_run(given, None, overrides or ()), prepared, out, seeds, chosen)
        if json_:
            console.result_json({"folder": str(out), "ablation": table.to_dict("records")})
        else:
            console.table("Arms against random masking", *ablation_rows(table))
        return
    config = masking_of(model, ratio, overrides or ())
    masks, document = compare(model, prepared, split, config, draws, limit, out, device.value, precision.value)
    if json_:
        console.result_json({"folder": str(out), **document})
        return
    console.table(f"Masks at ratio {ratio}, {split} of {prepared.name}", *mask_rows(masks))
    console.info(f"Written: {out}/masks.csv, masks.png, captions.html and more")


@app.command("visualize-attention", rich_help_panel=WORDS)
@reporting
def visualize_attention(
    checkpoint: Checkpoint = None,
    image: Annotated[Path | None, typer.Option(help="One image, together with --text.")] = None,
    text: Annotated[str | None, typer.Option(help="Its description.")] = None,
    dataset: OptionalDataset = None,
    data: DataDir = None,
    root: Root = None,
    split: Split = "test",
    query: Annotated[int | None, typer.Option(help="One caption of the data set, by caption_id.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Pairs drawn (4), or captions measured (200).")] = None,
    captions: Annotated[Path | None, typer.Option(help="A caption file instead of a data set.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where its image paths start; default beside it.")] = None,
    words: Annotated[str | None, typer.Option(help="Such as red,backpack, or all; default the most attended.")] = None,
    mode: Annotated[Mode, typer.Option(help="masked: where it looks to fill a word in.")] = Mode.words,
    method: Annotated[Method | None, typer.Option(help="Default: what docs/attention.md measured as best.")] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Fusion layer, from 1.")] = None,
    head: Annotated[str | None, typer.Option(help="mean, max or a head's number.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Score the maps against the sample's part masks.")] = False,
    format_: Annotated[Format, typer.Option("--format", help="Of the pictures.")] = Format.png,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("attention"),
    overwrite: Overwrite = False,
    device: DeviceOption = Device.auto,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Heatmaps of words over images, captions shaded by class attention; with --measure, how right they are.

    Examples:

      aga visualize-attention

      aga visualize-attention --image crop.jpg --text "a man in a red jacket with a backpack" --words red,backpack

      aga visualize-attention --dataset sample --measure --out localisation
    """
    if (image is None) != (text is None):
        raise UsageError("--image and --text go together", 'Add --text "..." or --image FILE.')
    sources = {"--image": image, "--captions": captions, "--query": query, "--measure": measure or None}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} do not go together", "Choose one of them.")

    from agatool import console
    from agatool.attention import Look
    from agatool.checkpoint import load
    from agatool.machine import memory_errors, pick_device
    from agatool.runs import find_model
    from agatool.visualizing import (
        MEASURED,
        PAIRS,
        captions_pairs,
        claim_output,
        dataset_pairs,
        single_pair,
        summary,
        visualize,
    )  # fmt: skip
    from agatool.visualizing import measure as measure_maps

    folder = find_model(checkpoint)
    model = load(folder).to(pick_device(device))
    if measure:
        from agatool.localisation import records, table_rows

        prepared = _data_of(folder, dataset, data, root, split)
        claim_output(out, overwrite)
        with memory_errors("Use --device cpu."):
            table = measure_maps(model, prepared, split, count or MEASURED, out)
        if json_:
            console.result_json({"folder": str(out), "localisation": records(table)})
        else:
            console.table(f"Maps against part masks, {split} of {prepared.name}", *table_rows(table))
        return
    look = Look(mode.value, method.value if method else None, layer, head).settled(model)
    if image is not None and text is not None:
        pairs = [single_pair(image, text)]
    elif captions is not None:
        pairs = captions_pairs(captions, image_root, count or PAIRS)
    else:
        pairs = dataset_pairs(_data_of(folder, dataset, data, root, split), split, count or PAIRS, query)
    claim_output(out, overwrite)
    with memory_errors("Use --device cpu."):
        explained = visualize(model, pairs, look, words, out, format_.value)
    if json_:
        console.result_json({"folder": str(out), "pairs": summary(explained)})
        return
    console.result(f"{len(explained)} pairs in {out}: contact_sheet.{format_.value}, a picture each, maps.csv")


def _data_of(model: Path, dataset: str | None, data: Path | None, root: Path | None, split: str) -> "Prepared":
    """The data set that was asked for, or the one that the model was trained on."""
    from agatool.data.prepare import find_data
    from agatool.runs import evaluation_plan

    plan = evaluation_plan(model, dataset, data, split, {}, None)
    return find_data(plan.dataset, plan.data, root)


@app.command(rich_help_panel=SEARCH)
@reporting
def index(
    gallery: Annotated[Path, typer.Argument(help="A folder of images, or a prepared data set.")],
    out: Annotated[Path | None, typer.Option(help="The index; default FOLDER.index beside the folder.")] = None,
    checkpoint: IndexCheckpoint = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Encode a folder of images for `aga search`; called again, only what is new or changed is encoded.

    Examples:

      aga index ~/crops

      aga index data/rstpreid --out rstpreid.index --checkpoint runs/rstpreid
    """
    from dataclasses import asdict

    from agatool import console
    from agatool.indexing import build_index

    outcome = build_index(gallery, out, checkpoint, batch_size, device.value, precision.value)
    if json_:
        console.result_json({**asdict(outcome), "folder": str(outcome.folder)})
        return
    console.result(
        f"{outcome.folder}: {outcome.images:,} images ({outcome.encoded:,} encoded, {outcome.removed:,} removed, "
        f"{len(outcome.skipped):,} left out) in {outcome.seconds:.1f} s"
    )


@app.command(rich_help_panel=SEARCH)
@reporting
def search(
    target: Annotated[Path, typer.Argument(metavar="INDEX", help="An index, or a folder of images (indexed first).")],
    text: Annotated[str | None, typer.Argument(help="Whom you are looking for.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture of the person; may be combined with a text.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Many queries: one a line, or CSV, JSON, JSONL.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Images shown.")] = 20,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates re-ranked by ITM, 0 for cosine alone.")] = 128,
    csv: Annotated[Path | None, typer.Option(help="Write a table.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a picture of the ranked images.")] = None,
    checkpoint: IndexCheckpoint = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find a person in your own images by a sentence, a picture, or both.

    Examples:

      aga search ~/crops "a woman in a red coat with a black backpack"

      aga search crops.index "a man in a blue shirt" -k 10 --sheet found.png

      aga search crops.index --queries descriptions.txt --csv found.csv
    """
    from agatool import console
    from agatool.results import as_document, explained, rows, write_page, write_sheet, write_table
    from agatool.search import as_query, read_queries, run_search

    if queries is not None and (text is not None or image is not None):
        raise UsageError("--queries goes without a text or --image", "Give one or the other.")
    asked = read_queries(queries) if queries is not None else [as_query(text, image)]
    found, answers = run_search(
        target, asked, k, rerank, batch_size, checkpoint=checkpoint, device=device.value, precision=precision.value
    )
    for path, write in ((html, write_page), (sheet, write_sheet)):
        if path is not None:
            write(path, found, answers)
    if csv is not None:
        write_table(csv, answers)
    if json_:
        console.result_json(as_document(found, answers))
        return
    for answer in answers:
        title = answer.query.text or str(answer.query.image)
        console.table(title, ["rank", "cosine", "match", "image"], rows(answer))
        if hint := explained(answer):
            console.warn(hint)


@app.command(rich_help_panel=SEARCH)
@reporting
def serve(
    target: Annotated[Path, typer.Argument(metavar="INDEX", help="An index, or a folder of images (indexed first).")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    checkpoint: IndexCheckpoint = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    quiet: Quiet = False,
) -> None:
    """Search in a browser: a box, ranked images with scores, a click for heatmaps. Needs pip install 'agatool[web]'.

    Examples:

      aga serve crops.index

      aga serve ~/crops --port 9000
    """
    from agatool.serve import serve as serve_index

    serve_index(target, host, port, checkpoint, device.value, precision.value)
