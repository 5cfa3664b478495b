// The picture of RAIN's search: one tree per committed set.
const COLUMN = 228, ROW = 44, LEFT = 24, TOP = 30, TRUNK = 26;  // in pixels at size 1
const SIGNS = { good2: "+", good1: "+", even: "0", bad1: "−", bad2: "−", unvisited: "?" };
const MEANING = {
  good2: "+0.5 and more", good1: "above 0", even: "0", bad1: "below 0", bad2: "−0.5 and less", unvisited: "not visited",
};

function band(node) {
  if (!node.visits) return "unvisited";
  if (Math.abs(node.value) < .005) return "even";
  return (node.value > 0 ? "good" : "bad") + (Math.abs(node.value) < .5 ? 1 : 2);
}

const radius = (node, most) => node.visits ? 8 + 7 * Math.sqrt(node.visits / most) : 7;

class TreeView {
  #trees = []; #step = 0; #path = new Map(); #open = new Set(); #items = []; #current = null; #scale = 1; #svg = null; #drawn = new Map();

  constructor() {
    const steps = $("steps"), picture = $("picture");
    steps.addEventListener("change", (event) => this.#show(Number(event.target.value)));
    $("all").addEventListener("change", () => this.#draw());
    $("larger").addEventListener("click", () => this.#resize(this.#scale * 1.25));
    $("smaller").addEventListener("click", () => this.#resize(this.#scale / 1.25));
    $("fit").addEventListener("click", () => this.#resize(picture.clientWidth / this.#svg.viewBox.baseVal.width));
    picture.addEventListener("click", (event) => this.#click(event));
    picture.addEventListener("keydown", (event) => this.#key(event));
    picture.addEventListener("focusin", (event) => this.#select(this.#itemAt(event)));
    picture.addEventListener("mouseover", (event) => this.#inspect(this.#itemAt(event) ?? this.#current));
    picture.addEventListener("mouseleave", () => this.#inspect(this.#current));
    legend();
  }

  // Show the trees of an answer (Completion.tree); none hides the picture.
  set trees(trees) {
    this.#trees = trees ?? [];
    $("search").hidden = !this.#trees.length;
    if (!this.#trees.length) return;
    $("steps").replaceChildren(...this.#trees.map((tree, i) => this.#option(tree, i)));
    this.#scale = 1;
    this.#show(0);
  }

  #option(tree, i) {
    const input = make("input");
    Object.assign(input, { type: "radio", name: "step", value: i, checked: i === 0 });
    const node = tree.root.children.find((child) => child.slot === tree.chosen);
    const text = node ? cut(named(piece(node, tree.root)), 24) : "";
    return make("label", "small", input, `${i + 1} `, make("code", "", text), make("span", "", node ? signed(node.value) : ""));
  }

  #show(step) {
    this.#step = step;
    this.#open.clear();
    this.#path = committedPath(this.#trees, step);
    this.#current = null;
    this.#draw();
    $("picture").scrollTo(0, 0);
  }

  // ---- drawing ----------------------------------------------------------------------------------------------------
  #draw() {
    const { root } = this.#trees[this.#step], before = this.#current?.node;
    const least = $("all").checked ? 0 : leastVisits(root, this.#path);
    this.#items = place(root, this.#path, least, this.#open);
    const most = Math.max(1, ...this.#items.map((item) => item.node.visits));
    const width = LEFT + COLUMN * (1 + Math.max(...this.#items.map((item) => item.depth))) - TRUNK + 8;
    const height = TOP + ROW * Math.max(...this.#items.map((item) => item.row)) + 28;
    this.#svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "tree", "aria-label": `Search tree of committed set ${this.#step + 1}` });
    this.#drawn = new Map(this.#items.map((item) => [item, this.#node(item, most)]));
    const edges = this.#items.filter((item) => item.parent).map((item) => this.#edge(item, most));
    edges.sort((a, b) => a.rank - b.rank);  // the committed path lies above the rest
    this.#svg.append(...edges.map((edge) => edge.line), ...this.#drawn.values());
    this.#resize(this.#scale);
    $("picture").replaceChildren(this.#svg);
    const shown = this.#items.length, nodes = total(root);
    $("shown").textContent = shown === nodes ? plural(nodes, "node")
      : `${shown} of ${plural(nodes, "node")}; those with fewer than ${plural(least, "visit")} are folded`;
    const chosen = this.#items.find((item) => this.#path.get(item.node) === this.#step);
    this.#select(this.#items.find((item) => item.node === before) ?? chosen ?? this.#items[0]);
  }

  #resize(scale) {
    this.#scale = Math.min(2, Math.max(.25, scale));
    const { width, height } = this.#svg.viewBox.baseVal;
    this.#svg.setAttribute("width", width * this.#scale);
    this.#svg.setAttribute("height", height * this.#scale);
  }

  #edge(item, most) {
    const [x, y] = at(item), [px, py] = at(item.parent), step = this.#path.get(item.node);
    const kind = step === undefined ? "" : step === this.#step ? " chosen" : " later";
    const bend = Math.min(8, (y - py) / 2), trunk = x - TRUNK;
    const d = y === py ? `M${px} ${py}H${x}` : `M${trunk - bend} ${py}q${bend} 0 ${bend} ${bend}V${y - bend}q0 ${bend} ${bend} ${bend}H${x}`;
    const line = shape("path", { class: `edge${kind}`, d });
    if (!kind) line.setAttribute("stroke-width", 1 + 3 * item.node.visits / most);
    return { line, rank: kind ? 1 : 0 };
  }

  #node(item, most) {
    const { node, parent } = item, [x, y] = at(item), r = radius(node, most), step = this.#path.get(node), name = band(node);
    const text = parent ? piece(node, parent.node) : node.text;
    const mark = step === undefined ? "" : step === this.#step ? "✓ " : "› ";
    const group = shape("g", { class: `node ${name}${step === undefined ? "" : step === this.#step ? " chosen" : " later"}`, role: "treeitem" });
    const room = (item.few ? 16 : 20) - mark.length;
    const label = parent ? mark + cut(named(text), room) : text ? `…${visible(text).slice(-19)}` : "(start)";
    const told = node.visits ? [signed(node.value), plural(node.visits, "visit")] : ["not visited"];
    if (parent) told.push(percent(node.prior));
    group.append(
      shape("rect", { class: "back", x: x - 18, y: y - 21, width: COLUMN - TRUNK - 2, height: ROW - 2, rx: 6 }),
      shape("circle", { class: "dot", cx: x, cy: y, r }),
      shape("text", { class: "sign", x, y: y + 5 }, SIGNS[name]),
      shape("text", { class: "label", x: x + 18, y: y - 6 }, label),
      shape("text", { class: "numbers", x: x + 18, y: y + 16 }, told.join(" · ")),
    );
    if (item.few) group.append(shape("text", { class: "fold", x: x + COLUMN - TRUNK - 26, y: y - 6 }, `${item.folded ? "▸" : "▾"}${item.few}`));
    const state = step === this.#step ? ", committed" : step === undefined ? "" : `, committed as set ${step + 1}`;
    const children = node.children.length ? `, ${node.children.length} children${item.folded ? `, ${item.folded} of them folded` : ""}` : "";
    group.setAttribute("aria-label", `${parent ? text || "nothing" : "the answer so far"}: ${told.join(", ")}${parent ? " prior" : ""}${children}${state}`);
    if (node.children.length) group.setAttribute("aria-expanded", String(!item.folded));
    Object.entries({ tabindex: -1, "aria-level": item.depth + 1, "data-slot": node.slot }).forEach(([key, value]) => group.setAttribute(key, value));
    return group;
  }

  // ---- moving about -----------------------------------------------------------------------------------------------
  #itemAt(event) {
    const group = event.target.closest("g");
    return this.#items.find((item) => this.#drawn.get(item) === group);
  }

  // Make an item the one that Tab comes to and the details tell of.
  #select(item) {
    if (!item) return;
    const last = this.#drawn.get(this.#current), group = this.#drawn.get(item);
    if (last) {
      last.setAttribute("tabindex", -1);
      last.setAttribute("aria-selected", "false");
      last.classList.remove("current");
    }
    this.#current = item;
    group.setAttribute("tabindex", 0);
    group.setAttribute("aria-selected", "true");
    group.classList.add("current");
    this.#inspect(item);
  }

  #focus(item) {
    if (!item) return;
    const group = this.#drawn.get(item);
    group.focus({ preventScroll: true });
    group.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #click(event) {
    const item = this.#itemAt(event);
    if (!item) return;
    this.#focus(item);
    if (event.target.classList.contains("fold")) this.#unfold(item);
  }

  // Show a node's little-visited children, or fold them away again.
  #unfold(item) {
    if (!item.few) return;
    if (!this.#open.delete(item.node)) this.#open.add(item.node);
    this.#draw();
    this.#focus(this.#current);
  }

  #key(event) {
    const item = this.#current;
    if (event.ctrlKey || event.altKey || event.metaKey || !item) return;
    const column = this.#items.filter((one) => one.depth === item.depth), place = column.indexOf(item);
    const moves = {
      ArrowLeft: () => this.#focus(item.parent),
      ArrowRight: () => this.#focus(item.children[0]),
      ArrowUp: () => this.#focus(column[place - 1]),
      ArrowDown: () => this.#focus(column[place + 1]),
      Home: () => this.#focus(this.#items[0]),
      End: () => this.#focus(this.#items.find((one) => this.#path.get(one.node) === this.#step)),
      Enter: () => this.#unfold(item),
      " ": () => this.#unfold(item),
      "+": () => this.#resize(this.#scale * 1.25),
      "=": () => this.#resize(this.#scale * 1.25),
      "-": () => this.#resize(this.#scale / 1.25),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  }

  // ---- details ----------------------------------------------------------------------------------------------------
  #inspect(item) {
    if (!item) return;
    const { node, parent } = item, step = this.#path.get(node), text = parent ? piece(node, parent.node) : "";
    const before = node.text.slice(0, node.text.length - text.length);
    const whole = make("p", "whole", make("span", "muted", before), make("b", "", text || (parent ? "∅" : before ? "" : "(the answer starts here)")));
    const rows = [
      ["Value", node.visits ? signed(node.value) : "not visited"], ["Visits", count(node.visits)], ["of them its own", count(node.direct_visits)],
      ...(parent ? [["Prior", percent(node.prior)]] : []), ["Children", count(node.children.length)],
      ["Token ids", node.tokens.join(" ") || "none"], ["Slot", String(node.slot)],
    ];
    const list = make("dl", "small", ...rows.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
    const fate = !parent ? "The root: the answer as committed so far." : step === this.#step ? "✓ Committed: this set became part of the answer."
      : step !== undefined ? `› Committed later, as set ${step + 1}.` : "Not committed.";
    $("details").replaceChildren(whole, make("p", "small", fate), list);
  }
}

const at = (item) => [LEFT + COLUMN * item.depth, TOP + ROW * item.row];

function legend() {
  const entries = Object.entries(SIGNS).map(([name, sign]) => {
    const svg = shape("svg", { width: 22, height: 22, "aria-hidden": "true", class: name });
    svg.append(shape("circle", { class: "dot", cx: 11, cy: 11, r: 9 }), shape("text", { class: "sign", x: 11, y: 16 }, sign));
    return make("li", "", svg, MEANING[name]);
  });
  const lines = [["chosen", "✓ committed here"], ["later", "› committed later"]].map(([name, text]) => {
    const svg = shape("svg", { width: 30, height: 12, "aria-hidden": "true" });
    svg.append(shape("path", { class: `edge ${name}`, d: "M0 6H30" }));
    return make("li", "", svg, text);
  });
  $("legend").replaceChildren(make("li", "", "Value:"), ...entries, ...lines, make("li", "", "Large circles, thick lines: many visits"),
    make("li", "", "%: prior among its siblings"));
}
