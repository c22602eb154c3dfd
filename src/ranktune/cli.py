"""The command line: `ranktune train`, `evaluate`, `truncate`, `plot`.

Typer is its only heavy import until a command runs.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranktune.errors import RanktuneError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="ranktune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# They report, on import and in every process, what they could not load and do not need.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a refusal.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel="Output")]


class ProfileName(str, Enum):
    """How an exported file is laid out."""

    uniform = "uniform"
    compact = "compact"


class BudgetBy(str, Enum):
    """By what a budget is spread over modules."""

    energy = "energy"
    loss = "loss"


class SplitName(str, Enum):
    """Which examples to score on."""

    evaluation = "evaluation"
    train = "train"


def _refusals_are_messages(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what the user's input caused into one message on stderr and exit code 2; anything else stays a traceback."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except RanktuneError as error:
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_REFUSED) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return run


@contextmanager
def _interruption_names_the_way_on(output: Path) -> Iterator[None]:
    """Tell on Ctrl-C how to go on with the run in `output`."""
    try:
        yield
    except KeyboardInterrupt as error:
        from ranktune.run.checkpoints import find_checkpoint
        from ranktune.run.directory import RunDirectory

        directory = RunDirectory(output)
        way_on = f"ranktune train --resume {output}"
        found = find_checkpoint(directory.checkpoints).newest
        if not directory.recipe.exists() or directory.metrics.exists():
            said = "interrupted before training began"
        elif found is None:
            said = f"interrupted; there is no checkpoint yet (train.save_every), so {way_on} begins at step 0"
        else:
            said = f"interrupted; {found.path.name} is the last checkpoint; resume with: {way_on}"
        typer.echo(said, err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def _console() -> Console:
    """Standard output. In a file or a pipe there is no edge at which module names would have to be broken."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _share_the_cores() -> None:
    """Let torch's idle threads sleep instead of spinning; to be called before torch is imported.

    Spinning wins a quarter on an otherwise idle machine. Beside one other busy process it makes a training step of a
    small model 3 to 8 times slower, since each waiting thread occupies the core that the other one waits for.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _print_version(wanted: bool) -> None:
    if wanted:
        import ranktune

        typer.echo(f"ranktune {ranktune.__version__}")
        raise typer.Exit


@app.callback()
def ranktune_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune a model with low-rank adapters whose rank is chosen for you.

    A run is described by one YAML file, the recipe:

        model: all-minilm
        method: {name: dora, r: 8}
        train: {epochs: 3, learning_rate: 1e-3}
        output: runs/first

    and started with [bold]ranktune train recipe.yaml[/bold].
    """


