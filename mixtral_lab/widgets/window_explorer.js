// WindowExplorer: sliding-window attention. Python sends the pattern of a layer's heads; everything else is computed here.
const VIEWS = [
  ["mask", "Mask"], ["pattern", "Attention pattern"], ["reach", "Reach through layers"], ["ring", "Rolling cache"], ["prefill", "Chunked prefill"],
];
const STRIP = 100; // tokens of the text shown at once
const count = n => n.toLocaleString("en");
const shorten = (text, most) => [...text].length > most ? [...text].slice(0, most - 1).join("") + "…" : text;

// The first token that a query sees: with a window of 8, token 17 sees 10 to 17.
const firstSeen = (position, window) => window === null ? 0 : Math.max(0, position - window + 1);
const sees = (query, key, window) => key <= query && (window === null || query - key < window);
// The first token of which a position can hold something after so many layers.
const firstReached = (position, layers, window) => layers === 0 ? position : window === null ? 0 : Math.max(0, position - layers * (window - 1));
// After how many layers that is token 0; null: never.
const layersToFirst = (position, window) =>
  window === null || window > position ? Math.min(position, 1) : window === 1 ? null : Math.ceil(position / (window - 1));

// The chunk in which a position is read, and the keys that the cache holds by then: from `cached` up to `start`.
function chunkOf(position, { chunk, window, length }) {
  const start = position - position % chunk, end = Math.min(start + chunk, length);
  return { number: start / chunk, start, end, cached: window === null ? 0 : Math.max(0, start - window) };
}

// Scores computed when the whole text is read in chunks.
function prefillPairs({ chunk, window, length }) {
  let pairs = 0;
  for (let start = 0; start < length; start += chunk) {
    const size = Math.min(chunk, length - start);
    pairs += size * (Math.min(start, window === null ? start : window) + size);
  }
  return pairs;
}

function inBytes(n) {
  const unit = ["bytes", "kB", "MB", "GB", "TB"].findIndex((_, power) => n < 1000 ** (power + 1));
  const value = n / 1000 ** unit;
  return (unit && value < 100 ? value.toFixed(value < 10 ? 2 : 1) : count(Math.round(value))) + "\u00a0" + ["bytes", "kB", "MB", "GB", "TB"][unit];
}

// The pattern that Python sent: one row (of the keys in the recorded window) for each query, and blocks of a long text.
function patternOf(model) {
  const { exact, queries, overview } = unpack(model), { layer, heads = [], block = 1 } = model.get("held");
  const { window, length } = { window: model.get("facts").window, length: model.get("length") };
  const starts = new Int32Array(length).fill(-1);
  let size = 0;
  for (const query of queries ? queries.values : []) {
    starts[query] = size;
    size += query - firstSeen(query, window) + 1;
  }
  const at = heads.map((_, n) => n * size);
  return {
    layer, heads, block, window,
    // The weights of one query, from its first key on; undefined if they are not here.
    row(head, query) {
      const n = heads.indexOf(head);
      if (n < 0 || starts[query] < 0) return undefined;
      const first = firstSeen(query, window), from = at[n] + starts[query];
      return { first, weights: exact.values.subarray(from, from + query - first + 1) };
    },
    // The largest weight of the block that a cell is in.
    coarse(query, key) {
      return overview ? overview.values[Math.floor(query / block) * overview.shape[1] + Math.floor(key / block)] : NaN;
    },
  };
}

// "#RRGGBB" as the number that a canvas keeps for a pixel.
const pixel = ([r, g, b]) => (255 << 24 | b << 16 | g << 8 | r) >>> 0;
const rgb = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
const mixed = (from, to, share) => from.map((part, at) => Math.round(part + (to[at] - part) * share));

function theme(root) {
  const style = getComputedStyle(root), found = {};
  for (const name of ["paper", "card", "ink", "soft", "rule", "mark", "accent", "seen", "faint", "past", "future", "now", "dim", "out", "low", "high"]) {
    const text = style.getPropertyValue("--" + name).trim();
    found[name] = { text, rgb: rgb(text), pixel: pixel(rgb(text)) };
  }
  found.scale = Uint32Array.from({ length: 256 }, (_, step) => pixel(mixed(found.low.rgb, found.high.rgb, step / 255)));
  return found;
}

// A canvas for so many pixels of the page, sharp on any screen.
function sized(canvas, width, height) {
  const dots = Math.max(1, devicePixelRatio || 1);
  canvas.width = Math.round(width * dots);
  canvas.height = Math.round(height * dots);
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.setTransform(dots, 0, 0, dots, 0, 0);
  return { pen, dots };
}

// Queries downwards, keys to the right, `from` up to `to` of both; `shade(query)` gives a function from key to pixel.
function paintCells(pen, dots, { left, top, side, from, to, shade, gap }) {
  const size = Math.round(side * dots), many = to - from, image = pen.createImageData(size, size);
  const dotted = new Uint32Array(image.data.buffer), spaced = gap !== undefined && side / many >= 7;
  const at = Int32Array.from({ length: size }, (_, dot) => from + Math.floor(dot * many / size));
  let previous = -1;
  for (let y = 0; y < size; y++) {
    const start = y * size;
    if (spaced && y && at[y] !== at[y - 1]) {
      dotted.fill(gap, start, start + size);
      previous = -1;
      continue;
    }
    if (at[y] === previous) {
      dotted.copyWithin(start, start - size, start);
      continue;
    }
    previous = at[y];
    const colour = shade(at[y]);
    let last = -1, value = 0;
    for (let x = 0; x < size; x++) {
      if (at[x] !== last) {
        last = at[x];
        value = colour(last);
        if (spaced && x) { dotted[start + x] = gap; continue; }
      }
      dotted[start + x] = value;
    }
  }
  pen.putImageData(image, Math.round(left * dots), Math.round(top * dots));
}

// Round numbers between two positions, about so many.
function ticks(from, to, about) {
  const rough = (to - from) / about, ten = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const step = Math.max(1, [1, 2, 5, 10].map(by => by * ten).find(by => by >= rough) || 1);
  const found = [];
  for (let at = Math.ceil(from / step) * step; at < to; at += step) found.push(at);
  return found;
}

