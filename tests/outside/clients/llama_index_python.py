"""LlamaIndex's client of OpenAI-like servers."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from speak import serve


async def call(asked):
    options = {} if asked["timeout_s"] is None else {"timeout": asked["timeout_s"]}
    llm = OpenAILike(
        model=asked["model"], api_base=asked["base_url"] + "/v1", api_key=asked["key"],
        is_chat_model=True, max_tokens=asked["max_tokens"], **options,
    )  # fmt: skip
    messages = [ChatMessage(role="user", content=asked["prompt"])]
    if not asked["stream"]:
        yield (await llm.achat(messages)).message.content
        return
    async for chunk in await llm.astream_chat(messages):
        yield chunk.delta


serve(call)
