"""Commands about requests and releases themselves: no queue, no Ray."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster import exit_codes
from cluster.console.arguments import AsJson, Debug, LogFormat, Release, RequestFile
from cluster.console.terminal import Terminal, terminal
from jobs.errors import BadInputError
from jobs.kept import Keep
from jobs.locations import Location, parse_location
from jobs.output_form import OutputForm
from jobs.request import BaseQuantization, Dtype
from workers.files.collector import loading

if TYPE_CHECKING:
    from cluster.settings import Settings

commands = typer.Typer()


@commands.command()
def plan(file: RequestFile, *, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what each request of FILE would do, from headers alone: coverage, bytes, memory, time."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.console.display import note_line, preview_table
        from cluster.console.documents import preview_document
        from cluster.settings import load_settings
        from jobs.request_files.reading import Origin, read_requests, read_text
        from workers.sources.folders import Folders

        settings = load_settings()
        reading = read_requests(read_text(file), Origin.of(file), settings.allowance, Folders())
        with loading():  # it takes seconds to load, and a wrong file is told before
            from cluster.commands.plan import preview

        previews = preview(
            reading.requests,
            settings.cache,
            settings.num_threads,
            settings.device,
            inert_fields=settings.inert_adapter_fields,
        )
        documents = [preview_document(each) for each in previews]
        output.document({"requests": documents, "left_out": list(reading.left_out)})
        for place in reading.left_out:
            output.show(f"left out: {place}")
        output.show(preview_table(previews))
        for each in previews:
            for note in each.notes:
                output.show(note_line(each.request.id, note))
        failures = {each.request.id: each.failure for each in previews if each.failure is not None}
        for id_, failure in failures.items():
            output.show_error(f"{id_}: {failure.failure_class}: {failure.message}")
        raise typer.Exit(exit_codes.of_command(failure.failure_class for failure in failures.values()))


@commands.command()
def merge(
    *,
    base: Annotated[str, typer.Option(metavar="LOC", help="Checkpoint to merge into.")],
    adapter: Annotated[list[str], typer.Option(metavar="LOC", help="Adapter; may be given several times.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="LOC", help="Destination; with several adapters, LOC/<adapter name>, on the Hub LOC-<adapter name>."
        ),
    ],
    base_quantization: Annotated[
        BaseQuantization,
        typer.Option(
            help="What the delta is added to; by default own weights of a quantized base, and nf4 of one in 16 bits."
        ),
    ] = BaseQuantization.DEFAULT,
    dtype: Annotated[Dtype | None, typer.Option(help="Output dtype; the base's own by default.")] = None,
    output_form: Annotated[
        OutputForm,
        typer.Option("--output", help="What the release is stored in: plain numbers, or what a quantized base is."),
    ] = OutputForm.PLAIN,
    keep: Annotated[
        Keep | None, typer.Option(help="What weights are kept in whose delta a quantized form would lose.")
    ] = None,
    parity: Annotated[Literal["full", "arithmetic"], typer.Option(help="How the merge is proven.")] = "full",
    compare: Annotated[
        bool, typer.Option("--compare", help="Merge into the other base (16-bit, 4-bit) too, and show how both do.")
    ] = False,
    accept_unstable: Annotated[
        bool, typer.Option("--accept-unstable", help="Merge a method whose weights depend on this machine.")
    ] = False,
    log_format: LogFormat = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge here and now, in one pass: no queue, no Ray."""
    with terminal(as_json=as_json, debug=debug, log_format=log_format) as output:
        from cluster.commands.merge import build_requests, merge_and_show

        requests = build_requests(
            base=base,
            adapters=adapter,
            destination=to,
            base_quantization=base_quantization,
            dtype=dtype,
            output=output_form,
            keep=keep,
            parity=parity,
            compare=compare,
            accept_unstable=accept_unstable,
        )
        raise typer.Exit(exit_codes.of_command(merge_and_show(output, requests)))


