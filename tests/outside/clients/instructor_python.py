"""Instructor, which wants an object of a schema: the prompt is JSON, which the stub says again."""

import json

import instructor
from openai import AsyncOpenAI
from pydantic import BaseModel
from speak import serve


class Words(BaseModel):
    words: str


async def call(asked):
    options = {} if asked["timeout_s"] is None else {"timeout": asked["timeout_s"]}
    inner = AsyncOpenAI(base_url=asked["base_url"] + "/v1", api_key=asked["key"], **options)
    client = instructor.from_openai(inner, mode=instructor.Mode.JSON)
    said = json.dumps({"words": asked["prompt"]}, separators=(",", ":"))
    fields = {
        "model": asked["model"],
        "messages": [{"role": "user", "content": said}],
        "max_tokens": asked["max_tokens"],
        "response_model": Words,
    }
    if not asked["stream"]:
        yield (await client.create(**fields)).words
        return
    last = ""
    async for part in client.create_partial(**fields):
        words = part.words or ""
        yield words.removeprefix(last)
        last = words


serve(call)
