"""`stoker invoke`: one question to a model, through the router, as any client asks it."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from cli.cluster import ClusterAccess

if TYPE_CHECKING:
    from cli.router_client import Answer


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--max-tokens", type=click.IntRange(1), help="The longest answer; default the model's."
)
@click.option("--raw", is_flag=True, help="Complete PROMPT as it is, without a chat template.")
@click.option("--no-stream", is_flag=True, help="Print the answer only when it is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print the API's JSON; implies --no-stream.")
@click.pass_obj
def invoke(
    cluster: ClusterAccess,
    model: str,
    prompt: str,
    max_tokens: int | None,
    raw: bool,
    no_stream: bool,
    as_json: bool,
) -> None:
    """Ask MODEL one thing and stream its answer.

    While the model is cold, stderr says what the call waits for. PROMPT may be - for stdin. Where
    the router asks for an API key, it is taken from $STOKER_API_KEY.
    """
    from cli.router_client import ask_body

    if prompt == "-":
        prompt = sys.stdin.read()
    path, body = ask_body(model, prompt, max_tokens, raw)
    asyncio.run(_invoke(cluster, path, body, whole=no_stream, as_json=as_json))


async def _invoke(
    cluster: ClusterAccess, path: str, body: dict[str, Any], *, whole: bool, as_json: bool
) -> None:
    from cli import router_client
    from cli.text import echo_untrusted, print_json

    url = await cluster.router_url()
    if as_json:
        print_json(await router_client.post(url, path, body))
        return
    answer = await stream_with_status(url, path, body, show=not whole)
    echo_untrusted(answer.text if whole else "")
    facts = [f"first token {answer.first_token_s:.2f} s"] if answer.first_token_s else []
    facts += [f"total {answer.total_s:.2f} s"]
    facts += [f"{answer.tokens} tokens"] if answer.tokens is not None else []
    click.echo(", ".join(facts), err=True)


async def stream_with_status(url: str, path: str, body: dict[str, Any], *, show: bool) -> Answer:
    """Stream an answer; a live line on stderr tells what it waits for until the first token.

    With `show`, the text goes to stdout as it comes.
    """
    from cli import router_client
    from cli.text import echo_untrusted, waiting

    with waiting() as status:

        def on_text(piece: str) -> None:
            status(None)
            if show:
                echo_untrusted(piece, nl=False)

        return await router_client.stream(url, path, body, on_text, status)
