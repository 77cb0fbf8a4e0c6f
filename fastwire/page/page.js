// The live page: asks for the status every second while somebody looks, and draws what changed. All text is set as
// text, never as HTML: names come from clients.
"use strict";

const POINTS = 60; // of a curve
const INTERVAL = 1000; // ms between looks, longer when an answer takes long
const FEW = 6; // kernels whose clients are shown unasked
const SHORT_LIST = 3; // events shown unasked where the list stands above the kernels

const STATES = ["slow", "paused", "resuming", "fine", "away", "none"]; // the first needs attention most
const EXECUTION = ["busy", "idle", "other"];
const KINDS = {
  slow: "Slow client",
  paused: "Client paused",
  resume: "Client came back",
  expired: "Session ended",
  late: "Came too late",
  unsent: "Requests lost",
  unproven: "Not heard",
  drop: "Output dropped",
  no_buffers: "No buffers",
  gateway: "Gateway lost",
  refused: "Messages refused",
  overflow: "Client given up",
  too_long: "Message too long",
  stalled: "Client took nothing",
  demoted: "Client answers no pings",
};

const byId = (id) => document.getElementById(id);

// -- numbers as text --

const count = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });

function rateText(value) {
  return value > 0 && value < 10 ? short.format(value) : count.format(value);
}

function bytesText(value) {
  let unit = 0;
  while (value >= 999.5 && unit < 4) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit && value < 99.5 ? (value < 9.95 ? value.toFixed(1) : value.toFixed(0)) : value.toFixed(0);
  return `${digits} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

function secondsText(value) {
  if (value === null) return "–";
  if (value < 0.001) return `${short.format(value * 1e6)} µs`;
  if (value < 1) return `${short.format(value * 1e3)} ms`;
  return value < 60 ? `${short.format(value)} s` : `${count.format(value / 60)} min`;
}

function agoText(seconds) {
  if (seconds < 5) return "now";
  if (seconds < 90) return `${count.format(seconds)} s ago`;
  if (seconds < 5400) return `${count.format(seconds / 60)} min ago`;
  return seconds < 129600 ? `${count.format(seconds / 3600)} h ago` : `${count.format(seconds / 86400)} days ago`;
}

// -- elements --

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A curve of the last values; those before the page was opened are left empty.
class Curve {
  constructor(parent) {
    const namespace = "http://www.w3.org/2000/svg";
    this.values = [];
    this.svg = document.createElementNS(namespace, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 100`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("aria-hidden", "true");
    this.area = this.svg.appendChild(document.createElementNS(namespace, "path"));
    this.line = this.svg.appendChild(document.createElementNS(namespace, "path"));
    this.area.setAttribute("class", "area");
    this.line.setAttribute("class", "line");
    parent.append(this.svg);
  }

  add(value) {
    this.values.push(value ?? 0);
    if (this.values.length > POINTS) this.values.shift();
  }

  draw() {
    const top = Math.max(...this.values, 1e-9) * 1.1;
    const first = POINTS - this.values.length;
    const steps = this.values.map((value, i) => `${first + i} ${(97 - (value / top) * 94).toFixed(1)}`);
    const line = `M${steps.join("L")}`;
    this.line.setAttribute("d", steps.length > 1 ? line : "");
    this.area.setAttribute("d", steps.length > 1 ? `${line}L${POINTS - 1} 100L${first} 100Z` : "");
  }
}

// A value with its curve.
class Measure {
  constructor(cell, format) {
    const box = cell.appendChild(make("div", "measure"));
    this.curve = new Curve(box.appendChild(make("div", "curve")));
    this.value = box.appendChild(make("span", "value"));
    this.format = format;
  }

  add(value) {
    this.curve.add(value);
    setText(this.value, this.format(value));
    this.value.classList.toggle("still", !value);
  }
}

