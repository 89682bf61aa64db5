// Shared by all widgets: Python puts this file before each widget's own script, and both are one module.
"use strict";

// An element with attributes and children. Texts are always set as text: what a prompt says is never read as HTML.
// Attributes beginning with "on" are listeners; "class", "style" and "data-..." are what HTML calls them.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "line", "circle", "text", "polyline", "polygon", "title", "defs", "pattern"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  // JupyterLab takes arrow keys, Enter and letters for its own commands, unless what has the focus says not to.
  if (["input", "button", "select", "textarea", "summary"].includes(tag) || "tabindex" in attributes)
    node.setAttribute("data-lm-suppress-shortcuts", "true");
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  // In a cell JupyterLab also forbids the line break of Shift+Enter, by a listener that comes after this one.
  if (tag === "textarea") node.addEventListener("beforeinput", event => event.stopImmediatePropagation());
  node.append(...children.flat().filter(child => child !== undefined && child !== null).map(child =>
    child instanceof Node ? child : document.createTextNode(String(child))));
  return node;
}

// The arrays that Python kept, by name: { shape, values }, where values is a typed array; floats may hold NaN or -Infinity.
function unpack(model) {
  const data = model.get("data"), found = {};
  for (const [name, about] of Object.entries(model.get("arrays") || {})) {
    const Kind = { u1: Uint8Array, u2: Uint16Array, i2: Int16Array, i4: Int32Array }[about.kind];
    const size = about.shape.reduce((a, b) => a * b, 1);
    const from = data.byteOffset + about.start;
    let values = new Kind(data.buffer.slice(from, from + size * Kind.BYTES_PER_ELEMENT));
    if (about.step !== null) {
      const whole = values;
      values = new Float32Array(size);
      for (let at = 0; at < size; at++)
        values[at] = whole[at] === -32768 ? -Infinity : whole[at] === 32767 ? NaN : whole[at] * about.step;
    }
    found[name] = { shape: about.shape, values };
  }
  return found;
}

// Models whose kernel was restarted or shut down since.
const gone = new WeakSet();
const GONE = "Python no longer answers: its kernel was restarted or shut down. What is shown stays; run the cell again for the rest.";

// The widget's outermost element, in the light or dark theme of JupyterLab, VS Code or the browser, under which a note says
// what is missing or went wrong. Call it once in `render`, and append everything to what it returns.
function frame(model, el, name) {
  const root = make("div", { class: "mixtral-lab " + name });
  const note = make("p", { class: "notice", role: "status" });
  const say = () => {
    note.textContent = [model.get("notice"), gone.has(model) ? model.lost ?? GONE : ""].filter(Boolean).join(" ");
    note.hidden = !note.textContent;
  };
  const dark = () => {
    const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
    if (jpThemeLight !== undefined) return jpThemeLight === "false";
    if (vscodeThemeKind !== undefined) return /dark|high-contrast$/.test(vscodeThemeKind);
    return matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const paint = () => { root.dataset.theme = dark() ? "dark" : "light"; };
  new MutationObserver(paint).observe(document.body, { attributes: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  model.on("change:notice", say);
  model.on("comm_live_update", () => { gone.add(model); say(); });
  paint();
  say();
  root.append(note);
  el.append(root);
  for (const fallback of document.querySelectorAll("[data-mixtral-lab-fallback]"))
    if (fallback.dataset.mixtralLabFallback === model.get("name"))
      (fallback.closest(".jp-OutputArea-child") || fallback).style.display = "none";
  return root;
}

// Whether Python hears what the widget says: not in a saved page, and no more once the kernel is gone.
function answers(model) { return !model.alone && !gone.has(model); }

// Set traits by name and let Python know.
function put(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
}

const percent = share => Number.isNaN(share) ? "an unrecorded share" : share > 0 && share < 0.005 ? "<\u00a01\u00a0%" : Math.round(100 * share) + "\u00a0%";
const fixed = (value, digits = 2) => value === -Infinity ? "−∞" : Number.isNaN(value) ? "–" : value.toFixed(digits).replace("-", "−");
const many = (n, noun) => n.toLocaleString("en") + " " + noun + (n === 1 ? "" : "s");
const quoted = token => "“" + token + "”";

// A small chip in an expert's colour.
function chip(model, expert, text = "expert\u00a0" + expert) {
  const [colour, ink] = model.get("colours")[expert] || ["#888888", "#000000"];
  return make("span", { class: "chip", style: `background:${colour};color:${ink}` }, text);
}

// A labelled slider with its value beside it. `oninput` gets the number; `show` puts it into words. Set it with .put(value).
function slider({ label, min, max, step = 1, value, oninput, show = String }) {
  const said = make("output", {}, show(value));
  const input = make("input", { type: "range", min, max, step, "aria-label": label });
  const put = value => {
    input.value = value;
    said.textContent = show(Number(input.value));
    input.setAttribute("aria-valuetext", said.textContent);
  };
  input.addEventListener("input", () => { put(Number(input.value)); oninput(Number(input.value)); });
  const whole = make("label", { class: "slider" }, make("span", {}, label), input, said);
  put(value);
  return Object.assign(whole, { put, input });
}

// Words that follow the pointer (or a focused cell) inside `root`: tip.show("text", x, y) in page coordinates, tip.hide().
function hoverWords(root) {
  const tip = make("div", { class: "tip", hidden: true });
  root.append(tip);
  return {
    show(text, x, y) {
      tip.textContent = text;
      tip.hidden = false;
      const wide = tip.offsetWidth, high = tip.offsetHeight;
      tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - wide - 4)) + "px";
      tip.style.top = (y + 18 + high > innerHeight ? y - high - 8 : y + 18) + "px";
    },
    hide() { tip.hidden = true; },
  };
}