@app.command()
@_refusals_are_messages
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE.yaml", help="The recipe file; none with --resume.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Recipe keys to set for this run, values as in YAML: train.epochs=1 data.columns.text=body.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the complete recipe and the modules it would adapt; train nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is already in the output directory.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Go on with the run in this output directory, under its own recipe.yaml, as if it had never stopped.",
        ),
    ] = None,
    replan: Annotated[
        bool,
        typer.Option(
            "--replan",
            help="With --resume: the run may get another length or other data; its rank schedule begins anew from "
            "the present ranks, over the steps that remain.",
        ),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Train what a recipe describes, and score it before and after.

    The output directory gets the adapter (load it with PEFT), metrics.json,
    ranks.json, log.jsonl, pictures, and the complete recipe. Mistakes in the
    recipe are refused, with exit code 2, before the model's weights are loaded.
    --dry-run shows every key a recipe can have, with its default.

    [bold]Examples[/bold]

        ranktune train examples/quickstart.yaml

        ranktune train my.yaml --dry-run

        ranktune train my.yaml method.name=lora method.r=4 output=runs/lora-4

        ranktune train --resume runs/first
    """
    _share_the_cores()
    if resume is not None:
        _resume(resume, recipe, overrides or [], replan=replan, barred=dry_run or overwrite, quiet=quiet)
        return
    if recipe is None:
        raise RecipeError("give a recipe: ranktune train RECIPE.yaml, or --resume OUT to go on with a run.")
    if replan:
        raise RecipeError("--replan belongs to --resume OUT.")
    from ranktune.recipe import load_recipe, recipe_text

    loaded = load_recipe(recipe, overrides or [])
    console = _console()
    if dry_run:
        from ranktune.report.tables import plan_table
        from ranktune.training import rehearse

        # First, so that it is seen also where the data cannot be read.
        console.print(recipe_text(loaded), markup=False, highlight=False, soft_wrap=True)
        plan = rehearse(loaded, recipe)
        console.print(plan_table(plan))
        return

    from ranktune.run.display import showing
    from ranktune.training import train as train_recipe

    with _interruption_names_the_way_on(Path(loaded.output)), showing(console, quiet) as display:
        metrics = train_recipe(loaded, recipe, display, overwrite=overwrite)
    if not quiet:
        _summarise(console, metrics, loaded.output)


def _resume(
    output: Path, recipe: Path | None, overrides: list[str], *, replan: bool, barred: bool, quiet: bool
) -> None:
    """`ranktune train --resume OUT [KEY=VALUE...]`: the first argument, a recipe otherwise, is an override."""
    if recipe is not None and "=" not in str(recipe):
        raise RecipeError(f"--resume goes on under {output / 'recipe.yaml'}: leave {recipe} out.")
    if barred:
        raise RecipeError("--resume goes on with a run: it goes neither with --dry-run nor with --overwrite.")
    from ranktune.run.display import showing
    from ranktune.training import resume

    console = _console()
    first = [] if recipe is None else [str(recipe)]
    with _interruption_names_the_way_on(output), showing(console, quiet) as display:
        metrics = resume(output, [*first, *overrides], display, replan=replan)
    if not quiet:
        _summarise(console, metrics, str(output))


def _summarise(console: Console, metrics: dict[str, Any], output: str) -> None:
    from ranktune.report.tables import summary_table

    console.print(summary_table(metrics))
    typer.echo(f"Saved in {output}. Score it again: ranktune evaluate {output}")


@app.command()
@_refusals_are_messages
def evaluate(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A run's output directory.", show_default=False)],
    split: Annotated[SplitName, typer.Option(help="Which examples to score on.")] = SplitName.evaluation,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Of a nested adapter (dylora): the ranks to score it at, 'all' or such as 1,2,4.", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the scores as JSON.", rich_help_panel="Output")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Score a finished run again, from its recipe, its adapter and the base model.

    On the same machine and data this gives exactly the score that training
    ended with. Changed data is noticed, and said. With --ranks the scores at
    each rank are also written to rank_curve.csv and rank_curve.png in OUT.

    [bold]Examples[/bold]

        ranktune evaluate runs/first

        ranktune evaluate runs/nested --ranks all

        ranktune evaluate runs/first --split train --json
    """
    import json

    _share_the_cores()
    from ranktune.evaluation import evaluate as evaluate_run
    from ranktune.report.tables import scores_table
    from ranktune.run.display import showing

    console = _console()
    if ranks is not None:
        _score_ranks(console, output, ranks, split, as_json, quiet)
        return
    with showing(console, quiet or as_json) as display:
        result = evaluate_run(output, display, split.value)
    _warn_unless_same_data(result.same_data)
    if as_json:
        shown = {"metric": result.metric, "value": result.value, "scores": result.scores, "recorded": result.recorded}
        typer.echo(json.dumps(shown))
    elif not quiet:
        console.print(scores_table(result))


def _score_ranks(console: Console, output: Path, ranks: str, split: SplitName, as_json: bool, quiet: bool) -> None:
    """Show the scores at each rank, and leave them as CSV and as a picture beside the run."""
    import json
    from dataclasses import asdict

    from ranktune.rank_curve import rank_curve, save_curve
    from ranktune.report.rank_curve import rank_curve_figure, rank_curve_table
    from ranktune.report.style import save
    from ranktune.run.directory import RunDirectory
    from ranktune.run.display import showing

    with showing(console, quiet or as_json) as display:
        curve = rank_curve(output, display, ranks, split.value)
    _warn_unless_same_data(curve.same_data)
    directory = RunDirectory(output)
    kept = split is SplitName.evaluation
    if kept:
        save_curve(curve, directory.rank_curve)
        save(rank_curve_figure(curve, "Quality at each rank, on the evaluation split"), directory.rank_curve_picture)
    if as_json:
        typer.echo(json.dumps({"metric": curve.metric, "points": [asdict(point) for point in curve.points]}))
    elif not quiet:
        console.print(rank_curve_table(curve))
        if kept:
            typer.echo(f"Written: {directory.rank_curve}, {directory.rank_curve_picture}")


def _warn_unless_same_data(same: bool) -> None:
    if not same:
        typer.echo(
            "warning: the data is not the data this run was trained and scored on (its fingerprint changed), "
            "so the scores are not comparable with the run's own.",
            err=True,
        )


@app.command()
@_refusals_are_messages
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys to set for all runs.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the comparison.")] = Path("runs/comparison"),
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, by commas; name\\[field=value] sets a field. All by default.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method that are compared.")] = 3,
    search: Annotated[
        bool, typer.Option(help="Search each method's learning rate, on a part of the training data.")
    ] = True,
    search_seeds: Annotated[int, typer.Option(min=1, help="Seeds over which a learning rate is judged.")] = 1,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of the training data that the search scores on.")
    ] = 0.1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Train on a Ray cluster instead (pip install ranktune\\[ray]).")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Train runs again that failed.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Compare methods on the recipe's data, at equal parameters and each at its best learning rate.

    Every method gets the number of parameters that plain LoRA has at the recipe's
    r. Its learning rate is searched on a part of the training data; then it is
    trained with several seeds and scored on the evaluation data. The folder gets
    one JSON per run, table.csv, report.md, pictures and report.html.

    Started again, the command goes on where it was; started twice with the same
    --out, two processes share the work.

    [bold]Examples[/bold]

        ranktune compare my.yaml --methods lora,dora,dynamic-dora --seeds 3 --out runs/mine

        ranktune compare my.yaml --methods "lora,mor\\[num_experts=4]" --no-search train.epochs=1
    """
    _share_the_cores()
    from ranktune.compare.command import compare_recipe
    from ranktune.compare.driver import Options
    from ranktune.compare.methods import default_methods, parse_methods
    from ranktune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    options = Options(
        methods=default_methods() if methods is None else parse_methods(methods),
        seeds=seeds,
        out=out,
        search=search,
        search_seeds=search_seeds,
        validation=validation,
    )
    _, written = compare_recipe(
        loaded, recipe, options, None if quiet else _console(), jobs=jobs, on_ray=ray, retry_failed=retry_failed
    )
    if not quiet:
        typer.echo(f"Written: {', '.join(str(path) for path in written)}")


@app.command()
@_refusals_are_messages
def plot(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A run's output directory.", show_default=False)],
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Draw a run's pictures again from its log: loss, metric, and the rank of every module.

    [bold]Example[/bold]

        ranktune plot runs/first
    """
    from ranktune.report.plots import draw_run
    from ranktune.run.directory import RunDirectory

    for path in draw_run(RunDirectory(output)):
        if not quiet:
            typer.echo(str(path))


