"""Pydantic AI's agent, by the chat API (`api` chat) or Anthropic's (`api` anthropic)."""

from anthropic import AsyncAnthropic
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from speak import serve


async def call(asked):
    if asked["api"] == "anthropic":
        # Its own http client is of another package than this SDK takes.
        inner = AsyncAnthropic(base_url=asked["base_url"], api_key=asked["key"])
        provider = AnthropicProvider(anthropic_client=inner)
        model = AnthropicModel(asked["model"], provider=provider)
    else:
        provider = OpenAIProvider(base_url=asked["base_url"] + "/v1", api_key=asked["key"])
        model = OpenAIChatModel(asked["model"], provider=provider)
    settings = {"max_tokens": asked["max_tokens"]}
    if asked["timeout_s"] is not None:
        settings["timeout"] = asked["timeout_s"]
    agent = Agent(model, model_settings=settings)
    if not asked["stream"]:
        yield (await agent.run(asked["prompt"])).output
        return
    async with agent.run_stream(asked["prompt"]) as run:
        async for piece in run.stream_text(delta=True, debounce_by=None):
            yield piece


serve(call)
