// Anthropic's client for Node.
import { load, serve } from "./speak.mjs";

const { Anthropic } = load("@anthropic-ai/sdk");

async function* call(asked) {
  const options = asked.timeout_s === null ? {} : { timeout: asked.timeout_s * 1000 };
  const client = new Anthropic({ baseURL: asked.base_url, apiKey: asked.key, ...options });
  const fields = {
    model: asked.model,
    max_tokens: asked.max_tokens,
    messages: [{ role: "user", content: asked.prompt }],
  };
  if (!asked.stream) {
    const message = await client.messages.create(fields);
    yield message.content.map((block) => block.text).join("");
    return;
  }
  const stream = client.messages.stream(fields);
  for await (const event of stream) {
    if (event.type === "content_block_delta") yield event.delta.text;
  }
  await stream.finalMessage();
}

await serve(call);
