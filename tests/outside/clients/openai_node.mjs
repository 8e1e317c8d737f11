// OpenAI's client for Node: `api` is chat or responses.
import { load, serve } from "./speak.mjs";

const { OpenAI } = load("openai");

async function* call(asked) {
  const options = asked.timeout_s === null ? {} : { timeout: asked.timeout_s * 1000 };
  const client = new OpenAI({ baseURL: asked.base_url + "/v1", apiKey: asked.key, ...options });
  yield* asked.api === "chat" ? chat(client, asked) : responses(client, asked);
}

async function* chat(client, asked) {
  const answer = await client.chat.completions.create({
    model: asked.model,
    messages: [{ role: "user", content: asked.prompt }],
    max_tokens: asked.max_tokens,
    stream: asked.stream,
  });
  if (!asked.stream) {
    yield answer.choices[0].message.content;
    return;
  }
  for await (const chunk of answer) {
    for (const choice of chunk.choices) yield choice.delta.content;
  }
}

async function* responses(client, asked) {
  const answer = await client.responses.create({
    model: asked.model,
    input: asked.prompt,
    max_output_tokens: asked.max_tokens,
    stream: asked.stream,
  });
  if (!asked.stream) {
    yield answer.output_text;
    return;
  }
  let completed = false;
  for await (const event of answer) {
    if (event.type === "response.output_text.delta") yield event.delta;
    if (event.type === "error") throw new Error(`error event: ${event.message}`);
    completed ||= event.type === "response.completed";
  }
  if (!completed) throw new Error("the stream ended without response.completed");
}

await serve(call);
