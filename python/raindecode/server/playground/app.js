// The page: asks for both answers at once and shows what comes.
const SIDES = ["vanilla", "aligned"];
const TITLES = { vanilla: "Vanilla", aligned: "Aligned" };
const COUNTERS = [
  ["model_steps", "Model steps", "forwards it took part in"],
  ["tokens_processed", "Tokens processed", "distinct ones it needed evaluated, once per model"],
  ["tokens_charged", "Tokens charged", "rows run for it"],
  ["kv_tokens_peak", "KV tokens", "most held at a time"],
  ["iterations", "Search iterations", "of RAIN"],
  ["evaluations", "Evaluations", "verdicts of the judge"],
];
const FINISHES = { stop: "ended by itself", length: "cut at the most tokens" };

// One of the two columns.
class Answer {
  constructor(side) {
    this.side = side;
    this.text = document.createTextNode("");
    this.box = make("div", "text", this.text);
    this.state = make("p", "state small muted", "Nothing asked yet.");
    this.alert = make("p", "alert");
    this.alert.setAttribute("role", "alert");
    this.alert.hidden = true;
    this.note = make("p", "small note");
    this.spoken = make("p", "unseen spoken");
    this.spoken.setAttribute("role", "status");
    $(side).append(this.alert, this.box, this.state, this.note, this.spoken);
  }

  begin() {
    Object.assign(this, { told: null, began: performance.now(), first: null, ended: null });
    this.text.data = this.note.textContent = this.spoken.textContent = "";
    warn(this.alert, "");
    this.box.setAttribute("aria-busy", "true");
    this.tick();
  }

  add(text) {
    this.first ??= performance.now();
    this.text.appendData(text);
  }

  tick() {
    if (this.ended !== null) return;
    this.state.textContent = `${this.first === null ? "waiting" : "writing"}… ${seconds(performance.now() - this.began)}`;
  }

  end(state) {
    this.ended = performance.now();
    this.box.removeAttribute("aria-busy");
    this.state.textContent = state;
  }

  async run(body, key, signal) {
    this.begin();
    try {
      this.told = await ask(body, key, signal, (text) => this.add(text));
      this.end(`${FINISHES[this.told.finish] ?? this.told.finish}, after ${seconds(performance.now() - this.began)}`);
      if (this.told.warning) this.note.textContent = `The server says: ${this.told.warning}`;
      this.spoken.textContent = `${TITLES[this.side]}: ${this.text.data || "an empty answer"}`;
    } catch (error) {
      const stopped = error.name === "AbortError";
      this.end(`${stopped ? "stopped" : "failed"} after ${seconds(performance.now() - this.began)}`);
      if (stopped) this.spoken.textContent = `${TITLES[this.side]}: stopped`;
      else warn(this.alert, error.message);
      if (error.status === 401) throw error;
    }
  }
}

const answers = Object.fromEntries(SIDES.map((side) => [side, new Answer(side)]));
const form = new SettingsForm(), view = new TreeView();
const sent = { vanilla: null, aligned: null };  // the bodies last sent, as text, and when
let key = "", running = null, ready = false;

async function send() {
  if (running) return;
  if (!ready) await load();
  if (!ready) return;
  const bodies = made();
  if (!bodies) return;
  if (!$("prompt").value) return refuse("Write a prompt first.", $("prompt"));
  running = new AbortController();
  const timer = setInterval(() => SIDES.forEach((side) => answers[side].tick()), 100);
  $("send").setAttribute("aria-disabled", "true");
  $("stop").disabled = false;
  view.trees = null;
  const at = new Date().toLocaleTimeString();
  const runs = SIDES.map(async (side) => {
    const body = JSON.stringify(bodies[side]);
    sent[side] = { body, at };
    await answers[side].run(body, key, running.signal);
    numbers();
    if (side === "aligned") view.trees = answers[side].told?.align?.tree;
  });
  showRequest();
  if ($("vanilla").getBoundingClientRect().top > innerHeight - 120) $("vanilla").scrollIntoView({ block: "center" });
  const failed = (await Promise.allSettled(runs)).find((run) => run.status === "rejected");
  clearInterval(timer);
  running = null;
  $("send").removeAttribute("aria-disabled");
  if (document.activeElement === $("stop")) $("send").focus();
  $("stop").disabled = true;
  numbers();
  if (failed?.reason.status === 401) askKey();
  else if (failed) throw failed.reason;
}