// A row of the table: a kernel or a client.
class Row {
  constructor(kind) {
    this.element = make("tr", kind);
    this.element.setAttribute("role", "row");
    const cell = (name) => {
      const element = this.element.appendChild(make("td", name));
      element.setAttribute("role", "cell");
      return element;
    };
    const who = cell("who");
    if (kind === "kernel") this.button = who.appendChild(make("button"));
    this.dot = who.appendChild(make("span", "dot"));
    this.name = who.appendChild(make("span"));
    who.append(" ");
    this.id = who.appendChild(make("code"));
    const state = cell("state");
    this.state = state.appendChild(make("span"));
    this.note = state.appendChild(make("span"));
    this.measures = {
      rate: new Measure(cell("rate"), rateText),
      latency: new Measure(cell("latency"), secondsText),
      kept: new Measure(cell("kept"), bytesText),
    };
    this.spilled = cell("spilled");
    this.fresh = true;
    this.last = null;
  }

  // ``words``: of the state, [class, text] each; the second may be missing.
  update(name, id, dot, words, now) {
    setText(this.name, name);
    setText(this.id, id);
    this.dot.className = `dot ${dot}`;
    [this.state, this.note].forEach((element, i) => {
      const [word, text] = words[i] ?? ["", ""];
      element.className = `word ${word}`;
      setText(element, i && text ? `, ${text}` : text);
    });
    this.now = now;
    for (const [key, measure] of Object.entries(this.measures)) measure.add(now[key]);
    setText(this.spilled, now.spilled ? bytesText(now.spilled) : "–");
    this.spilled.classList.toggle("none", !now.spilled);
  }

  draw() {
    for (const measure of Object.values(this.measures)) measure.curve.draw();
  }
}

// -- from one look to the next --

// What counters gained per second; a counter that ran backwards began anew.
function gained(now, before, seconds) {
  if (before === undefined || seconds <= 0) return 0;
  return (now >= before ? now - before : now) / seconds;
}

function gainedOf(row, values, seconds) {
  const result = {};
  for (const [key, value] of Object.entries(values)) {
    result[key] = gained(value, row.last?.[key], seconds);
  }
  row.last = values;
  return result;
}

// The value below which a part of the messages stayed, from the gain of a histogram.
function quantile(bounds, counts, part) {
  const total = counts.reduce((sum, n) => sum + n, 0);
  if (!total) return null;
  let left = total * part;
  for (let i = 0; i < counts.length; i += 1) {
    if (counts[i] >= left) {
      const low = i ? bounds[i - 1] : 0;
      return i < bounds.length ? low + ((bounds[i] - low) * left) / counts[i] : low;
    }
    left -= counts[i];
  }
  return bounds[bounds.length - 1];
}

const rows = new Map(); // by key: "kernel", "kernel/client"
const opened = new Map(); // kernels whose clients somebody has shown or hidden
const curves = {};
for (const name of ["rate", "bytes", "latency", "kept"]) curves[name] = new Curve(byId(`${name}-curve`));
let before = null; // the last answer
let shownStatus = null;

function rowOf(key, kind) {
  if (!rows.has(key)) rows.set(key, new Row(kind));
  const row = rows.get(key);
  row.seen = true;
  return row;
}

function clientNumbers(key, client, seconds) {
  const row = rowOf(key, "client");
  const gain = gainedOf(row, { messages: client.sent_messages, time: client.flush_seconds }, seconds);
  const now = {
    rate: gain.messages,
    latency: gain.messages ? gain.time / gain.messages : null,
    time: gain.time,
    kept: client.behind_bytes,
    spilled: 0, // its kernel's line has it
  };
  const held = client.state === "paused" ? [["paused", `${bytesText(client.uplink_bytes)} held`]] : [];
  row.update(client.client, client.protocol, client.state, [[client.state, client.state], ...held], now);
  return now;
}

