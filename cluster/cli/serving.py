"""The command that answers over HTTP."""

from typing import Annotated

import typer

from cluster.console.arguments import AsJson, Debug, LogFormat
from cluster.console.terminal import terminal

commands = typer.Typer()


@commands.command()
def serve(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own takes a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8420,
    log_format: LogFormat = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer over HTTP: an API, pages for people, messages to webhooks. Ctrl-C stops in order.

    TLS is the matter of a proxy before it. Other commands ask it when MERGEFLEET_SERVER says where it is.
    """
    with terminal(as_json=as_json, debug=debug, log_format=log_format) as output:
        from cluster.front.server import serve as answer
        from cluster.settings import load_settings

        def tell(url: str) -> None:
            output.document({"url": url})
            output.show(f"answering at {url}")

        answer(load_settings(), host, port, tell)
