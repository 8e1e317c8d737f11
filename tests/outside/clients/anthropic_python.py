"""Anthropic's Python client."""

from anthropic import AsyncAnthropic
from speak import serve


async def call(asked):
    options = {} if asked["timeout_s"] is None else {"timeout": asked["timeout_s"]}
    async with AsyncAnthropic(
        base_url=asked["base_url"], api_key=asked["key"], **options
    ) as client:
        fields = {
            "model": asked["model"],
            "max_tokens": asked["max_tokens"],
            "messages": [{"role": "user", "content": asked["prompt"]}],
        }
        if not asked["stream"]:
            message = await client.messages.create(**fields)
            yield "".join(block.text for block in message.content)
            return
        async with client.messages.stream(**fields) as stream:
            async for text in stream.text_stream:
                yield text
            await stream.get_final_message()


serve(call)