// Bytes in memory that somebody does not have yet; what all have is kept as history.
function waiting(kernel) {
  return Math.max((kernel.kept_bytes ?? 0) - (kernel.history_bytes ?? 0), 0);
}

function runsText(runs) {
  return runs ? `${count.format(runs)} ${runs === 1 ? "run" : "runs"}` : "";
}

function total(kernels, value) {
  return kernels.reduce((sum, kernel) => sum + value(kernel), 0);
}

function worst(states) {
  return STATES.find((state) => states.includes(state)) ?? "none";
}

function kernelNumbers(kernel, seconds) {
  const row = rowOf(kernel.id, "kernel");
  const clients = kernel.clients ?? [];
  const keys = clients.map((client) => `${kernel.id}/${client.client}`);
  const parts = clients.map((client, i) => clientNumbers(keys[i], client, seconds));
  const sum = (key) => parts.reduce((total, part) => total + part[key], 0);
  const sent = sum("rate");
  const now = {
    rate: gainedOf(row, { messages: kernel.messages ?? 0 }, seconds).messages,
    latency: sent ? sum("time") / sent : null,
    // Once, however many of its clients wait for it.
    kept: waiting(kernel),
    spilled: kernel.spilled_bytes ?? 0,
  };
  const state = worst(clients.map((client) => client.state));
  row.clientKeys = keys;
  row.search = [kernel.name, kernel.id, kernel.execution_state, ...clients.flatMap((c) => [c.client, c.state])]
    .join(" ").toLowerCase();
  row.severity = STATES.indexOf(state);
  const execution = kernel.execution_state ?? "unknown";
  const id = [kernel.id.slice(0, 8), kernel.path, runsText(kernel.runs)].filter(Boolean).join(" \u00b7 ");
  row.update(kernel.name, id, state, [[execution, execution], clientsWords(clients, state)], now);
  return now;
}

function clientsWords(clients, state) {
  if (["fine", "none"].includes(state)) return ["", clients.length === 1 ? "1 client" : `${clients.length} clients`];
  const n = clients.filter((client) => client.state === state).length;
  return [state, clients.length > 1 ? `${n} ${state}` : state];
}

// -- drawing --

function drawTiles(status, seconds) {
  const traffic = status.traffic;
  const was = before?.traffic ?? {};
  const rate = gained(traffic.to_clients_messages, was.to_clients_messages, seconds);
  const bytes = gained(traffic.to_clients_bytes, was.to_clients_bytes, seconds);
  const { bounds, counts } = status.time_to_flush;
  const gain = counts.map((n, i) => Math.max(n - (before ? before.time_to_flush.counts[i] : n), 0));
  const clients = status.kernels.flatMap((kernel) => kernel.clients ?? []);
  const kept = total(status.kernels, waiting);
  const spilled = total(status.kernels, (kernel) => kernel.spilled_bytes ?? 0);
  const history = total(status.kernels, (kernel) => kernel.history_bytes ?? 0);
  const p99 = quantile(bounds, gain, 0.99);
  const values = { rate, bytes, latency: p99, kept: kept + spilled };
  for (const [name, value] of Object.entries(values)) {
    curves[name].add(value);
    curves[name].draw();
  }
  const asked = gained(traffic.from_clients_messages, was.from_clients_messages, seconds);
  const said = gained(traffic.from_kernels_bytes, was.from_kernels_bytes, seconds);
  tile("rate", rateText(rate), `${rateText(asked)} /s from clients`);
  tile("bytes", bytesText(bytes), `${bytesText(said)} /s from kernels`);
  tile("latency", secondsText(quantile(bounds, gain, 0.5)), p99 === null ? "no messages" : `99 % within ${secondsText(p99)}`);
  const behind = clients.filter((client) => client.behind_messages).length;
  const where = spilled ? `${bytesText(spilled)} on disk` : "nothing on disk";
  const whom = behind ? `, for ${behind} of ${count.format(clients.length)}` : "";
  tile("kept", bytesText(kept + spilled), `${where}${whom}${history ? `; history ${bytesText(history)}` : ""}`);
  const states = status.kernels.map((kernel) => (EXECUTION.includes(kernel.execution_state) ? kernel.execution_state : "other"));
  const runs = runsText(total(status.kernels, (kernel) => kernel.runs ?? 0));
  tile("kernels", count.format(states.length), [notesOf(states, EXECUTION, "idle") || "none running", runs].filter(Boolean).join("; "));
  tile("clients", count.format(clients.length), notesOf(clients.map((client) => client.state), STATES, "fine"));
  drawParts(states, "kernels", EXECUTION);
  drawParts(clients.map((client) => client.state), "clients", STATES);
  const troubled = clients.filter((client) => ["slow", "paused"].includes(client.state)).length;
  document.title = troubled ? `(${troubled}) fastwire` : "fastwire";
}

