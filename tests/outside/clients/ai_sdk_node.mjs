// Vercel's AI SDK: `api` is chat or responses, the two ways of its OpenAI provider.
import { load, serve } from "./speak.mjs";

const { generateText, streamText } = load("ai");
const { createOpenAI } = load("@ai-sdk/openai");

async function* call(asked) {
  const provider = createOpenAI({ baseURL: asked.base_url + "/v1", apiKey: asked.key });
  const model = asked.api === "chat" ? provider.chat(asked.model) : provider.responses(asked.model);
  const fields = { model, prompt: asked.prompt, maxOutputTokens: asked.max_tokens };
  if (asked.timeout_s !== null) fields.abortSignal = AbortSignal.timeout(asked.timeout_s * 1000);
  if (!asked.stream) {
    yield (await generateText(fields)).text;
    return;
  }
  let failed = null;
  let finished = false;
  for await (const part of streamText({ ...fields, onError: () => {} }).fullStream) {
    if (part.type === "text-delta") yield part.text;
    if (part.type === "error") failed = part.error;
    if (part.type === "abort") failed = new Error("aborted by its timeout");
    if (part.type === "finish") finished = part.finishReason !== "error";
  }
  if (failed) throw failed;
  if (!finished) throw new Error("the stream ended without a finish");
}

await serve(call);
