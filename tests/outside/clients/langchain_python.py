"""LangChain: `api` is openai or anthropic, its two packages."""

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from speak import serve


async def call(asked):
    common = {"model": asked["model"], "api_key": asked["key"], "timeout": asked["timeout_s"]}
    common |= {"max_tokens": asked["max_tokens"]}
    if asked["api"] == "openai":
        chat = ChatOpenAI(base_url=asked["base_url"] + "/v1", **common)
    else:
        chat = ChatAnthropic(base_url=asked["base_url"], **common)
    if not asked["stream"]:
        yield _text((await chat.ainvoke(asked["prompt"])).content)
        return
    async for chunk in chat.astream(asked["prompt"]):
        yield _text(chunk.content)


def _text(content):
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


serve(call)
