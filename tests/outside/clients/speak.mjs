// How a client's script is talked to: see speak.py, which says the same in Python.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

// The packages lie where the tests installed them, not beside this file.
export const load = createRequire(`${process.env.STOKER_NODE_CLIENTS}/package.json`);

const say = process.stdout.write.bind(process.stdout);
console.log = console.info = console.warn = console.error; // a library's words are no answer

export async function serve(call) {
  for await (const line of createInterface({ input: process.stdin })) {
    say(JSON.stringify(await one(call, JSON.parse(line))) + "\n");
  }
  process.exit(0); // whatever sockets a library keeps
}

async function one(call, asked) {
  const began = performance.now();
  const pieces = [];
  let error = null;
  try {
    for await (const piece of call(asked)) pieces.push(piece ?? "");
  } catch (raised) {
    error = { kind: kind(raised), status: status(raised), message: String(raised?.message ?? raised).slice(0, 2000) };
  }
  const took_s = Math.round(performance.now() - began) / 1000;
  return { text: pieces.join(""), pieces: pieces.length, error, took_s };
}

function kind(raised) {
  const name = raised?.name ?? typeof raised; // OpenAI's classes all go by the name Error
  return name === "Error" ? (raised.constructor?.name ?? name) : name;
}

function status(raised) {
  for (let seen = 0; raised && seen < 8; seen++) {
    for (const name of ["status", "statusCode"]) {
      if (Number.isInteger(raised[name])) return raised[name];
    }
    raised = raised.lastError ?? raised.cause;
  }
  return null;
}
