"""LiteLLM as a library, towards an OpenAI-compatible server."""

import litellm
from speak import serve

litellm.telemetry = False
litellm.suppress_debug_info = True


async def call(asked):
    options = {} if asked["timeout_s"] is None else {"timeout": asked["timeout_s"]}
    answer = await litellm.acompletion(
        model="openai/" + asked["model"], api_base=asked["base_url"] + "/v1", api_key=asked["key"],
        messages=[{"role": "user", "content": asked["prompt"]}], max_tokens=asked["max_tokens"],
        stream=asked["stream"], **options,
    )  # fmt: skip
    if not asked["stream"]:
        yield answer.choices[0].message.content
        return
    async for chunk in answer:
        yield chunk.choices[0].delta.content


serve(call)