// The bodies as the form is now; a mistake is told and gives none.
function made() {
  try {
    const bodies = form.bodies();
    warn($("formerror"), "");
    return bodies;
  } catch (error) {
    if (!(error instanceof Mistake)) throw error;
    refuse(error.message, error.input);
    return null;
  }
}

function refuse(message, input) {
  warn($("formerror"), message);
  for (let around = input.closest("details"); around; around = around.parentElement.closest("details")) around.open = true;
  input.focus();
}

// ---- counters ---------------------------------------------------------------------------------------------------------
function numbers() {
  const rows = [
    ["Answer's tokens", "", (one) => one.told?.usage?.completion_tokens],
    ["Prompt's tokens", "", (one) => one.told?.usage?.prompt_tokens],
    ["First text after", "", (one) => one.first === null ? undefined : seconds(one.first - one.began)],
    ["Whole answer after", "", (one) => one.told ? seconds(one.ended - one.began) : undefined],
    ...COUNTERS.map(([name, label, note]) => [label, note, (one) => one.told?.usage?.align[name]]),
    ["Value", "RAIN's of the last set, −1 to +1", (one) => one.told?.align?.value === undefined ? undefined : signed(one.told.align.value)],
  ];
  $("numbers").hidden = SIDES.every((side) => !answers[side].told && answers[side].first === null);
  $("numbers").querySelector("tbody").replaceChildren(...rows.map(([label, note, value]) => {
    const head = make("th", "", label, ...(note ? [make("span", "", note)] : []));
    head.scope = "row";
    return make("tr", "", head, ...SIDES.map((side) => make("td", "", told(value(answers[side])))));
  }));
}

const told = (value) => value === undefined ? "—" : typeof value === "number" ? count(value) : value;

// ---- requests -----------------------------------------------------------------------------------------------------------
function showRequest() {
  if (!ready || !$("requests").open) return;
  const side = $("request-side").value;
  try {
    const body = form.bodies()[side], text = JSON.stringify(body);
    $("request").textContent = $("request-form").value === "curl" ? curl(text) : JSON.stringify(body, null, 2);
    $("request-state").textContent = sent[side]?.body === text ? `This was sent at ${sent[side].at}.` : "Not sent yet: Send sends exactly this.";
  } catch (error) {
    if (!(error instanceof Mistake)) throw error;
    $("request").textContent = "";
    $("request-state").textContent = error.message;
  }
}

function curl(body) {
  const url = new URL("v1/chat/completions", location.href).href;
  const authorization = key ? `\n  -H "Authorization: Bearer $RAINDECODE_API_KEY" \\` : "";
  return `curl -N ${url} \\${authorization}\n  -H 'Content-Type: application/json' \\\n  -d '${body.replaceAll("'", "'\\''")}'`;
}

// ---- the server and its key -----------------------------------------------------------------------------------------------
async function load() {
  try {
    const server = await serverInfo(key);
    if (!ready) form.offer(server);
  } catch (error) {
    $("server").textContent = "";
    if (error.status === 401) return askKey();
    return warn($("formerror"), error.message);
  }
  ready = true;
  warn($("formerror"), "");
  if (!$("keyform").hidden) {
    $("keyform").hidden = true;
    $("prompt").focus();
  }
  showRequest();
}

function askKey() {
  $("keyform").hidden = false;
  warn($("keyerror"), key ? "The server does not take this key." : "");
  $("key").focus();
}

$("keyform").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  load();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("form").addEventListener("input", showRequest);
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
for (const name of ["request-side", "request-form"]) $(name).addEventListener("input", showRequest);
$("requests").addEventListener("toggle", showRequest);
$("copy").addEventListener("click", async () => {
  $("copied").textContent = await copy($("request").textContent, $("request")) ? "Copied." : "Select the text and copy it.";
});
$("settings").open = matchMedia("(min-width: 40rem)").matches;  // on a phone the answers stand near the prompt
load();