// A slider with a box for the exact number.
function dial({ label, min = 0, max, value, oninput, help }) {
  const range = make("input", { type: "range", min, max, "aria-label": label, title: help });
  const box = make("input", { type: "number", min, max, "aria-label": label + ", as a number", title: help });
  const heard = value => {
    if (!Number.isFinite(value)) return;
    value = Math.round(Math.min(Math.max(value, Number(range.min)), Number(range.max)));
    put(value);
    oninput(value);
  };
  const put = value => { range.value = value; box.value = value; };
  range.addEventListener("input", () => heard(Number(range.value)));
  box.addEventListener("change", () => heard(box.value === "" ? NaN : Number(box.value)));
  const whole = make("label", { class: "slider" }, make("span", {}, label), range, box);
  put(value);
  return Object.assign(whole, {
    put, range, box,
    limits(low, high) { for (const input of [range, box]) { input.min = low; input.max = high; } },
    disable(off) { range.disabled = box.disabled = off; },
  });
}

// Colours and what they mean.
const legend = (...entries) => make("ul", { class: "legend" }, entries.map(([name, words, kind = ""]) =>
  make("li", {}, make("span", { class: "swatch " + kind, style: `background:var(--${name})` }), words)));

function render({ model, el }) {
  const root = frame(model, el, "window-explorer");
  const facts = model.get("facts"), tokens = facts.tokens, real = tokens.length > 0;
  const tip = hoverWords(root);
  const now = () => Object.fromEntries(["view", "window", "chunk", "position", "layer", "head", "length"].map(name => [name, model.get(name)]));
  const select = values => put(model, values);
  const named = position => `token\u00a0${count(position)}` + (real ? " " + quoted(shorten(tokens[position], 24)) : "");
  const label = position => real ? shorten(tokens[position], 11) + " " + position : String(position);
  const capital = text => text[0].toUpperCase() + text.slice(1);
  const tokensTo = (first, last) => first === last ? `token ${count(first)}` : `tokens ${count(first)} to ${count(last)}`;
  let colours, span = 0; // span: tokens shown around the selected one; 0: all

  // ---- Controls
  const most = () => Math.max(now().length, facts.window || 1);
  const windowDial = dial({
    label: "Window", min: 1, max: most(), value: 1, oninput: window => select({ window }),
    help: "How many keys a token sees, itself included",
  });
  const noWindow = make("input", { type: "checkbox", "aria-label": "no window: see everything before" });
  noWindow.addEventListener("change", () => select({ window: noWindow.checked ? null : Number(windowDial.range.value) }));
  const asModel = make("button", { onclick: () => select({ window: facts.window }) });
  const chunkDial = dial({
    label: "Chunk", min: 1, max: most(), value: 1, oninput: chunk => select({ chunk }), help: "How many tokens prefill reads at once",
  });
  const positionDial = dial({
    label: "Position", max: 0, value: 0, oninput: position => { stop(); select({ position }); }, help: "The selected token, the query",
  });
  const lengthDial = dial({
    label: "Tokens", min: 1, max: facts.most, value: 1, help: "How long the imagined text is",
    oninput: length => select({ length, position: Math.min(now().position, length - 1) }),
  });
  const step = by => select({ position: Math.min(Math.max(now().position + by, 0), now().length - 1) });
  const play = make("button", { class: "play", onclick: () => timer === null ? start() : stop() });
  let timer = null;
  const start = () => {
    if (now().position >= now().length - 1) select({ position: 0 });
    timer = setInterval(() => {
      if (!root.isConnected || now().position >= now().length - 1) stop();
      else step(1);
    }, 600);
    play.textContent = "❚❚ Pause";
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ Play";
  };
  stop();
  const zoom = make("select", { "aria-label": "how much of the text is shown", onchange: () => { span = Number(zoom.value); draw(); } });
  const zoomed = make("label", { class: "slider" }, make("span", {}, "Show"), zoom);
  root.append(
    make("div", { class: "row controls" },
      make("span", { class: "pair" }, windowDial, make("label", { class: "slider" }, noWindow, "none"), facts.window ? asModel : null),
      make("span", { class: "pair" }, positionDial,
        make("button", { "aria-label": "one token back", onclick: () => { stop(); step(-1); } }, "◂"),
        make("button", { "aria-label": "one token on", onclick: () => { stop(); step(1); } }, "▸"), play),
      chunkDial, real ? null : lengthDial, zoomed));

  // ---- Tabs
  const tabs = VIEWS.map(([view, words]) => make("button", {
    role: "tab", onclick: () => select({ view }), "data-view": view,
  }, words));
  const tablist = make("div", { class: "row tabs", role: "tablist", "aria-label": "what is shown", onkeydown: event => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const at = (VIEWS.findIndex(([view]) => view === now().view) + by + VIEWS.length) % VIEWS.length;
    select({ view: VIEWS[at][0] });
    tabs[at].focus();
    event.preventDefault();
  } }, tabs);
  const said = make("p", { class: "said", role: "status" });
  const strip = make("div", { class: "tokens strip", dir: "auto" });
  const panel = make("div", { class: "panel", role: "tabpanel" });
  root.append(tablist, said, strip, panel);

  // ---- The text: what each token is to the selected one depends on the panel
  const kinds = {
    mask: (key, { position, window }) => key > position ? "future" : sees(position, key, window) ? "seen" : "past",
    reach: (key, { position, window }) => key > position ? "future" : key >= firstReached(position, facts.layers, window) ? "seen" : "past",
    ring: (key, { position, window }) => key > position ? "future" : window !== null && key === position - window ? "out" : sees(position, key, window) ? "seen" : "past",
    prefill: (key, s) => {
      const { start, end, cached } = chunkOf(s.position, s);
      return key >= end ? "future" : key >= start ? "now" : key >= cached ? "seen" : "past";
    },
  };
  const meanings = {
    mask: { future: "comes later, not seen", seen: "seen", past: "past the window, not seen" },
    reach: { future: "comes later", seen: "within reach through all layers", past: "out of reach" },
    ring: { future: "not read yet", seen: "in the cache", past: "evicted earlier", out: "evicted just now" },
    prefill: { future: "not read yet", seen: "in the cache", now: "in the current chunk", past: "past the cache: never touched" },
  };

  function drawStrip(s) {
    const from = Math.max(0, Math.min(s.position - Math.floor(STRIP * 0.7), s.length - STRIP)), to = Math.min(s.length, from + STRIP);
    const row = s.view === "pattern" ? pattern().row(s.head, s.position) : undefined, held = pattern().layer === s.layer;
    const parts = [];
    strip.hidden = !real && s.length > STRIP;
    if (strip.hidden) return;
    if (from) parts.push(make("span", { class: "soft" }, `… ${many(from, "token")} before `));
    for (let at = from; at < to; at++) {
      const weight = row && held && at >= row.first && at <= s.position ? row.weights[at - row.first] : undefined;
      const kind = s.view === "pattern" ? (weight !== undefined ? "weight" : at > s.position ? "future" : row ? "past" : "unknown") : kinds[s.view](at, s);
      const text = real ? tokens[at].replaceAll("␣", " ") : ` ${at} `;
      const meaning = kind === "weight" ? `gets ${percent(weight)} of the attention` : kind === "unknown" ? "its weight is not here" : (meanings[s.view] || meanings.mask)[kind];
      const span = make("span", {
        class: `token ${kind}` + (at === s.position ? " chosen" : ""), "data-at": at, title: `${named(at)}: ${at === s.position ? "the selected token" : meaning}`,
      }, text);
      if (kind === "weight") {
        const share = Math.sqrt(weight), colour = mixed(colours.low.rgb, colours.high.rgb, share);
        span.style.background = `rgb(${colour})`;
        span.style.color = colour[0] * 0.3 + colour[1] * 0.59 + colour[2] * 0.11 > 125 ? "#000" : "#fff";
      }
      parts.push(span);
      if (real && tokens[at].includes("⏎")) parts.push(make("br"));
    }
    if (to < s.length) parts.push(make("span", { class: "soft" }, ` … ${many(s.length - to, "token")} after`));
    strip.replaceChildren(...parts);
  }
  strip.addEventListener("click", event => {
    const at = event.target.dataset && event.target.dataset.at;
    if (at !== undefined) { stop(); select({ position: Number(at) }); }
  });

  // ---- What the grids share
  let known = null;
  const pattern = () => {
    const data = model.get("data"), held = model.get("held");
    if (!known || known.data !== data || known.held !== held) known = { data, held, pattern: patternOf(model) };
    return known.pattern;
  };

  // The tokens that fit on the screen at the chosen zoom, the selected one among them.
  function shown(s) {
    const wide = span && span < s.length ? span : s.length;
    const from = Math.max(0, Math.min(s.position - Math.floor(wide * 0.75), s.length - wide));
    return { from, to: from + wide };
  }

  // Words about one cell of the mask; the off-by-one trap is told where it lies.
  function cellWords(query, key, window) {
    const back = query - key, start = `${capital(named(query))} `;
    if (back < 0) return start + `does not see ${named(key)}: it comes later.`;
    if (window === null) return start + `sees ${named(key)}, ${many(back, "token")} back: there is no window.`;
    if (back === window) return start + `just does not see ${named(key)}, ${back} back: a window of ${count(window)} is ${count(window)} keys, the token itself included, ` +
      `so it ends ${count(window - 1)} back. The off-by-one trap: the paper says “between i − W and i”, which read literally is one key more.`;
    if (back > window) return start + `does not see ${named(key)}: ${count(back)} back is past the window of ${count(window)}.`;
    if (back === 0) return start + `sees itself; it counts as one of the ${many(window, "key")} of the window.`;
    return start + `sees ${named(key)}, ${count(back)} back` + (back === window - 1 ? `: the last that a window of ${count(window)} reaches, as the token itself counts too.` : ".");
  }

  // A canvas of queries by keys that chooses the query by click and by arrow keys.
  function grid(words) {
    const canvas = make("canvas", { tabindex: 0, role: "slider", "aria-label": "selected query", "aria-orientation": "vertical" });
    let laid = null;
    const cell = event => {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left - laid.left, y = event.clientY - box.top - laid.top;
      if (x < 0 || y < 0 || x >= laid.side || y >= laid.side) return null;
      const many = laid.to - laid.from;
      return { query: laid.from + Math.floor(y * many / laid.side), key: laid.from + Math.floor(x * many / laid.side) };
    };
    canvas.addEventListener("mousemove", event => {
      const at = cell(event);
      if (at) tip.show(words(at.query, at.key, now()), event.clientX, event.clientY);
      else tip.hide();
    });
    canvas.addEventListener("mouseleave", tip.hide);
    canvas.addEventListener("click", event => {
      const at = cell(event);
      if (at) { stop(); select({ position: at.query }); }
    });
    canvas.addEventListener("keydown", event => {
      const s = now(), to = {
        ArrowUp: s.position - 1, ArrowLeft: s.position - 1, ArrowDown: s.position + 1, ArrowRight: s.position + 1,
        PageUp: s.position - 10, PageDown: s.position + 10, Home: 0, End: s.length - 1,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      stop();
      select({ position: Math.min(Math.max(to, 0), s.length - 1) });
    });

    // `shade(query)` gives a function from key to pixel; `bars(pen, x, wide)` draws what stands under the columns.
    function drawn(s, { shade, under = 0, lines }) {
      const { from, to } = shown(s), many = to - from, fine = many > 36;
      const left = fine || !real ? 56 : 112, top = 22, room = panel.clientWidth || 800;
      const side = Math.max(200, Math.min(room > 820 ? 460 : room - 380, 520)), bottom = fine || !real ? 22 : 96;
      const width = left + side + 20, high = top + side + under + bottom;
      const { pen, dots } = sized(canvas, width, high);
      laid = { left, top, side, from, to };
      paintCells(pen, dots, { left, top, side, from, to, shade, gap: colours.paper.pixel });
      const at = position => (position - from) * side / many, cell = side / many;
      pen.font = "11px system-ui, sans-serif";
      pen.fillStyle = colours.soft.text;
      pen.fillText("key: who is looked at →", left, 13);
      pen.textAlign = "right";
      pen.fillText("query ↓", left - 6, 13);
      pen.textBaseline = "middle";
      const listed = many <= 36 ? Array.from({ length: many }, (_, n) => from + n) : ticks(from, to, 8);
      const small = Math.min(11, Math.max(8, cell - 1));
      pen.font = `${many <= 36 ? small : 11}px ui-monospace, "DejaVu Sans Mono", monospace`;
      for (const position of listed) {
        const tooNear = many > 36 && Math.abs(at(position) - at(s.position)) < 12;
        if (tooNear) continue;
        pen.fillText(many <= 36 ? label(position) : count(position), left - 6, top + at(position) + cell / 2);
      }
      for (const position of listed) {
        pen.save();
        pen.translate(left + at(position) + cell / 2, top + side + under + 6);
        if (many <= 36 && real) { pen.rotate(-Math.PI / 2); pen.textAlign = "right"; pen.fillText(label(position), 0, 0); }
        else { pen.textAlign = "center"; if (many > 36 || cell > 16 || position % 2 === 0) pen.fillText(count(position), 0, 6); }
        pen.restore();
      }
      // The selected query's row.
      const y = top + at(s.position), first = Math.max(from, s.view === "prefill" ? from : firstSeen(s.position, s.view === "pattern" ? facts.window : s.window));
      const last = s.view === "prefill" ? to : Math.min(s.position + 1, to);
      pen.strokeStyle = colours.mark.text;
      pen.lineWidth = cell < 4 ? 0.8 : 1.5;
      pen.strokeRect(left + at(first) - 0.75, y - 0.9, at(last) - at(first) + 1.5, Math.max(cell, 1) + 1.8);
      pen.fillStyle = colours.ink.text;
      pen.textAlign = "right";
      pen.font = `bold ${many <= 36 ? small : 11}px ui-monospace, "DejaVu Sans Mono", monospace`;
      if (many > 36) {
        pen.fillText(count(s.position), left - 6, y + cell / 2);
        pen.beginPath();
        pen.moveTo(left - 4, y + cell / 2 - 4);
        pen.lineTo(left, y + cell / 2);
        pen.lineTo(left - 4, y + cell / 2 + 4);
        pen.fill();
      }
      if (lines) lines(pen, { left, top, side, from, to, at, cell });
      canvas.setAttribute("aria-valuemin", 0);
      canvas.setAttribute("aria-valuemax", s.length - 1);
      canvas.setAttribute("aria-valuenow", s.position);
      canvas.setAttribute("aria-valuetext", said.textContent);
    }
    return { canvas, drawn };
  }

  const views = {};

  // ---- 1. The mask
  views.mask = () => {
    const { canvas, drawn } = grid((query, key, s) => cellWords(query, key, s.window));
    const numbers = make("p"), trap = make("p", { class: "soft" });
    const body = make("div", { class: "columns" }, make("div", {}, canvas), make("div", { class: "card" },
      make("h3", {}, "Who may look at whom"), numbers,
      legend(["seen", "the selected token sees it"], ["faint", "another token sees it"], ["past", "past the window"], ["future", "comes later: no token looks ahead"]),
      make("h3", {}, "The off-by-one trap"), trap,
      make("p", { class: "soft" }, "Point at a cell for words; click a row, or use the arrow keys, to choose a token.")));
    return { body, draw(s) {
      const first = firstSeen(s.position, s.window), keys = s.position - first + 1, n = s.length, w = Math.min(s.window === null ? n : s.window, n);
      const pairs = w * (w + 1) / 2 + (n - w) * w, all = n * (n + 1) / 2;
      said.textContent = `${capital(named(s.position))} sees ${tokensTo(first, s.position)}: ${many(keys, "key")}, itself included.`;
      numbers.textContent = `Query minus key must be 0 or more${s.window === null ? "" : ` and less than ${count(s.window)}`}. Of ${count(all)} pairs that causality ` +
        `allows, ${s.window === null || s.window >= n ? "all are seen" : `the window leaves ${count(pairs)} (${percent(pairs / all)})`}.` +
        (s.window !== null && s.window >= n ? " The window is as long as the text, or longer: it hides nothing here. Make it smaller to see it work." : "");
      trap.textContent = s.window === null
        ? "Without a window there is none. With one, it matters whether the token itself counts."
        : `A window of ${count(s.window)} means ${many(s.window, "key")} with the token itself, so it looks ${many(s.window - 1, "token")} back: ` +
          `the token ${count(s.window)} back is hidden. transformers counts the same way. The Mistral 7B paper writes “between i − W and i”; read literally, that would be ${count(s.window + 1)} keys.`;
      drawn(s, { shade: query => {
        const oldest = firstSeen(query, s.window), seen = query === s.position ? colours.seen.pixel : colours.faint.pixel;
        return key => key > query ? colours.future.pixel : key < oldest ? colours.past.pixel : seen;
      } });
    } };
  };

  // ---- 2. The pattern of a head
  views.pattern = () => {
    const { canvas, drawn } = grid((query, key, s) => {
      const held = pattern(), row = held.layer === s.layer ? held.row(s.head, query) : undefined;
      if (key > query || (facts.window !== null && query - key >= facts.window)) return cellWords(query, key, facts.window);
      if (!row) return held.block > 1 ? `In this block of ${held.block} × ${held.block} tokens the largest weight is ${percent(held.coarse(query, key))}.` : `The row of ${named(query)} was not recorded.`;
      return `${capital(named(query))} gives ${percent(row.weights[key - row.first])} of its attention to ${query === key ? "itself" : named(key)}` +
        (sees(query, key, s.window) ? "." : `, which a window of ${count(s.window)} would hide.`);
    });
    const choose = (name, words) => {
      const input = make("select", { "aria-label": words, onchange: () => pick(name, Number(input.value)) });
      return { input, label: make("label", { class: "slider" }, make("span", {}, words), input) };
    };
    const layer = choose("layer", "Layer"), kv = choose("kv", "Keys and values (kv)"), head = choose("head", "Query head");
    const pick = (name, value) => {
      if (name === "layer") select({ layer: value });
      else if (name === "head") select({ head: value });
      else select({ head: value * facts.group + now().head % facts.group });
    };
    const option = (value, words, chosen, off) => make("option", { value, selected: chosen, disabled: off }, words);
    const about = make("p", { class: "soft" }), missing = make("p", { class: "notice" }), title = make("h3"), list = make("div", { class: "bars" });
    const total = make("p"), cut = make("p"), notes = make("p", { class: "soft" });
    const scale = make("div", { class: "scale" }, make("span", {}, "0 %"), make("span", { class: "ramp" }), make("span", {}, "100 %"));
    const card = make("div", { class: "card" }, title, list, total, cut, scale,
      make("p", { class: "soft" }, "Colour: the square root of the weight, so that small weights show. Bars under the picture: the selected row."), notes);
    const columns = make("div", { class: "columns" }, make("div", {}, canvas), card);
    const body = make("div", {}, make("div", { class: "row" }, layer.label, kv.label, head.label), about, missing, columns);
    return { body, draw(s) {
      const held = pattern(), here = held.layer === s.layer && held.heads.includes(s.head), alive = answers(model);
      const group = facts.group || 1, lacking = model.get("missing"), row = here ? held.row(s.head, s.position) : undefined;
      layer.input.replaceChildren(...Array.from({ length: facts.layers }, (_, n) =>
        option(n, String(n), n === s.layer, !facts.recorded.includes(n) || (!alive && n !== held.layer))));
      kv.input.replaceChildren(...Array.from({ length: facts.kv }, (_, n) =>
        option(n, String(n), n === Math.floor(s.head / group), !alive && !held.heads.some(one => Math.floor(one / group) === n && one % group === s.head % group))));
      head.input.replaceChildren(...Array.from({ length: group }, (_, n) => Math.floor(s.head / group) * group + n).map(n =>
        option(n, String(n), n === s.head, !alive && !held.heads.includes(n))));
      for (const one of [layer, kv, head]) one.input.disabled = !!lacking && !facts.recorded.length;
      about.textContent = (facts.kv ? `Each layer has ${many(facts.kv * group, "query head")}, counted from 0; ` +
        (group > 1 ? `heads ${Math.floor(s.head / group) * group} ${group > 2 ? "to" : "and"} ${Math.floor(s.head / group) * group + group - 1} share keys and values ${Math.floor(s.head / group)} (grouped-query attention).` : "each has keys and values of its own.") : "") +
        (alive || lacking || !held.heads.length ? "" : ` This page has no Python behind it and carries layer ${held.layer}${held.heads.length > 1 ? ", all heads" : `, head ${held.heads[0]}`}` +
          (model.get("held").whole ? "" : `, exact for ${tokensTo(model.get("held").first, model.get("held").last)}`) + ": to show another, select it in Jupyter and save the page again.");
      missing.textContent = lacking;
      missing.hidden = !lacking;
      columns.hidden = !!lacking;
      columns.classList.toggle("old", !here);
      if (lacking || !here) {
        said.textContent = lacking ? "There is no pattern to show." : `Reading layer ${s.layer}, head ${s.head} …`;
        return;
      }
      const hidden = facts.window === null ? "" : `with the model's window of ${count(facts.window)}`;
      notes.textContent = [
        s.window === facts.window ? "" : `What was recorded stays what it was, ${hidden || "without a window"}: the dashed line shows where a window of ${s.window === null ? "any length" : count(s.window)} would cut it.`,
        held.block > 1 ? `The text is long: each dot of the whole is the largest weight in ${held.block} × ${held.block} tokens; ` +
          (model.get("held").whole ? "every row is exact when you show fewer tokens." : `exact rows are ${tokensTo(model.get("held").first, model.get("held").last)}${alive ? ", and others come when you select them." : "; this page has no others."}`) : "",
      ].filter(Boolean).join(" ");
      if (!row) {
        said.textContent = `The row of ${named(s.position)} is not here` + (model.get("held").whole ? ": it was not recorded." : alive ? ": it is being read." : ": this page does not carry it.");
        for (const part of [title, total, cut]) part.textContent = "";
        list.replaceChildren();
      } else {
        const order = [...row.weights.keys()].sort((a, b) => row.weights[b] - row.weights[a]), best = order.slice(0, 10);
        const sum = row.weights.reduce((a, b) => a + b, 0), rest = order.slice(10).reduce((all, at) => all + row.weights[at], 0);
        const top = row.first + best[0];
        said.textContent = `Layer ${s.layer}, head ${s.head}: ${named(s.position)} looks most at ${top === s.position ? "itself" : named(top)}, with ${percent(row.weights[best[0]])} of its attention.`;
        title.textContent = `What ${named(s.position)} looks at`;
        const line = (words, weight, name) => make("div", { class: "bar" }, make("span", { class: "name", title: words }, words),
          make("span", { class: "track" }, make("span", { class: `fill ${name}`, style: `width:${Math.max(0.5, 100 * weight)}%` })), make("span", { class: "value" }, (100 * weight).toFixed(1) + "\u00a0%"));
        list.replaceChildren(...best.map(at => line(label(row.first + at), row.weights[at], sees(s.position, row.first + at, s.window) ? "" : "hiddenkey")),
          ...(order.length > 10 ? [line(many(order.length - 10, "other key"), rest, "others")] : []));
        total.textContent = `Its ${many(order.length, "weight")} sum to ${fixed(sum)}.` + (Math.abs(sum - 1) > 0.02 ? " Not to 1: the pattern was edited, or kept in a coarse dtype." : "");
        const lost = row.weights.reduce((all, weight, at) => sees(s.position, row.first + at, s.window) ? all : all + weight, 0);
        cut.replaceChildren(...(s.window === null || s.position - row.first < s.window ? [] : [make("span", { class: "swatch inline", style: "background:var(--out)" }),
          `A window of ${count(s.window)} would hide keys that got ${percent(lost)} of this attention.`]));
      }
      drawn(s, {
        under: 74,
        shade: query => {
          const exact = held.block > 1 && !(span && span < s.length) ? undefined : held.row(s.head, query), oldest = firstSeen(query, facts.window);
          return key => {
            if (key > query) return colours.future.pixel;
            if (key < oldest) return colours.past.pixel;
            const weight = exact ? exact.weights[key - oldest] : held.coarse(query, key);
            return Number.isNaN(weight) ? colours.rule.pixel : colours.scale[Math.min(255, Math.round(255 * Math.sqrt(Math.max(weight, 0))))];
          };
        },
        lines(pen, { left, top, side, from, to, at, cell }) {
          if (s.window !== facts.window && s.window !== null) { // where another window would cut
            pen.save();
            pen.beginPath();
            pen.rect(left, top, side, side);
            pen.clip();
            pen.setLineDash([4, 3]);
            pen.strokeStyle = colours.out.text;
            pen.lineWidth = 1.5;
            pen.beginPath();
            if (cell >= 4) for (let query = from; query < to; query++) {
              const x = left + at(Math.max(0, query - s.window + 1)), y = top + at(query);
              pen.lineTo(x, y);
              pen.lineTo(x, y + cell);
            } else {
              pen.moveTo(left + at(0), top + at(s.window - 1));
              pen.lineTo(left + at(to - s.window), top + at(to));
            }
            pen.stroke();
            pen.restore();
          }
          const ground = top + side + 70;
          pen.fillStyle = colours.rule.text;
          pen.fillRect(left, ground, side, 1);
          if (!row) return;
          const high = Math.max(...row.weights);
          for (let n = 0; n < row.weights.length; n++) {
            const key = row.first + n;
            if (key < from || key >= to) continue;
            pen.fillStyle = sees(s.position, key, s.window) ? colours.accent.text : colours.out.text;
            const tall = 54 * row.weights[n] / high;
            pen.fillRect(left + at(key), ground - tall, Math.max(cell - (cell > 3 ? 1 : 0), 0.7), tall);
          }
          pen.fillStyle = colours.soft.text;
          pen.font = "11px system-ui, sans-serif";
          pen.textAlign = "right";
          pen.fillText((100 * high).toFixed(0) + " %", left - 6, ground - 52);
          pen.fillText("0", left - 6, ground - 2);
        },
      });
    } };
  };

  // ---- 3. Reach through layers
  views.reach = () => {
    const canvas = make("canvas", { role: "img" }), formula = make("p"), paper = make("p", { class: "soft" });
    const body = make("div", {}, canvas, make("div", { class: "card" }, make("h3", {}, "How far"), formula, paper,
      legend(["seen", "the selected token can hold something of it"], ["rule", "not in its reach"])));
    let laid = null;
    const at = event => {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left - laid.left, y = event.clientY - box.top - laid.top;
      if (x < 0 || y < 0 || x >= laid.side || y >= laid.tall * (facts.layers + 1)) return null;
      return { position: laid.from + Math.floor(x * (laid.to - laid.from) / laid.side), after: facts.layers - Math.floor(y / laid.tall) };
    };
    canvas.addEventListener("mousemove", event => {
      const cell = at(event);
      if (!cell) return tip.hide();
      const s = now(), first = firstReached(cell.position, cell.after, s.window), back = firstReached(s.position, facts.layers - cell.after, s.window);
      tip.show((cell.after ? `${capital(named(cell.position))} after ${many(cell.after, "layer")} can hold something of ${tokensTo(first, cell.position)}.` : `${capital(named(cell.position))}, as the first layer finds it.`) +
        (cell.position <= s.position && cell.position >= back ? ` From here, information can reach ${named(s.position)}.` : ` From here, nothing can reach ${named(s.position)}.`), event.clientX, event.clientY);
    });
    canvas.addEventListener("mouseleave", tip.hide);
    canvas.addEventListener("click", event => { const cell = at(event); if (cell) { stop(); select({ position: cell.position }); } });
    return { body, draw(s) {
      const L = facts.layers, needed = layersToFirst(s.position, s.window), last = firstReached(s.position, L, s.window), w = s.window;
      said.textContent = `Through ${many(L, "layer")}, ${named(s.position)} can hold something of ${tokensTo(last, s.position)}. ` +
        (needed === null ? "The first token is never within reach: with a window of 1 a token sees itself alone." : s.position === 0 ? "It is the first token." :
          `The first token is within reach after ${many(needed, "layer")}` + (needed > L ? `; this model has only ${L}.` : "."));
      formula.textContent = w === null ? "Without a window, one layer reaches everything." :
        `A layer looks ${many(w - 1, "token")} back, because the window of ${count(w)} counts the token itself. After k layers, information has travelled k × ${count(w - 1)}: ` +
        `after all ${L}, ${many(L * (w - 1), "token")}.`;
      paper.textContent = w === null ? "" : `The Mistral 7B paper (Figure 1) says k × W, here ${count(L * w)}: the same picture, counted with one more a layer.`;
      const { from, to } = shown(s), n = to - from, width = Math.max(400, panel.clientWidth - 4), left = 92, right = 204, top = 6;
      const side = width - left - right, tall = Math.max(5, Math.min(26, 520 / (L + 1))), high = top + tall * (L + 1) + 40, cell = side / n;
      const { pen } = sized(canvas, width, high), x = position => left + (position - from) * cell;
      laid = { left, top, side, tall, from, to };
      const middle = after => top + (L - after) * tall + tall / 2, dots = cell >= 7 && tall >= 9, every = Math.ceil(13 / tall);
      pen.save();
      pen.beginPath();
      pen.rect(left, 0, side, high);
      pen.clip();
      pen.fillStyle = colours.faint.text;
      for (let back = 0; back < L; back++) { // what a row's tokens see of the row below
        const up = firstReached(s.position, back, w), down = firstReached(s.position, back + 1, w);
        const half = dots ? cell / 2 : 0, end = dots ? half : cell;
        pen.beginPath();
        pen.moveTo(x(up) + half, middle(L - back));
        pen.lineTo(x(s.position) + end, middle(L - back));
        pen.lineTo(x(s.position) + end, middle(L - back - 1));
        pen.lineTo(x(down) + half, middle(L - back - 1));
        pen.fill();
      }
      for (let after = 0; after <= L; after++) {
        const first = firstReached(s.position, L - after, w), y = middle(after);
        if (dots) for (let position = from; position < to; position++) {
          pen.fillStyle = position <= s.position && position >= first ? colours.seen.text : colours.rule.text;
          pen.beginPath();
          pen.arc(x(position) + cell / 2, y, Math.min(cell * 0.36, tall * 0.32, 7), 0, 7);
          pen.fill();
        } else {
          const thick = Math.max(2, tall * 0.5);
          pen.fillStyle = colours.rule.text;
          pen.fillRect(left, y - thick / 4, side, thick / 2);
          pen.fillStyle = colours.seen.text;
          pen.fillRect(x(first), y - thick / 2, Math.max(2, x(s.position + 1) - x(first)), thick);
        }
      }
      pen.restore();
      pen.textBaseline = "middle";
      pen.font = "11px system-ui, sans-serif";
      for (let after = 0; after <= L; after++) {
        if (after % every && after !== L) continue;
        if (after !== L && L - after < every) continue;
        pen.fillStyle = colours.soft.text;
        pen.font = "11px system-ui, sans-serif";
        pen.textAlign = "right";
        pen.fillText(after ? `after ${many(after, "layer")}` : "the tokens", left - 8, middle(after));
        pen.textAlign = "left";
        const down = L - after, first = firstReached(s.position, down, w);
        if (down === needed && down) pen.fillStyle = colours.ink.text;
        if (down === needed && down) pen.font = "bold 11px system-ui, sans-serif";
        if (down && down > needed && needed !== null && after) continue;
        pen.fillText(down ? `${many(down, "layer")} down: from token ${count(first)}` : `token ${count(s.position)}`, left + side + 8, middle(after));
      }
      pen.textAlign = "center";
      pen.fillStyle = colours.soft.text;
      for (const tick of ticks(from, to, Math.min(n, 12))) pen.fillText(count(tick), x(tick) + cell / 2, high - 26);
      pen.fillText("position of the token", left + side / 2, high - 10);
      canvas.setAttribute("aria-label", said.textContent);
    } };
  };

  // ---- 4. The rolling cache
  views.ring = () => {
    const box = make("div", { class: "wheel" }), table = make("table"), bars = make("div"), words = make("p", { class: "soft" });
    const ringBox = make("div", {}, box, legend(["seen", "in the cache; fainter: older"], ["paper", "dashed: evicted by the next token", "next"], ["future", "empty"]));
    const side = make("div", { class: "card" }, make("h3", {}, "Slots"), table, make("h3", { class: "later" }, "What it saves"), bars, words);
    return { body: make("div", { class: "columns" }, ringBox, side), draw(s) {
      const w = s.window, p = s.position, bytes = facts.token_bytes;
      said.textContent = w === null ? `Without a window the cache keeps all ${many(p + 1, "token")}: slot ${count(p)} holds ${named(p)}, and nothing is evicted.` :
        `${capital(named(p))} is written to slot ${count(p)} mod ${count(w)} = ${count(p % w)}` + (p >= w ? `; that evicts ${named(p - w)}, which is out of sight from here on.` : "; nothing is evicted yet.");
      const size = w === null ? s.length : w, holds = slot => { const at = p - ((p - slot) % size + size) % size; return at < 0 ? null : at; };
      const next = w === null ? null : (p + 1) % w;
      box.replaceChildren(wheel(s, size, holds, next));
      const rows = Math.min(size, 11), begin = size <= 11 ? 0 : p % size - 5;
      table.replaceChildren(make("thead", {}, make("tr", {}, ["slot", "position", "token", ""].map((head, at) => make("th", { class: at > 1 ? "word" : null }, head)))),
        make("tbody", {}, Array.from({ length: rows }, (_, n) => ((begin + n) % size + size) % size).map(slot => {
          const at = holds(slot), last = slot === p % size;
          return make("tr", { class: last ? "chosen" : null, "data-slot": slot }, make("td", {}, count(slot)), make("td", {}, at === null ? "–" : count(at)),
            make("td", { class: "word" }, at === null ? "empty" : real ? shorten(tokens[at], 16) : "token " + count(at)),
            make("td", { class: "word" }, last ? "written now" : slot === next && at !== null && w > 1 ? "evicted next" : at === null ? "" : `${count(p - at)} back`));
        })));
      if (!bytes) {
        bars.replaceChildren(make("p", {}, "How many bytes a token takes is not known: the shape of the heads was not recorded."));
        words.textContent = "";
        return;
      }
      const lines = [[many(p + 1, "token"), p + 1], ...(facts.context > p + 1 ? [[many(facts.context, "token"), facts.context]] : [])];
      const most = lines.at(-1)[1];
      bars.replaceChildren(...lines.flatMap(([when, n]) => [["with window", w === null ? n : Math.min(n, w)], ["without", n]].map(([how, kept]) =>
        make("div", { class: "bar wide" }, make("span", { class: "name" }, `${when}, ${how}`),
          make("span", { class: "track" }, make("span", { class: "fill" + (how === "without" ? " others" : ""), style: `width:${Math.max(0.5, 100 * kept / most)}%` })), make("span", { class: "value" }, inBytes(kept * bytes))))));
      words.textContent = `Keys and values of one token: ${inBytes(bytes)} in all ${many(facts.layers, "layer")}, ${facts.number_bytes} bytes a number. ` +
        (w === null ? "With and without are the same as long as there is no window." : `With the window, never more than ${inBytes(w * bytes)}, whatever the length.`);
    } };
  };

  // The ring as wedges, slot 0 at the top, clockwise; a large one has several slots to a wedge.
  function wheel(s, size, holds, next) {
    const wedges = Math.min(size, 128), each = size / wedges, cx = 220, cy = 178, outer = 128, inner = wedges > 40 ? 96 : 84;
    const point = (angle, radius) => [cx + radius * Math.sin(angle), cy - radius * Math.cos(angle)];
    const svg = make("svg", { viewBox: "0 0 440 356", role: "img", "aria-label": said.textContent });
    const names = [];
    for (let wedge = 0; wedge < wedges; wedge++) {
      const low = Math.floor(wedge * each), high = Math.max(low, Math.floor((wedge + 1) * each) - 1);
      const inside = slot => slot !== null && slot >= low && slot <= high;
      const written = inside(s.position % size), held = [];
      for (let slot = low; slot <= high; slot++) if (holds(slot) !== null) held.push(holds(slot));
      const at = held.length ? Math.max(...held) : null, evicted = inside(next) && at !== null && size > 1 && !written;
      const a = 2 * Math.PI * wedge / wedges, b = 2 * Math.PI * (wedge + 1) / wedges - (wedges > 1 ? Math.min(0.02, 0.8 / wedges) : 0.0001), large = b - a > Math.PI ? 1 : 0;
      const [p1, p2, p3, p4] = [point(a, outer), point(b, outer), point(b, inner), point(a, inner)].map(pair => pair.map(v => v.toFixed(1)).join(" "));
      const age = at === null ? 0 : (s.position - at) / Math.max(size - 1, 1);
      const what = each > 1 ? `slots ${count(low)} to ${count(high)}` : `slot ${count(low)}`;
      svg.append(make("path", {
        d: `M${p1} A${outer} ${outer} 0 ${large} 1 ${p2} L${p3} A${inner} ${inner} 0 ${large} 0 ${p4} Z`,
        class: "wedge " + (at === null ? "empty" : "full") + (written ? " written" : evicted ? " next" : ""), style: at === null ? null : `fill-opacity:${(1 - 0.7 * age).toFixed(2)}`,
      }, make("title", {}, `${capital(what)}: ` + (at === null ? "empty" : each > 1 ? `newest is ${named(at)}` : `${named(at)}, ${many(s.position - at, "token")} back`) +
        (written ? "; written now" : "") + (evicted ? "; evicted by the next token" : ""))));
      const middle = (a + b) / 2;
      if (wedges <= 40) {
        const [x, y] = point(middle, (outer + inner) / 2), strong = at !== null && age < 0.45;
        names.push(make("text", { x, y: y + 4, class: "slot" + (strong ? " strong" : ""), "text-anchor": "middle" }, low));
      }
      if (wedges <= 24 && at !== null) {
        const [x, y] = point(middle, outer + 10), across = Math.sin(middle);
        names.push(make("text", { x, y: y + 4, class: "word" + (written ? " chosen" : ""), "text-anchor": Math.abs(across) < 0.2 ? "middle" : across > 0 ? "start" : "end" }, real ? shorten(tokens[at], 9) : count(at)));
      }
      if (written) {
        const [x, y] = point(middle, inner - 6), [x1, y1] = point(middle - 0.09, inner - 18), [x2, y2] = point(middle + 0.09, inner - 18);
        names.push(make("polygon", { points: `${x},${y} ${x1},${y1} ${x2},${y2}`, class: "hand" }));
      }
    }
    const centre = [[`position ${count(s.position)}`, "big"], [s.window === null ? "no window" : `mod ${count(size)}`, ""], [`slot ${count(s.position % size)}`, "big"]];
    svg.append(...svg.querySelectorAll(".next, .written")); // their outlines on top
    svg.append(...names, ...centre.map(([text, kind], row) => make("text", { x: cx, y: cy - 14 + 20 * row, "text-anchor": "middle", class: kind }, text)));
    return svg;
  }

  // ---- 5. Chunked prefill
  views.prefill = () => {
    const { canvas, drawn } = grid((query, key, s) => {
      const { number, start, end, cached } = chunkOf(s.position, s);
      if (query < start || query >= end) return `${capital(named(query))} is read in chunk ${chunkOf(query, s).number + 1}. Click to select it.`;
      const block = key >= end ? `Not read yet in chunk ${number + 1}.` : key >= start ? "Current chunk: causal." : key >= cached ? "Cache: the sliding window over cached keys." : "Past: masked zero, and never computed.";
      return `${block} ${cellWords(query, key, s.window)}`;
    });
    const words = make("p"), saved = make("p"), memory = make("p", { class: "soft" });
    const body = make("div", { class: "columns" }, make("div", {}, canvas), make("div", { class: "card" }, make("h3", {}, "Three kinds of blocks"), words,
      legend(["past", "past: zero, no longer in the cache"], ["seen", "cache, seen through the window"], ["faint", "in the cache, but past this query's window"],
        ["now", "current chunk, causal"], ["dim", "current chunk, hidden"]),
      make("h3", {}, "What is computed"), saved, memory,
      make("p", { class: "soft" }, "Other chunks are grey where their queries see. The position chooses the chunk.")));
    return { body, draw(s) {
      const { number, start, end, cached } = chunkOf(s.position, s), n = s.length, chunks = Math.ceil(n / s.chunk), size = end - start, w = s.window;
      said.textContent = `Chunk ${count(number + 1)} of ${count(chunks)} reads ${tokensTo(start, end - 1)}; ` +
        (start ? `the cache holds ${tokensTo(cached, start - 1)}` : "the cache is empty") + (cached ? `; ${tokensTo(0, cached - 1)} ${cached === 1 ? "is" : "are"} past.` : "; nothing is past yet.");
      words.textContent = `Each query of the chunk looks causally at its own chunk` + (start ? `, and through the window at the ${many(start - cached, "key")} in the cache.` : ".") +
        (cached ? ` The ${many(cached, "token")} before that ${cached === 1 ? "has" : "have"} been overwritten: no query of the chunk could see ${cached === 1 ? "it" : "them"}.` : "") +
        (w !== null && s.chunk > w ? ` The chunk is longer than the window, so the window hides some of the chunk too.` : "");
      const here = size * (start - cached + size), pairs = prefillPairs(s), all = n * n;
      saved.textContent = `This chunk: ${count(size)} × ${count(start - cached + size)} = ${count(here)} scores a head, instead of ${count(size)} × ${count(n)} = ${count(size * n)} with the whole mask. ` +
        `All chunks: ${count(pairs)} instead of ${count(n)} × ${count(n)} = ${count(all)}` + (pairs < all ? `, ${percent(1 - pairs / all)} saved.` : ": one chunk saves nothing.");
      memory.textContent = `Keys looked at together: at most ${count(Math.min(n, (w === null ? n : w) + s.chunk))}, not ${count(n)}. The result is the same, whatever the chunk.`;
      drawn(s, {
        shade: query => {
          if (query < start || query >= end) return key => sees(query, key, w) ? colours.rule.pixel : colours.future.pixel;
          const oldest = firstSeen(query, w);
          return key => key >= end ? colours.future.pixel : key >= start ? key <= query && key >= oldest ? colours.now.pixel : colours.dim.pixel :
            key >= cached ? key >= oldest ? colours.seen.pixel : colours.faint.pixel : colours.past.pixel;
        },
        lines(pen, { left, top, side, from, to, at }) {
          if ((to - from) / s.chunk > 60) return;
          pen.strokeStyle = colours.soft.text;
          pen.lineWidth = 0.7;
          pen.beginPath();
          for (let line = Math.ceil(from / s.chunk) * s.chunk; line < to; line += s.chunk) {
            pen.moveTo(left, top + at(line));
            pen.lineTo(left + side, top + at(line));
            pen.moveTo(left + at(line), top);
            pen.lineTo(left + at(line), top + side);
          }
          pen.stroke();
        },
      });
    } };
  };

  // ---- All together
  const open = {};
  let waiting = false;
  const draw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; drawNow(); });
  };

  function drawNow() {
    const s = now();
    colours = theme(root);
    windowDial.limits(1, most());
    windowDial.put(s.window === null ? most() : s.window);
    windowDial.disable(s.window === null);
    noWindow.checked = s.window === null;
    asModel.textContent = `The model's: ${facts.window === null ? "none" : count(facts.window)}`;
    asModel.disabled = s.window === facts.window;
    chunkDial.limits(1, most());
    chunkDial.put(s.chunk);
    chunkDial.hidden = s.view !== "prefill";
    positionDial.limits(0, s.length - 1);
    positionDial.put(s.position);
    lengthDial.put(s.length);
    const choices = [256, 64, 24].filter(n => n < s.length);
    if (!choices.includes(span)) span = 0;
    zoomed.hidden = !choices.length || s.view === "ring";
    zoom.replaceChildren(...[0, ...choices].map(n => make("option", { value: n, selected: n === span }, n ? `${n} tokens around` : `all ${many(s.length, "token")}`)));
    for (const tab of tabs) {
      const chosen = tab.dataset.view === s.view;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
    }
    open[s.view] ||= views[s.view]();
    if (panel.firstChild !== open[s.view].body) panel.replaceChildren(open[s.view].body);
    panel.setAttribute("aria-label", VIEWS.find(([view]) => view === s.view)[1]);
    drawStrip(s);
    open[s.view].draw(s);
  }

  model.on("change:view change:window change:chunk change:position change:layer change:head change:length change:held change:data change:missing", draw);
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - width) < 2) return;
    width = root.clientWidth;
    draw();
  }).observe(root);
  new MutationObserver(draw).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  draw();
}

export default { render };