function tile(name, value, note) {
  setText(byId(name), value);
  setText(byId(`${name}-note`), note);
}

// "2 slow, 1 away"; "all fine" where there is nothing else.
function notesOf(words, order, usual) {
  const numbers = order.map((word) => [words.filter((each) => each === word).length, word]);
  const few = numbers.filter(([n, word]) => n && word !== usual).map(([n, word]) => `${n} ${word}`);
  return few.length || !words.length ? few.join(", ") : `all ${usual}`;
}

function drawParts(words, name, order) {
  const box = byId(`${name}-parts`);
  box.replaceChildren();
  for (const word of order) {
    const n = words.filter((each) => each === word).length;
    if (n) box.append(make("span", word));
    if (n) box.lastChild.style.flexGrow = n;
  }
}

const orders = {
  attention: (a, b) => a.severity - b.severity || byName(a, b),
  rate: (a, b) => b.now.rate - a.now.rate || byName(a, b),
  latency: (a, b) => (b.now.latency ?? -1) - (a.now.latency ?? -1) || byName(a, b),
  kept: (a, b) => b.now.kept + b.now.spilled - a.now.kept - a.now.spilled || byName(a, b),
  name: byName,
};

function byName(a, b) {
  return a.name.textContent.localeCompare(b.name.textContent) || a.id.textContent.localeCompare(b.id.textContent);
}

function isOpen(id, kernels) {
  if (opened.has(id)) return opened.get(id);
  return byId("expand").getAttribute("aria-pressed") === "true" || kernels <= FEW;
}

function drawTable(status) {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kernels = status.kernels.map((kernel) => rows.get(kernel.id));
  const wanted = kernels.filter((row) => words.every((word) => row.search.includes(word)));
  wanted.sort(orders[byId("order").value]);
  const ids = new Map(status.kernels.map((kernel) => [rows.get(kernel.id), kernel.id]));
  const elements = [];
  for (const row of wanted) {
    const id = ids.get(row);
    const open = isOpen(id, status.kernels.length);
    row.button.setAttribute("aria-expanded", open);
    row.button.setAttribute("aria-label", `Clients of ${row.name.textContent} ${row.id.textContent}`);
    row.button.hidden = !row.clientKeys.length;
    row.element.dataset.id = id;
    for (const each of [row, ...(open ? row.clientKeys.map((key) => rows.get(key)) : [])]) {
      each.draw();
      elements.push(each.element);
    }
  }
  place(byId("rows"), elements);
  const all = status.kernels.length;
  setText(byId("shown"), wanted.length === all ? `${all}` : `${wanted.length} of ${all}`);
  byId("no-kernels").hidden = wanted.length > 0;
  setText(byId("no-kernels"), all ? "No kernel is like that." : "No kernel is running.");
}

// Children in this order; those that stand right already are left alone, so that focus and selection stay.
function place(parent, elements) {
  const wanted = new Set(elements);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  elements.forEach((element, i) => {
    if (parent.children[i] !== element) parent.insertBefore(element, parent.children[i] ?? null);
  });
}

