// The settings: from what the server has to fields, and from fields to the two requests.
class Mistake extends Error {
  constructor(message, input) {
    super(message);
    this.input = input;
  }
}

const PRESETS = ["hh", "adv", "truth", "sentiment", "town"];
const RAIN_FIELDS = [  // name, label, step
  ["max_iterations", "Iterations per set", 1], ["min_visits", "Visits to commit early", 1], ["value_threshold", "Value to commit early", .05],
  ["min_new_iterations", "Least new iterations", 1], ["num_samples", "Sampled sets", 1], ["max_tries", "Tries for them", 1],
  ["top_k", "Candidates (top k)", 1], ["expansion_temperature", "Expansion temperature", .1], ["c_puct", "Exploration (c puct)", .1],
  ["max_children", "Most children", 1],
];
const MAIN_FIELDS = 3;

class SettingsForm {
  #server = null;

  constructor() {
    RAIN_FIELDS.forEach(([name, label, step], i) => {
      const input = make("input");
      Object.assign(input, { type: "number", id: name, step, placeholder: "preset" });
      $(i < MAIN_FIELDS ? "rain-main" : "rain-more").append(make("label", "", `${label} `, input));
    });
    $("reseed").addEventListener("click", () => {
      $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
      $("form").dispatchEvent(new Event("input"));
    });
    $("form").addEventListener("input", () => this.sync());
  }

  // Offer what a server has, set as the server would align by itself.
  offer(server) {
    this.#server = server;
    const standard = server.default;
    $("server").textContent = `${server.model}: ${plural(server.num_models, "model")}, ${server.dtype}${server.exact ? ", exact" : ""}, ` +
      `context of ${plural(server.context_length, "token")}`;
    $("preset").replaceChildren(option("", `${server.preset} (server's)`), ...PRESETS.map((name) => option(name, name)));
    $("preset").value = standard.rain?.preset ?? "";
    for (const [name] of RAIN_FIELDS) $(name).value = standard.rain?.[name] ?? "";
    this.#radio(standard.search ?? (standard.rain ? "rain" : "sampling")).checked = true;
    this.#offerSliders(server.num_models - 1, standard.dera?.lambda);
    this.#offerEdits(server.edits, standard.edits ?? []);
    $("edit-on-label").hidden = server.num_models < 2;
    $("edit-on").value = standard.edits?.[0]?.on ?? "reference";
    $("urial").replaceChildren(option("", "nothing"), ...server.prompts.map((name) => option(name, name)));
    $("urial").value = standard.urial === true ? server.prompts[0] : standard.urial || "";
    $("vanilla-dera").hidden = server.num_models < 2;
    this.sync();
  }

  #radio(value) {
    return document.querySelector(`input[name="search"][value="${value}"]`);
  }

  get #searches() {
    return this.#radio("rain").checked;
  }

  #offerSliders(number, standard) {
    $("dera").hidden = number < 1;
    $("sliders").replaceChildren(...Array.from({ length: Math.max(0, number) }, (_, i) => {
      const slider = make("input"), field = make("input"), name = number > 1 ? `λ of aligned model ${i + 1}` : "λ";
      Object.assign(slider, { type: "range", min: 0, max: 2, step: .05, className: "lambda" });
      Object.assign(field, { type: "number", min: 0, step: .05, className: "lambda-number" });
      slider.value = field.value = [standard ?? 1 / number].flat()[i] ?? 1 / number;
      slider.setAttribute("aria-label", `${name}, slider`);
      field.setAttribute("aria-label", `${name}, number`);
      slider.addEventListener("input", () => { field.value = slider.value; });
      field.addEventListener("input", () => { slider.value = field.value; });
      return make("div", "slider", make("span", "", number > 1 ? `λ ${i + 1}` : "λ"), slider, field);
    }));
  }

  #offerEdits(names, standard) {
    $("edits").hidden = !names.length;
    $("edit-list").replaceChildren(...names.map((name) => {
      const box = make("input"), strength = make("input"), given = standard.find((one) => one.name === name);
      Object.assign(box, { type: "checkbox", value: name, className: "edit-box", checked: Boolean(given) });
      Object.assign(strength, { type: "number", step: .1, value: given?.strength ?? 1, className: "edit-strength" });
      strength.setAttribute("aria-label", `Strength of ${name}`);
      return make("div", "edit", make("label", "", box, name), make("span", "small muted", "strength"), strength);
    }));
  }

  // What can be set, where settings exclude one another.
  sync() {
    $("rain").hidden = !this.#searches;
    $("methods").textContent = this.#server ? this.#told() : "";
  }

  #told() {
    const parts = [this.#searches ? `RAIN (${$("preset").value || this.#server.preset})` : "Sampling"];
    const weights = [...document.querySelectorAll(".lambda-number")].map((field) => field.value);
    if (weights.length) parts.push(`λ = ${weights.join(", ")}`);
    for (const row of document.querySelectorAll(".edit")) {
      const box = row.querySelector(".edit-box");
      if (box.checked) parts.push(`edit ${box.value} × ${row.querySelector(".edit-strength").value}`);
    }
    if ($("urial").value) parts.push(`constant prompt ${$("urial").value}`);
    return `${parts.join(" · ")}.`;
  }

  // The bodies of the two requests. Throws Mistake.
  bodies() {
    const { model, num_models: models } = this.#server;
    const common = {
      model, messages: [{ role: "user", content: $("prompt").value }], max_tokens: whole($("max_tokens"), "Max tokens"),
      temperature: number($("temperature"), "Temperature"), seed: whole($("seed"), "Seed"), stream: true, stream_options: { include_usage: true },
    };
    const none = models > 2 ? { lambda: Array(models - 1).fill(0) } : 0;
    const vanilla = { search: "sampling", ...(models > 1 ? { dera: none } : {}), edits: [], urial: false };
    const aligned = { ...common, align: this.#align(models) };
    if (this.#searches) delete aligned.temperature;
    return { vanilla: { ...common, align: vanilla }, aligned };
  }

  #align(models) {
    const align = this.#searches ? { search: "rain", rain: this.#rain() } : { search: "sampling" };
    if (models > 1) {
      const weights = [...document.querySelectorAll(".lambda-number")].map((field) => number(field, "λ") ?? 0);
      align.dera = weights.length > 1 ? { lambda: weights } : weights[0];
    }
    const on = models > 1 ? { on: $("edit-on").value } : {};
    align.edits = [...document.querySelectorAll(".edit")].filter((row) => row.querySelector(".edit-box").checked).map((row) => {
      const name = row.querySelector(".edit-box").value;
      return { name, strength: number(row.querySelector(".edit-strength"), `Strength of ${name}`) ?? 1, ...on };
    });
    align.urial = $("urial").value || false;
    return align;
  }

  #rain() {
    const rain = { tree: true };
    if ($("preset").value) rain.preset = $("preset").value;
    for (const [name, label] of RAIN_FIELDS) {
      const value = number($(name), label);
      if (value !== undefined) rain[name] = value;
    }
    return rain;
  }
}

function option(value, text) {
  return Object.assign(make("option", "", text), { value });
}

// The number in a field; undefined where it is empty, which leaves the choice to the server.
function number(input, label) {
  if (input.validity.badInput) throw new Mistake(`${label}: this is not a number.`, input);
  return input.value === "" ? undefined : Number(input.value);
}

function whole(input, label) {
  const value = number(input, label);
  if (value !== undefined && !Number.isSafeInteger(value)) throw new Mistake(`${label}: give a whole number of up to 15 digits.`, input);
  return value;
}