@commands.command()
def verify(
    location: Release,
    *,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="LOC", help="Compare what an external quantizer made with this release, its 16-bit origin."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="LOC", help="With --against: the base, where it is not where the release's manifest says."
        ),
    ] = None,
    parity: Annotated[
        Literal["full", "arithmetic"] | None,
        typer.Option(help="With --against: full asks both models prompts, too, and is the default."),
    ] = None,
    min_survival: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With --against: least share of a weight's delta that is left, 0.5 by default."
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(min=0, help="With --against: largest relative error of a weight, 0.5 by default."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, help="With --against: largest mean KL to the release, 0.005 nats by default."),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --against: least top-1 agreement with the release, 0.97 by default."),
    ] = None,
    max_lost_share: Annotated[
        float | None,
        typer.Option(min=0, help="With --against: largest KL, over that from release to base, 0.5 by default."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a release where it is: every file against its manifest. No GPU, no model.

    With --against, check that LOC is that release in another form, and what is left of the adapter; ends with 3 if not.
    """
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.settings import load_settings

        place, settings = _parse(location), load_settings()
        limits = {
            "min_survival": min_survival,
            "max_error": max_error,
            "max_mean_kl": max_kl,
            "min_top1_agreement": min_top1,
            "max_lost_share": max_lost_share,
        }
        given = {name: value for name, value in limits.items() if value is not None}
        if against is None:
            if given or base is not None or parity is not None:
                raise BadInputError("verify: these options compare with a release: name it with --against")
            _verify_alone(output, place, settings)
            return
        release, base_place = _parse(against), None if base is None else _parse(base)
        with loading():  # it takes seconds to load, and wrong arguments are told before
            from cluster.commands.against import verify_against_and_show
            from workers.against.comparison import Limits
            from workers.against.question import Question

        question = Question(
            checkpoint=place, release=release, base=base_place, limits=Limits(**given), level=parity or "full"
        )
        passed = verify_against_and_show(output, settings, question)
        raise typer.Exit(exit_codes.DONE if passed else exit_codes.PARITY_FAILED)


def _verify_alone(output: Terminal, place: Location, settings: "Settings") -> None:
    from cluster.console.display import manifest_line
    from cluster.console.documents import manifest_document
    from workers.releases.delivery import verify_release

    manifest = verify_release(place, settings.scratch)
    output.document({"location": str(place), **manifest_document(manifest)})
    output.show(manifest_line(place, manifest))


@commands.command()
def check(
    location: Annotated[str, typer.Argument(metavar="LOC", help="Where the release, or any other checkpoint, is.")],
    *,
    engine: Annotated[
        Literal["transformers-5", "transformers-4", "vllm", "sglang", "llama.cpp", "bedrock"] | None,
        typer.Option(help="Ask about one engine: what that refuses is an error, and nothing else is told."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check that engines can load a checkpoint, from headers and small files. No GPU, no weights, no manifest.

    Ends with 2 where something is an error.
    """
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.settings import load_settings

        place = _parse(location)
        scratch = load_settings().scratch
        with loading():  # it takes seconds to load, and a wrong place is told before
            from cluster.commands.check import check_and_show

        raise typer.Exit(exit_codes.DONE if check_and_show(output, place, scratch, engine) else exit_codes.BAD_INPUT)


@commands.command()
def pull(
    location: Release,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Missing or empty directory.")],
    *,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring a release to a directory, verified on the way; the directory appears whole or not at all."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.console.display import manifest_line
        from cluster.console.documents import manifest_document
        from workers.releases.delivery import pull_release

        manifest = pull_release(_parse(location), directory)
        output.document({"location": str(directory.absolute()), **manifest_document(manifest)})
        output.show(manifest_line(directory, manifest))


def _parse(location: str) -> Location:
    try:
        return parse_location(location)
    except ValueError as error:
        raise BadInputError(str(error)) from error