function drawEvents(status) {
  const names = new Map(status.kernels.map((kernel) => [kernel.id, kernel.name]));
  const all = byId("all-events").getAttribute("aria-pressed") === "true";
  const room = window.matchMedia("(min-width: 1241px)").matches ? 25 : SHORT_LIST;
  const shown = all ? status.events : status.events.slice(0, room);
  byId("events").replaceChildren(...shown.map((event) => eventItem(event, names, status.time)));
  byId("no-events").hidden = status.events.length > 0;
  const button = byId("all-events");
  button.hidden = status.events.length <= room;
  setText(button, all ? "Fewer" : `All ${status.events.length}`);
}

function eventItem(event, names, now) {
  const item = make("li");
  const kind = item.appendChild(make("span", `kind ${event.kind}`, KINDS[event.kind] ?? event.kind.replaceAll("_", " ")));
  kind.title = shownStatus.kinds[event.kind] ?? "";
  const times = event.times > 1 ? `${count.format(event.times)} times, ` : "";
  const when = item.appendChild(make("time", "when", times + agoText(now - event.last)));
  when.dateTime = new Date(event.last * 1000).toISOString();
  when.title = new Date(event.last * 1000).toLocaleString();
  item.append(make("p", "text", event.text));
  const about = item.appendChild(make("p", "about"));
  if (event.kernel) about.append(`${names.get(event.kernel) ?? "kernel"} `, make("code", "", event.kernel.slice(0, 8)));
  if (event.kernel && event.client) about.append(", ");
  if (event.client) about.append("client ", make("code", "", event.client));
  return item;
}

function redraw() {
  if (!shownStatus) return;
  drawTable(shownStatus);
  drawEvents(shownStatus);
}

function show(status) {
  const seconds = before ? status.time - before.time : 0;
  for (const row of rows.values()) row.seen = false;
  for (const kernel of status.kernels) kernelNumbers(kernel, seconds);
  for (const [key, row] of rows) if (!row.seen) rows.delete(key);
  shownStatus = status;
  setText(byId("version"), status.version);
  drawTiles(status, seconds);
  redraw();
  before = status;
}

// -- looking --

function tell(state, text) {
  const link = byId("link");
  link.className = `link ${state}`;
  setText(link, text);
}

async function look() {
  const response = await fetch("fastwire/api/status", { credentials: "same-origin", cache: "no-store" });
  if (response.status === 403 || response.status === 401) throw new Error("signed out: reload the page");
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  show(await response.json());
}

async function lookOn() {
  let pause = INTERVAL;
  if (!document.hidden) {
    const started = performance.now();
    try {
      await look();
      tell("live", "live");
      pause = Math.max(INTERVAL, 10 * (performance.now() - started));
    } catch (error) {
      tell("lost", error instanceof TypeError ? "no answer from the server" : error.message);
      pause = 3 * INTERVAL;
    }
  } else {
    tell("waiting", "resting");
  }
  window.setTimeout(lookOn, pause);
}

function toggle(button) {
  button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
}

byId("filter").addEventListener("input", redraw);
byId("order").addEventListener("change", redraw);
byId("expand").addEventListener("click", () => {
  toggle(byId("expand"));
  opened.clear();
  redraw();
});
byId("all-events").setAttribute("aria-pressed", "false");
byId("all-events").addEventListener("click", () => {
  toggle(byId("all-events"));
  redraw();
});
byId("rows").addEventListener("click", (event) => {
  const id = event.target.closest("tr.kernel")?.dataset.id;
  if (id === undefined) return;
  opened.set(id, !isOpen(id, shownStatus.kernels.length));
  redraw();
});

// A token in the address has done its work: the server has set a cookie.
const address = new URL(window.location.href);
if (address.searchParams.has("token")) {
  address.searchParams.delete("token");
  window.history.replaceState(null, "", address);
}

lookOn();