@app.command()
@_refusals_are_messages
def truncate(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A run's output directory.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="The rank to cut at.", show_default=False)] = None,
    within: Annotated[
        str | None,
        typer.Option(
            help="Cut at the smallest rank within so much of the best score on the split, such as 1%.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Cut to so many parameters, with a rank for each module.", show_default=False),
    ] = None,
    by: Annotated[
        BudgetBy,
        typer.Option(
            help="With --budget: loss, by exchanges between modules that lower the loss on the split; energy, by what "
            "is cut off, quick and without data.",
        ),
    ] = BudgetBy.loss,
    evaluations: Annotated[int, typer.Option(help="With --by loss: how often it is measured, at most.")] = 500,
    examples: Annotated[int, typer.Option(min=1, help="With --by loss: on so many examples.")] = 256,
    split: Annotated[SplitName, typer.Option(help="Which examples to choose and to score on.")] = SplitName.evaluation,
    profile: Annotated[
        ProfileName | None,
        typer.Option(
            help="uniform: one rank in the file; compact: each module's own. Default: compact with --budget.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to make. Default: OUT-rankB or OUT-budgetN.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Cut a nested adapter (dylora) at a rank, and write it as a plain LoRA that needs no ranktune.

    With --budget each module gets a rank of its own, and the score is shown
    beside that of one rank for all within the same budget. The result is
    loaded in a fresh process by stock PEFT, and its outputs on real inputs are
    compared before it is kept.

    [bold]Examples[/bold]

        ranktune truncate runs/nested --rank 4

        ranktune truncate runs/nested --within 1% --out adapters/small

        ranktune truncate runs/nested --budget 50000 --evaluations 150
    """
    _share_the_cores()
    from ranktune.report.rank_curve import rank_curve_table, spending_table, truncated_lines
    from ranktune.run.display import showing
    from ranktune.truncation import truncate as truncate_run

    console = _console()
    with showing(console, quiet) as display:
        result = truncate_run(
            output,
            display,
            rank=rank,
            within=within,
            budget=budget,
            by=by.value,
            evaluations=evaluations,
            examples=examples,
            split=split.value,
            out=out,
            profile=None if profile is None else profile.value,
        )
    if quiet:
        return
    if result.curve is not None or result.spending is not None:
        _warn_unless_same_data(result.same_data)
    if result.curve is not None:
        console.print(rank_curve_table(result.curve))
    if result.spending is not None:
        console.print(spending_table(result.spending, result.parameters))
    for line in truncated_lines(result):
        typer.echo(line)


Trained = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="A run's output directory, or the folder of an adapter.", show_default=False),
]


Approximate = Annotated[
    str | None,
    typer.Option(
        help="mean_gate: of a mor adapter, which no weight can hold, what its router decides in the mean.",
        show_default=False,
    ),
]


@app.command()
@_refusals_are_messages
def export(
    trained: Trained,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to make. Default: OUT-uniform or OUT-compact.", show_default=False),
    ] = None,
    profile: Annotated[
        ProfileName, typer.Option(help="One rank for all modules, or its own rank for each.")
    ] = ProfileName.uniform,
    rank: Annotated[
        int | None, typer.Option(help="Of a nested adapter (dylora): the rank to cut it at.", show_default=False)
    ] = None,
    svd_rank: Annotated[
        int | None,
        typer.Option(help="Approximate by a LoRA of at most this rank per module.", show_default=False),
    ] = None,
    approximate: Approximate = None,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Write a trained adapter as plain LoRA, for PEFT, vLLM, TGI, llama.cpp and others.

    The result is loaded in a fresh process by stock PEFT, without ranktune,
    and its outputs on real inputs are compared before it is kept. The uniform
    profile (one rank, filled with zeros) is exact in every engine; compact
    keeps each module's own rank, for PEFT and diffusers. A weight-decomposed
    adapter becomes a PEFT DoRA, or with --svd-rank a LoRA with a known error.
    A mor adapter is refused, or approximated with --approximate mean_gate.

    [bold]Examples[/bold]

        ranktune export runs/first

        ranktune export runs/first --profile compact --out adapters/first
    """
    _share_the_cores()
    from ranktune.exporting import export_trained
    from ranktune.report.exports import export_lines

    folder = out or trained.resolve().with_name(f"{trained.resolve().name}-{profile.value}")
    result = export_trained(trained, folder, profile.value, rank, svd_rank, approximate)
    if not quiet:
        for line in export_lines(result, folder):
            typer.echo(line)


@app.command()
@_refusals_are_messages
def merge(
    trained: Trained,
    out: Annotated[Path, typer.Option("--out", help="The folder to make.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: that of the base model.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    approximate: Approximate = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge a quantised base model's dequantised weights.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Build a trained adapter into its base model: a folder that from_pretrained loads without PEFT.

    The sum is computed in float32 and cast once; the tokenizer and the
    generation settings travel along. The folder is loaded in a fresh process,
    and its outputs on real inputs are compared before it is kept. A mor adapter
    is refused, or approximated with --approximate mean_gate.

    [bold]Example[/bold]

        ranktune merge runs/first --out models/first --dtype bfloat16
    """
    _share_the_cores()
    from ranktune.merging import merge_trained
    from ranktune.report.exports import merge_lines

    result = merge_trained(trained, out, dtype, max_shard_size, approximate, dequantize=dequantize)
    if not quiet:
        for line in merge_lines(result):
            typer.echo(line)


@app.command()
@_refusals_are_messages
def squeeze(
    trained: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="The folder of an adapter, ours or stock PEFT's, or a run's output directory.",
            show_default=False,
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="What may be kept: rank=64 and params=100000 are of all modules together, energy=90% is of the "
            "updates' squared norm.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to make. Default: such as ADAPTER-rank64.", show_default=False),
    ] = None,
    profile: Annotated[
        ProfileName, typer.Option(help="One rank for all modules, or its own rank for each.")
    ] = ProfileName.compact,
    base: Annotated[
        str | None,
        typer.Option(
            help="Compare outputs on this base model: a folder, a hub name, all-minilm. A run knows its own.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="With --base: inputs to compare on, one text a line.", show_default=False),
    ] = None,
    outputs: Annotated[bool, typer.Option(help="Compare outputs, where the base model and data are known.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON.", rich_help_panel="Output")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Recompress a trained adapter: a plain LoRA whose ranks are chosen for it under one budget.

    Each update is taken by its singular values, which needs its factors alone,
    neither its base model nor a dense matrix; of all modules together the
    components with the most energy are kept, and modules with none are left
    out. A weight-decomposed adapter stays one, with at least one component in
    every module.

    [bold]Examples[/bold]

        ranktune squeeze runs/first --budget rank=64

        ranktune squeeze adapters/someone-elses --budget energy=95% --out adapters/small

        ranktune squeeze adapters/someone-elses --budget params=500000 --base all-minilm --texts mine.txt
    """
    import json
    from dataclasses import asdict

    _share_the_cores()
    from ranktune.report.squeezing import squeezed_lines, squeezed_table
    from ranktune.squeezed_run import budget_of, squeeze_trained

    wanted = budget_of(budget)
    ending = "".join(character for character in budget if character.isalnum() or character == ".")
    folder = out or trained.resolve().with_name(f"{trained.resolve().name}-{ending}")
    result = squeeze_trained(trained, folder, wanted, profile.value, base=base, texts=texts, outputs=outputs)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    elif not quiet:
        _console().print(squeezed_table(result.squeezed))
        for line in squeezed_lines(result, folder):
            typer.echo(line)


@app.command()
@_refusals_are_messages
def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="The folder of an adapter, or a run's output directory.", show_default=False
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON.", rich_help_panel="Output")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the ranks into this file as well.", show_default=False)] = None,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Show what is inside a saved adapter, ours or stock PEFT's LoRA, DoRA or AdaLoRA.

    The base model is not needed and nothing from the folder is run: ranks as
    a grid of layers and modules, the norm and energy of each module's update,
    sizes, and how the ranks moved where the run's ranks.json lies beside it.

    [bold]Examples[/bold]

        ranktune inspect runs/first

        ranktune inspect adapters/someone-elses --png ranks.png --json
    """
    import json

    from ranktune.inspection import inspect as inspect_folder
    from ranktune.report.inspection import inspection_lines, module_table, rank_table

    if png is not None and not png.absolute().parent.is_dir():
        raise RecipeError(f"--png {png}: there is no directory {png.parent}.")
    found = inspect_folder(adapter)
    if png is not None:
        from ranktune.report.rank_map import rank_map_figure
        from ranktune.report.style import save

        save(rank_map_figure(found.ranks, f"Rank of each module: {adapter}, total {sum(found.ranks.values()):,}"), png)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    console = _console()
    for line in inspection_lines(found):
        typer.echo(line)
    if (grid := rank_table(found)) is not None:
        console.print(grid)
    console.print(module_table(found))


def main() -> None:
    """The `ranktune` command."""
    for library in _CHATTY:
        logging.getLogger(library).setLevel(logging.ERROR)
    app()


if __name__ == "__main__":
    sys.exit(main())
