"""OpenAI's Python client: `api` is chat, completions or responses."""

from openai import AsyncOpenAI
from speak import serve


async def call(asked):
    options = {} if asked["timeout_s"] is None else {"timeout": asked["timeout_s"]}
    async with AsyncOpenAI(
        base_url=asked["base_url"] + "/v1", api_key=asked["key"], **options
    ) as c:
        async for piece in _APIS[asked["api"]](c, asked):
            yield piece


async def _chat(client, asked):
    answer = await client.chat.completions.create(
        model=asked["model"], messages=[{"role": "user", "content": asked["prompt"]}],
        max_tokens=asked["max_tokens"], stream=asked["stream"],
    )  # fmt: skip
    if not asked["stream"]:
        yield answer.choices[0].message.content
        return
    async for chunk in answer:
        for choice in chunk.choices:
            yield choice.delta.content


async def _completions(client, asked):
    answer = await client.completions.create(
        model=asked["model"], prompt=asked["prompt"], max_tokens=asked["max_tokens"],
        stream=asked["stream"],
    )  # fmt: skip
    if not asked["stream"]:
        yield answer.choices[0].text
        return
    async for chunk in answer:
        for choice in chunk.choices:
            yield choice.text


async def _responses(client, asked):
    answer = await client.responses.create(
        model=asked["model"], input=asked["prompt"], max_output_tokens=asked["max_tokens"],
        stream=asked["stream"],
    )  # fmt: skip
    if not asked["stream"]:
        yield answer.output_text
        return
    completed = False
    async for event in answer:
        if event.type == "response.output_text.delta":
            yield event.delta
        if event.type == "error":
            raise RuntimeError(f"error event: {event.message}")
        completed = completed or event.type == "response.completed"
    if not completed:
        raise RuntimeError("the stream ended without response.completed")


_APIS = {"chat": _chat, "completions": _completions, "responses": _responses}

serve(call)
