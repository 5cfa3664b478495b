// What a server answered instead of an answer, or that there is none.
class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const BROKEN = "The answer broke off: the connection was closed before its end.";
const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached: is it still running?");
  }
  if (response.ok) return response;
  const text = await response.text();
  throw new Failure(messageOf(text) ?? `The server answered ${response.status}.`, response.status);
}

function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return undefined;
  }
}

async function serverInfo(key) {
  return (await request("v1/align", { headers: headers(key) })).json();
}

// Stream one answer. `onText` gets pieces as they come. Resolves to {finish, align, usage, warning}; throws Failure or AbortError.
async function ask(body, key, signal, onText) {
  const response = await request("v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  const told = { warning: response.headers.get("X-Align-Warning") };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return told;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message);
    if (chunk.usage) told.usage = chunk.usage;
    for (const choice of chunk.choices) {
      if (choice.delta.content) onText(choice.delta.content);
      if (choice.finish_reason) Object.assign(told, { finish: choice.finish_reason, align: choice.align });
    }
  }
  throw new Failure(BROKEN);
}

// The data of server-sent events. Each is one line here; comments keep the connection open.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    throw error.name === "TypeError" ? new Failure(BROKEN) : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
