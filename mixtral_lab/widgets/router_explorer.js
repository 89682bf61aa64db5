// RouterExplorer. Tokens and layers are numbered as in Python; a pane is one trace, of which the part from `start` is here.

const FAINTEST = 0.25, FADED = 0.1;  // how much of its colour a cell keeps at weight 0, and while another expert is chosen
const AXIS = 20, LONGEST = 84, LABELLED = 12;  // pixels: the axis, the longest token on it, and cells wide enough for tokens
const PATIENCE = 4000;  // ms to wait for Python's answer
const BLANK = { "␣": "space", "⏎": "line break", "⇥": "tab" };
let views = 0;

function readPanes(model) {
  const arrays = unpack(model), { start, stop } = model.get("part");
  const bit = (bits, at) => Boolean(bits.values[at >> 3] & (128 >> (at & 7)));
  const panes = model.get("panes").map((about, at) => {
    const experts = arrays["experts" + at], weights = arrays["weights" + at], logits = arrays["logits" + at];
    const [layers, n, choices] = experts.shape;
    const cell = (layer, token) => layer * n + token - start;
    return {
      ...about, at, start, n, layers, choices, experts, cell, weighted: Boolean(weights), compared: model.get("panes").length > 1,
      holds: token => token >= start && token < start + n,
      token: token => about.tokens[token - start],
      expert: (layer, token, choice = 0) => choices ? experts.values[cell(layer, token) * choices + choice] : -1,
      weight: (layer, token, choice) => weights ? weights.values[cell(layer, token) * choices + choice] : NaN,
      nearTie: (layer, token) => bit(arrays["near_ties" + at], cell(layer, token)),
      logits: logits && ((layer, token) => {
        const width = logits.shape[2];
        return logits.values.subarray(cell(layer, token) * width, (cell(layer, token) + 1) * width);
      }),
      differs: () => false,
    };
  });
  if (panes.length > 1) {
    const both = Math.max(0, Math.min(...panes.map(pane => pane.n)));
    for (const pane of panes)
      pane.differs = (layer, token) => token - start < both && bit(arrays.differs, layer * both + token - start);
  }
  return Object.assign(panes, { start, stop });
}

// Words

function picks(pane, layer, token) {
  return Array.from({ length: pane.choices }, (_, choice) => ({
    expert: pane.expert(layer, token, choice), weight: pane.weight(layer, token, choice),
  })).filter(pick => pick.expert >= 0);
}

const listed = words => words.length > 1 ? words.slice(0, -1).join(", ") + " and " + words[words.length - 1] : words[0] || "";

function decision(pane, layer, token) {
  const all = picks(pane, layer, token);
  if (!pane.choices) return "no router decides";
  if (!all.length) return "nothing was recorded";
  if (all.some(pick => Number.isNaN(pick.weight)))
    return (all.length > 1 ? "experts\u00a0" : "expert\u00a0") + listed(all.map(pick => String(pick.expert))) + " take" + (all.length > 1 ? "" : "s") +
      " the token" + (all.length > 1 ? ", the best first; their shares were not recorded" : "; its share was not recorded");
  return listed(all.map(pick => "expert\u00a0" + pick.expert + " takes " + percent(pick.weight)));
}

const named = (pane, token) => "Token " + token + ", " + quoted(pane.token(token));
const origin = (pane, token) => token < pane.n_prompt ? "given in the prompt" : "written by the model";

function spoken(token) { return /^[␣⏎⇥]+$/.test(token) ? [...token].map(sign => BLANK[sign]).join(", ") : null; }

// How far to the left and right tokens share the first choice of this one.
function run(pane, layer, token) {
  const first = pane.expert(layer, token);
  if (first < 0) return { from: token, to: token };
  let from = token, to = token;
  while (pane.holds(from - 1) && pane.expert(layer, from - 1) === first) from--;
  while (pane.holds(to + 1) && pane.expert(layer, to + 1) === first) to++;
  return { from, to };
}

// Tokens that hold the sought text, or a part of it: { starts, all }. Spaces match ␣; upper and lower case are one.
function found(panes, sought) {
  const starts = new Set(), all = panes.map(() => new Set());
  const query = sought.replace(/␣/g, " ").toLowerCase();
  if (query) panes.forEach((pane, at) => {
    const texts = pane.tokens.map(token => token.replace(/␣/g, " ").toLowerCase());
    const owner = texts.flatMap((text, token) => Array(text.length).fill(token + pane.start));
    const whole = texts.join("");
    for (let hit = whole.indexOf(query); hit >= 0; hit = whole.indexOf(query, hit + 1)) {
      starts.add(owner[hit + query.length - query.trimStart().length] ?? owner[hit]);
      for (let sign = hit; sign < hit + query.length; sign++) all[at].add(owner[sign]);
    }
  });
  return { starts: [...starts].sort((a, b) => a - b), all };
}

// The grid of one pane, drawn on a canvas as wide as what is seen of it.
function grid(model, pane, choose, tip, onscroll) {
  const rgb = model.get("colours").map(([colour]) => [1, 3, 5].map(from => parseInt(colour.slice(from, from + 2), 16)));
  const layers = pane.layers, wanted = Math.max(Math.min(34, 220 / layers), Math.min(11, Math.max(4, 480 / layers)));
  const ratio = window.devicePixelRatio || 1, tall = Math.round(wanted * ratio), high = tall / ratio;
  const canvas = make("canvas", {
    tabindex: 0, role: "application",
    "aria-label": `Grid of ${many(pane.n, "token")} by ${many(layers, "layer")}, layer 0 at the bottom${pane.name ? ", " + pane.name : ""}. Arrow keys move.`,
  });
  const spacer = make("div", {}, canvas), scroller = make("div", { class: "scroller" }, spacer);
  const every = Math.ceil(15 / high);
  const rows = make("ol", { "aria-hidden": "true", style: `height:${high * layers}px` }, Array.from({ length: layers }, (_, layer) =>
    make("li", {}, layer % every ? "" : layers <= 12 ? "layer " + layer : layer)));
  const node = make("div", { class: "map" }, rows, scroller);
  const image = document.createElement("canvas"), font = '12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, "Liberation Mono", monospace';
  const short = token => [...token].length > 11 ? [...token].slice(0, 10).join("") + "…" : token;
  const measure = image.getContext("2d");
  measure.font = font;
  const below = Math.min(LONGEST, Math.max(...pane.tokens.map(token => measure.measureText(short(token)).width))) + 13;
  let wide = 10, selected = null, painted = "", marked = { all: [new Set(), new Set()] }, followed = "";

  // One column of the picture for each token that is seen, one row for each pixel of the screen.
  function paint(from, to, paper, accent) {
    const key = [from, to, paper, accent, selected.expert].join();
    if (key === painted) return;
    painted = key;
    const seen = to - from, gap = Math.max(Math.round(tall * 0.1), pane.compared ? Math.round(2 * ratio) : 1);
    const upper = pane.choices > 1 ? gap + Math.round((tall - gap) * 0.67) : tall;
    image.width = seen;
    image.height = layers * tall;
    const context = image.getContext("2d"), pixels = context.createImageData(seen, layers * tall);
    const target = new Uint32Array(pixels.data.buffer);
    const coloured = ([r, g, b], share) => {
      const mixed = (own, back) => Math.round(share * own + (1 - share) * back);
      return (255 << 24 | mixed(b, paper[2]) << 16 | mixed(g, paper[1]) << 8 | mixed(r, paper[0])) >>> 0;
    };
    const ground = coloured(paper, 1), difference = coloured(accent, 1), chosen = selected.expert;
    for (let layer = 0; layer < layers; layer++) {
      const top = (layers - 1 - layer) * tall;
      for (let column = 0; column < seen; column++) {
        const token = from + column + pane.start, shades = [ground, ground];
        for (let choice = 0; choice < Math.min(pane.choices, chosen === null ? 2 : pane.choices); choice++) {
          const expert = pane.expert(layer, token, choice);
          if (expert < 0 || !rgb[expert]) continue;
          const weight = pane.weight(layer, token, choice);
          let share = FAINTEST + (1 - FAINTEST) * (Number.isNaN(weight) ? 1 : Math.min(1, Math.max(0, weight)));
          if (chosen !== null) share = expert === chosen ? Math.max(share, 0.6) : FADED;
          if (choice < 2 || expert === chosen) shades[Math.min(choice, 1)] = coloured(rgb[expert], share);
        }
        const above = pane.differs(layer, token) ? difference : ground;
        for (let y = 0; y < tall; y++)
          target[(top + y) * seen + column] = y < gap ? above : y < upper ? shades[0] : shades[1];
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  function draw() {
    const width = Math.min(scroller.clientWidth, Math.ceil(pane.n * wide));
    if (!width || !pane.n || !selected) return;
    const labels = wide >= LABELLED, axis = labels ? below : AXIS, left = scroller.scrollLeft;
    const style = getComputedStyle(node), value = name => style.getPropertyValue(name).trim();
    const parts = name => [1, 3, 5].map(from => parseInt(value(name).slice(from, from + 2), 16));
    const from = Math.max(0, Math.floor(left / wide)), to = Math.min(pane.n, Math.ceil((left + width) / wide));
    const across = Math.round(width * ratio), down = Math.round((layers * high + axis) * ratio);
    if (canvas.width !== across || canvas.height !== down) {
      [canvas.width, canvas.height] = [across, down];
      canvas.style.width = width + "px";
      canvas.style.height = layers * high + axis + "px";
    }
    const context = canvas.getContext("2d"), bottom = layers * high;
    paint(from, to, parts("--paper"), parts("--accent"));
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, layers * high + axis);
    context.imageSmoothingEnabled = false;
    context.drawImage(image, from * wide - left, 0, (to - from) * wide, bottom);
    const at = token => (token - pane.start) * wide - left, row = layer => (layers - 1 - layer) * high;
    const bar = (colour, x, y, w, h) => { context.fillStyle = colour; context.fillRect(x, y, w, h); };
    const paper = value("--paper"), mark = value("--mark"), ink = value("--ink"), soft = value("--soft");
    if (wide >= 5) for (let token = from; token <= to; token++) bar(paper, at(token + pane.start) - 0.5, 0, 1, bottom);
    if (wide >= 8 && high >= 8 && selected.expert === null) for (let token = from + pane.start; token < to + pane.start; token++)
      for (let layer = 0; layer < layers; layer++) if (pane.nearTie(layer, token)) {
        context.beginPath();
        context.arc(at(token) + wide / 2, row(layer) + high * 0.4, Math.min(3, wide / 3), 0, 7);
        context.fillStyle = "#ffffff";
        context.strokeStyle = "#000000";
        context.lineWidth = 1;
        context.fill();
        context.stroke();
      }
    if (pane.n_prompt > pane.start && pane.n_prompt < pane.length) bar(mark, at(pane.n_prompt) - 1, 0, 2, bottom + 5);
    context.font = font;
    context.textBaseline = "middle";
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000].find(step => step * wide >= (labels ? 1 : 46)) || 5000;
    for (let token = Math.ceil((from + pane.start) / step) * step; token < to + pane.start; token += step) {
      const middle = at(token) + wide / 2;
      context.fillStyle = token === selected.token ? ink : soft;
      if (labels) {
        context.save();
        context.translate(middle, bottom + 9);
        context.rotate(-Math.PI / 2);
        context.textAlign = "right";
        context.fillText("\u2068" + short(pane.token(token)) + "\u2069", 0, 0, LONGEST);
        context.restore();
      } else {
        bar(soft, middle, bottom, 1, 4);
        context.textAlign = middle < 14 ? "left" : middle > width - 18 ? "right" : "center";
        context.fillText(token, Math.max(0, Math.min(middle, width)), bottom + 13);
      }
    }
    for (const token of marked.all[pane.at]) if (token >= from + pane.start && token < to + pane.start) {
      context.beginPath();
      context.moveTo(at(token) + wide / 2, bottom - 1);
      context.lineTo(at(token) + wide / 2 - 4, bottom + 6);
      context.lineTo(at(token) + wide / 2 + 4, bottom + 6);
      context.fillStyle = mark;
      context.fill();
    }
    if (pane.holds(selected.token)) {
      const box = (x, y, w, h, line) => {
        if (x > -3 && x < line / 2) [x, w] = [line / 2, w + x - line / 2];
        if (x + w > width - line / 2 && x + w < width + 3) w = width - line / 2 - x;
        if (y + h > bottom - line / 2) h = bottom - line / 2 - y;
        y = Math.max(y, line / 2);
        context.lineWidth = line + 2;
        context.strokeStyle = paper;
        context.strokeRect(x, y, w, h);
        context.lineWidth = line;
        context.strokeStyle = mark;
        context.strokeRect(x, y, w, h);
      };
      const same = run(pane, selected.layer, selected.token), x = at(selected.token), y = row(selected.layer);
      box(x - 0.5, 0.5, wide + 1, bottom - 1, 1);
      box(at(same.from) - 0.5, y + 0.5, (same.to - same.from + 1) * wide + 1, high - 1, 1.5);
      box(x - 1, y, wide + 2, high, 3);
    }
  }

  const place = event => {
    const box = canvas.getBoundingClientRect();
    const token = Math.floor((event.clientX - box.left + scroller.scrollLeft) / wide), layer = layers - 1 - Math.floor((event.clientY - box.top) / high);
    return [pane.start + Math.max(0, Math.min(token, pane.n - 1)), Math.max(0, Math.min(layer, layers - 1))];
  };
  canvas.addEventListener("click", event => choose(...place(event)));
  canvas.addEventListener("pointermove", event => {
    const [token, layer] = place(event);
    const more = (pane.nearTie(layer, token) ? " A near-tie." : "") + (pane.differs(layer, token) ? " The other trace takes other experts here." : "");
    tip.show(`${named(pane, token)}. Layer ${layer}: ${decision(pane, layer, token)}.${more}`, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => tip.hide());
  scroller.addEventListener("scroll", () => { draw(); onscroll(scroller.scrollLeft); });
  return {
    node, canvas, draw,
    room: () => scroller.clientWidth,
    scroll(left) { if (Math.abs(scroller.scrollLeft - left) > 1) scroller.scrollLeft = left; },
    widen(pixels) {
      wide = pixels;
      spacer.style.width = Math.ceil(pane.n * wide) + "px";
    },
    show(now, hits) {
      selected = now;
      marked = hits;
      [...rows.children].forEach((item, layer) => item.classList.toggle("now", layer === now.layer));
      const followedNow = now.token + "/" + wide;
      if (pane.holds(now.token) && followed !== followedNow) {
        const x = (now.token - pane.start) * wide, left = scroller.scrollLeft;
        if (x < left + wide || x > left + scroller.clientWidth - 2 * wide) scroller.scrollLeft = x - scroller.clientWidth / 2;
        followed = followedNow;
      }
      draw();
    },
  };
}

// The text of one pane, coloured by first choice at the layer.
function text(model, pane, choose, tip) {
  const colours = model.get("colours");
  const spans = pane.tokens.map((token, index) => {
    const span = make("span", { tabindex: -1, role: "button", "aria-label": spoken(token) }, token.replace(/␣/g, " "));
    return Object.assign(span, { token: pane.start + index });
  });
  const box = (name, from, to) => to <= from ? [] : [
    make("h3", {}, name),
    make("div", { class: "tokens card", role: "group", "aria-label": name }, spans.slice(from, to).flatMap(span =>
      pane.token(span.token).includes("⏎") ? [span, make("br")] : [span])),
  ];
  const given = Math.max(0, Math.min(pane.n_prompt - pane.start, pane.n));
  const name = pane.name ? quoted(pane.name) + ": " : "";
  const node = make("div", { class: "text" }, box(name + "Prompt", 0, given), box(name + "Written by " + pane.model, given, pane.n));
  if (!pane.n) node.append(make("p", { class: "soft" }, "This text has no token here."));
  let before = {}, at = null;
  node.addEventListener("click", event => { if (event.target.token !== undefined) choose(event.target.token); });
  node.addEventListener("focusin", event => { if (event.target.token !== undefined) choose(event.target.token); });
  node.addEventListener("pointermove", event => {
    const token = event.target.token;
    if (token === undefined) tip.hide();
    else tip.show(`${named(pane, token)}. Layer ${before.layer}: ${decision(pane, before.layer, token)}.`, event.clientX, event.clientY);
  });
  node.addEventListener("pointerleave", () => tip.hide());
  return {
    node,
    focus: () => { if (at) at.focus({ preventScroll: true }); },
    show(now, hits) {
      const again = now.layer !== before.layer || now.expert !== before.expert;
      const same = pane.holds(now.token) ? run(pane, now.layer, now.token) : null;
      const inside = ({ token }, { from, to }) => to > from && token >= from && token <= to;
      for (const span of [before.same, same].flatMap(run => run ? spans.slice(run.from - pane.start, run.to - pane.start + 1) : []))
        span.classList.toggle("run", Boolean(same) && inside(span, same));
      if (hits !== before.hits) for (const span of spans) span.classList.toggle("hit", hits.all[pane.at].has(span.token));
      if (again) for (const span of spans) {
        const token = span.token, first = pane.expert(now.layer, token);
        const away = now.expert !== null && first !== now.expert;
        const later = away && picks(pane, now.layer, token).some(pick => pick.expert === now.expert);
        const [colour, ink] = first >= 0 && !away ? colours[first] : ["", ""];
        span.style.background = later ? `linear-gradient(to top, ${colours[now.expert][0]} 25%, transparent 25%)` : colour;
        span.style.color = ink;
        span.classList.toggle("faded", away && !later);
        span.classList.toggle("differs", pane.differs(now.layer, token));
      }
      if (at) {
        at.classList.remove("at");
        at.removeAttribute("aria-current");
        at.tabIndex = -1;
      }
      at = pane.holds(now.token) ? spans[now.token - pane.start] : null;
      if (at) {
        at.classList.add("at");
        at.setAttribute("aria-current", "true");
        at.tabIndex = 0;
        const room = at.parentElement, top = at.offsetTop;
        if (now.token !== before.token && (top < room.scrollTop || top + at.offsetHeight > room.scrollTop + room.clientHeight))
          room.scrollTop = top - room.clientHeight / 2;
      } else if (spans.length) spans[0].tabIndex = 0;
      before = { ...now, hits, same };
    },
  };
}

// One decision in full: what the router thinks of every expert, its neighbours, and the same token in other layers.
function card(model, pane, choose, ask) {
  const title = make("h3"), none = make("p", { class: "soft" }), experts = model.get("n_experts");
  const margin = make("p"), company = make("p"), strip = make("div", { class: "strip" });
  const sorted = experts > 16, few = 24;
  const slots = Array.from({ length: experts }, () => {
    const label = chip(model, 0, ""), place = make("small"), who = make("th", { scope: "row" }, label, place), cells = [0, 1, 2].map(() => {
      const number = make("b"), bar = make("i");
      return { number, bar, node: make("td", {}, make("div", {}, number, make("span", {}, bar))) };
    });
    return { label, place, cells, node: make("tr", { hidden: true }, who, cells.map(cell => cell.node)) };
  });
  const head = (name, why) => make("th", { scope: "col", title: why }, name);
  const table = make("div", { class: "bars", tabindex: 0, role: "region", "aria-label": "Every expert’s logit, probability and weight" },
    make("table", {},
      make("thead", {}, make("tr", {}, head("expert", sorted ? "The chosen ones first, then by probability." : null),
        head("logit", "How much the router wants this expert for this token: a score, before any softmax."),
        head("probability", "Softmax of the logits of all experts."),
        head("weight", "The share with which the expert’s answer counts: softmax of the chosen experts’ logits alone."))),
      make("tbody", {}, slots.map(slot => slot.node))));
  const squares = Array.from({ length: pane.layers }, (_, layer) =>
    make("button", { tabindex: -1, onclick: () => choose(null, layer) }, layer));
  strip.append(...squares);
  const body = make("div", {}, table, margin, company, make("p", { class: "soft" }, "This token in every layer"), strip);
  const node = make("section", { class: "card", "aria-label": "The chosen decision" + (pane.name ? ", " + pane.name : "") }, title, none, body);

  function fill(slot, expert, rank, numbers, limits) {
    const [colour, ink] = model.get("colours")[expert];
    slot.label.textContent = expert;
    slot.label.style.background = colour;
    slot.label.style.color = ink;
    slot.place.textContent = rank < 0 ? "" : ["1st", "2nd", "3rd"][rank] || rank + 1 + "th";
    slot.node.classList.toggle("won", rank >= 0);
    slot.cells.forEach(({ number, bar }, which) => {
      const value = numbers[which], [low, high] = limits[which];
      number.textContent = which === 0 ? fixed(value) : Number.isNaN(value) ? rank < 0 && which === 2 ? "" : "–" : percent(value);
      const drawn = Number.isFinite(value) && high > low;
      bar.style.background = colour;
      bar.style.left = drawn ? 100 * (Math.min(0, value) - low) / (high - low) + "%" : "0";
      bar.style.width = drawn ? Math.max(0, 100 * Math.abs(value) / (high - low)) + "%" : "0";
    });
  }

  function show(now) {
    const there = pane.holds(now.token);
    title.textContent = pane.name ? quoted(pane.name) + (there ? ": token " + quoted(pane.token(now.token)) : "") : "The decision";
    const all = there ? picks(pane, now.layer, now.token) : [];
    body.hidden = !all.length;
    none.hidden = all.length > 0;
    none.textContent = !there ? now.token < pane.length ? "Loading this part of the text …" : `This text has only ${many(pane.length, "token")}.`
      : pane.choices ? "Nothing was recorded for this token in this layer." : "A dense model: there is no router and nothing to decide.";
    if (!all.length) return;
    const { logits, said } = ask(pane, now);
    const scores = logits ? Array.from(logits) : Array(experts).fill(NaN), finite = scores.filter(Number.isFinite);
    const best = Math.max(...scores), powers = scores.map(score => Math.exp(score - best)), sum = powers.reduce((a, b) => a + b, 0);
    const chances = powers.map(power => power / sum), chosen = all.map(pick => pick.expert);
    const rank = expert => chosen.indexOf(expert);
    const order = Array.from({ length: experts }, (_, expert) => expert);
    if (sorted) order.sort((a, b) => (rank(a) < 0) - (rank(b) < 0) || (rank(a) >= 0 ? rank(a) - rank(b) : (chances[b] || 0) - (chances[a] || 0)) || a - b);
    const limits = [[Math.min(0, ...finite), Math.max(0, ...finite)], [0, 1], [0, Math.max(1, ...all.map(pick => pick.weight || 0))]];
    const lay = (from, to) => order.slice(from, to).forEach((expert, at) => {
      const weight = rank(expert) < 0 ? NaN : all[rank(expert)].weight;
      slots[from + at].node.hidden = false;
      fill(slots[from + at], expert, rank(expert), [scores[expert] ?? NaN, chances[expert] ?? NaN, weight], limits);
    });
    lay(0, few);
    for (const slot of slots.slice(few)) slot.node.hidden = true;
    if (table.scrollTop) table.scrollTop = 0;
    let laid = few;
    table.onscroll = () => {  // of hundreds of experts only those are laid out that are looked at
      if (laid < experts && table.scrollTop + table.clientHeight > table.scrollHeight - 100) lay(laid, laid += few);
    };
    margin.textContent = said || certainty(now, scores, chances, chosen);
    margin.classList.toggle("tie", pane.nearTie(now.layer, now.token));
    company.textContent = neighbours(now, chosen[0]);
    squares.forEach((square, layer) => {
      const [first, second] = picks(pane, layer, now.token), colours = model.get("colours");
      const [colour, ink] = first ? colours[first.expert] : ["var(--card)", "var(--soft)"];
      square.style.background = second ? `linear-gradient(to bottom, ${colour} 72%, ${colours[second.expert][0]} 72%)` : colour;
      square.style.color = ink;
      square.classList.toggle("same", Boolean(first) && first.expert === chosen[0]);
      square.setAttribute("aria-pressed", layer === now.layer);
      square.title = `Layer ${layer}: ${decision(pane, layer, now.token)}.`;
      square.setAttribute("aria-label", square.title);
    });
  }

  function certainty(now, scores, chances, chosen) {
    if (!chances.some(chance => !Number.isNaN(chance))) return "How close the choice was is not known without logits.";
    const out = chances.map((_, expert) => expert).filter(expert => !chosen.includes(expert));
    if (!out.length) return "Every expert is chosen, so none is left out.";
    const last = chosen.reduce((a, b) => chances[b] < chances[a] ? b : a), next = out.reduce((a, b) => chances[b] > chances[a] ? b : a);
    const points = fixed(Math.abs(100 * (chances[last] - chances[next])), 1), limit = 100 * model.get("near_tie");
    if (pane.nearTie(now.layer, now.token))
      return `Near-tie: expert ${last} was chosen and expert ${next} left out with only ${points} points of probability between them. Below ${limit} point, another dtype or machine may choose differently.`;
    if (scores[next] > scores[last])
      return `Not the router’s own choice: expert ${next} is ${points} points more probable than expert ${last}, which was chosen.`;
    return `No near-tie: ${points} points of probability between expert ${last}, chosen last, and expert ${next}, left out (a near-tie is below ${limit}).`;
  }

  function neighbours(now, first) {
    const { from, to } = run(pane, now.layer, now.token), before = now.token - from, after = to - now.token;
    const layers = squares.map((_, layer) => layer).filter(layer => layer !== now.layer && pane.expert(layer, now.token) === first);
    const sides = [before && many(before, "token") + " just before", after && many(after, "token") + " just after"].filter(Boolean);
    const near = sides.length ? `Expert ${first} is also first choice of ${listed(sides)}` : `No neighbour has expert ${first} as first choice here`;
    const deep = layers.length ? `, and of this token in layer${layers.length > 1 ? "s" : ""} ${listed(layers.map(String))}` : ", and this token has it in no other layer";
    return near + (sides.length || layers.length === 0 ? deep : deep.replace(", and of this token", "; of this token it is")) + ".";
  }

  return { node, show };
}

function render({ model, el }) {
  const root = frame(model, el, "router-explorer"), body = make("div", { class: "body" }), tip = hoverWords(root);
  const number = ++views, answered = new Map(), asked = new Map();
  let panes, grids, texts, cards, hits, sought = null, wide = null, waiting = false;
  root.append(body);

  const now = () => ({ token: model.get("selected_token"), layer: model.get("selected_layer"), expert: model.get("selected_expert") });
  const most = () => model.get("length") - 1;
  function choose(token, layer) {
    const { token: t, layer: l } = now(), values = {};
    if (token !== null && token !== undefined && token !== t) values.selected_token = Math.max(0, Math.min(token, most()));
    if (layer !== undefined && layer !== l) values.selected_layer = Math.max(0, Math.min(layer, model.get("n_layers") - 1));
    if (Object.keys(values).length) put(model, values);
  }

  // The logits of one decision: sent before, or to be asked of Python.
  function ask(pane, { layer, token }) {
    if (pane.logits) return { logits: pane.logits(layer, token) };
    if (!pane.has_logits) return {};
    const key = pane.at + "/" + token, kept = answered.get(key);
    if (kept) return { logits: kept.logits.subarray(layer * kept.width, (layer + 1) * kept.width) };
    if (!answers(model)) return { said: "Logits and probabilities were left out of this page, which would have been too large." };
    if (!asked.has(token)) {
      asked.set(token, Date.now());
      model.send({ token });
      setTimeout(update, PATIENCE + 10);
    }
    return { said: Date.now() - asked.get(token) < PATIENCE ? "Fetching the logits of this token …"
      : "Python does not answer: run this cell again for logits and probabilities." };
  }
  model.on("msg:custom", (message, buffers) => {
    if (message.pane === undefined) return;
    const [{ buffer, byteOffset, byteLength }] = buffers, logits = new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength));
    answered.set(message.pane + "/" + message.token, { logits, width: message.width });
    update();
  });

  const said = make("p", { class: "said", role: "status" });
  const about = make("div", { class: "about soft" }), compared = make("p", { class: "compared" });
  const legend = make("div", { class: "legend", role: "group", "aria-label": "Experts: choose one to see its tokens" });
  const share = make("p", { class: "soft share" });
  const chips = model.get("colours").map(([colour, ink], expert) => make("button", {
    class: "chip", style: `background:${colour};color:${ink}`, "aria-pressed": "false", "aria-label": "expert " + expert,
    onclick: () => put(model, { selected_expert: model.get("selected_expert") === expert ? null : expert }),
  }, model.get("colours").length > 16 ? expert : "expert\u00a0" + expert));
  legend.append(...chips);
  const radios = Array.from({ length: model.get("n_layers") }, (_, layer) =>
    make("input", { type: "radio", name: "layer-" + number, value: layer, "aria-label": "layer " + layer, onchange: () => choose(null, layer) }));
  const layerRow = make("fieldset", { "aria-label": "Layer" }, make("b", { "aria-hidden": "true" }, "Layer"),
    radios.map((radio, layer) => make("label", {}, radio, make("span", {}, layer))));
  const field = make("input", { type: "search", placeholder: "a word in the text", "aria-label": "Search a token; Enter goes to the next",
    oninput: () => put(model, { search: field.value }), onkeydown: event => {
      if (event.key === "Enter") { event.preventDefault(); next(hits.starts, event.shiftKey); }
    } });
  const matches = make("output", { class: "soft", "aria-live": "polite" });
  const zoom = slider({ label: "Cell width", min: 1, max: 32, value: 10, show: pixels => pixels + "\u00a0px", oninput(pixels) { wide = pixels; fit(); update(); } });
  const nextDifference = make("button", { onclick: () => next(differences()) }, "Next difference");
  const earlier = make("button", { onclick: () => choose(panes.start - 1) }), later = make("button", { onclick: () => choose(panes.stop) });
  const which = make("span", { class: "soft" }), parts = make("div", { class: "row parts" }, earlier, which, later);
  const controls = make("div", { class: "row" }, layerRow, make("label", { class: "search" }, make("b", {}, "Search"), field), matches, zoom);
  const maps = make("div", { class: "maps" }), lower = make("div", { class: "lower" });
  const caption = make("p", { class: "soft caption" });
  const help = make("p", { class: "soft help" }, "Click a cell or a token. ", make("kbd", {}, "←"), " ", make("kbd", {}, "→"), " move along the text, ",
    make("kbd", {}, "↑"), " ", make("kbd", {}, "↓"), " through the layers, ", make("kbd", {}, "Home"), " ", make("kbd", {}, "End"), " to its ends; ",
    make("kbd", {}, "Esc"), " lets go of an expert.");
  body.append(about, legend, share, compared, controls, parts, maps, caption, said, lower, help);

  // Tokens at which the two traces take other experts in this layer.
  function differences() {
    const { layer } = now();
    return Array.from({ length: panes[0].n }, (_, index) => index + panes.start).filter(token => panes[0].differs(layer, token));
  }
  function next(tokens, back = false) {
    if (!tokens.length) return;
    const { token } = now();
    choose(back ? [...tokens].reverse().find(one => one < token) ?? tokens[tokens.length - 1] : tokens.find(one => one > token) ?? tokens[0]);
  }

  function fit() {
    const room = Math.min(...grids.map(one => one.room())), n = Math.max(...panes.map(pane => pane.n));
    if (!room || !Number.isFinite(room) || !n) return;
    const pixels = wide || Math.max(3, Math.min(26, room / n));
    zoom.put(Math.round(pixels));
    zoom.hidden = n * 26 <= room;
    for (const one of grids) one.widen(pixels);
  }

  function build() {
    const focused = [maps, lower].findIndex(node => node.contains(node.getRootNode().activeElement));
    panes = readPanes(model);
    const routed = panes.filter(pane => pane.choices && pane.n);
    grids = routed.map(pane => grid(model, pane, (token, layer) => choose(token, layer), tip, left => grids.forEach(other => other.scroll(left))));
    texts = panes.map(pane => text(model, pane, choose, tip));
    cards = panes.map(pane => card(model, pane, choose, ask));
    sought = null;
    about.replaceChildren(...panes.map(pane => make("div", {}, pane.name ? make("b", {}, quoted(pane.name) + ": ") : "", pane.about)));
    maps.replaceChildren(...grids.map((one, at) => make("div", {}, routed[at].name ? make("h3", {}, quoted(routed[at].name)) : "", one.node)));
    lower.replaceChildren(make("div", { class: "texts" }, texts.map(one => one.node)), make("div", { class: "cards" }, cards.map(one => one.node)));
    for (const node of [maps, lower]) node.classList.toggle("two", panes.length > 1);
    const routers = routed.length > 0, deep = Math.max(0, ...routed.map(pane => pane.choices));
    for (const node of [legend, layerRow, maps, caption, zoom]) node.hidden = !routers;
    compared.textContent = model.get("comparison");
    compared.hidden = nextDifference.hidden = panes.length < 2;
    if (panes.length > 1) compared.append(" ", nextDifference);
    caption.replaceChildren("A column per token, a row per layer. " + (deep > 1 ? "Upper part of a cell: first choice; lower part: second. " : "A cell has the colour of the expert chosen. ") +
      (routed.some(pane => pane.weighted) ? "The fainter, the less weight. " : "") + (routed.some(pane => pane.has_logits) ? "A dot, where cells are wide enough: a near-tie. " : "") +
      (routed.some(pane => pane.n_prompt > 0 && pane.n_prompt < pane.length) ? "The line: the model starts to write. " : ""),
      panes.length > 1 ? make("span", { class: "purple" }, "Purple over a cell: the two take other experts.") : "");
    const all = model.get("length"), here = panes.start > 0 || panes.stop < all, alone = !answers(model);
    parts.hidden = !here;
    which.textContent = `Tokens ${panes.start.toLocaleString("en")} to ${(panes.stop - 1).toLocaleString("en")} of ${all.toLocaleString("en")}.` +
      (alone ? " The others were left out of this page, which would have been too large." : "");
    earlier.textContent = "◂ Earlier";
    later.textContent = "Later ▸";
    earlier.disabled = alone || panes.start === 0;
    later.disabled = alone || panes.stop >= all;
    fit();
    update();
    if (focused === 0) grids[0].canvas.focus({ preventScroll: true });
    if (focused === 1) texts[0].focus();
  }

  function update() {
    waiting = false;
    const selected = now(), query = model.get("search");
    if (query !== sought) {
      sought = query;
      hits = found(panes, query);
      if (field.value !== query) field.value = query;
    }
    const at = hits.starts.indexOf(selected.token);
    matches.textContent = !query ? "" : !hits.starts.length ? "no match" : (at < 0 ? "" : at + 1 + " of ") + hits.starts.length.toLocaleString("en") + (hits.starts.length === 1 ? " match" : " matches") +
      (parts.hidden ? "" : " in the tokens shown");
    radios.forEach((radio, layer) => { radio.checked = layer === selected.layer; });
    chips.forEach((one, expert) => one.setAttribute("aria-pressed", expert === selected.expert));
    share.textContent = portion(selected.expert);
    share.hidden = selected.expert === null;
    nextDifference.disabled = !differences().length;
    for (const part of [...grids, ...texts]) part.show(selected, hits);
    for (const one of cards) one.show(selected);
    said.textContent = sentence(selected);
  }

  // How often an expert is chosen, in words.
  function portion(expert) {
    if (expert === null) return "";
    return panes.filter(pane => pane.choices).map(pane => {
      let first = 0, later = 0;
      const values = pane.experts.values;
      for (let at = 0; at < values.length; at++) if (values[at] === expert) at % pane.choices ? later++ : first++;
      return `${pane.name ? "In " + quoted(pane.name) + " e" : "E"}xpert ${expert} is first choice in ${first.toLocaleString("en")} of ${many(values.length / pane.choices, "decision")} (${percent(first / (values.length / pane.choices))})` +
        (pane.choices > 1 ? ` and a later choice in ${later.toLocaleString("en")}.` : ".");
    }).join(" ");
  }

  function sentence(selected) {
    const here = panes.filter(pane => pane.holds(selected.token));
    if (!here.length) return "Loading this part of the text …";
    if (panes.length === 1) {
      const [pane] = here, id = pane.ids[selected.token - pane.start];
      return `${named(pane, selected.token)}${id === undefined ? "" : ` (id ${id})`}, ${origin(pane, selected.token)}. ` +
        (pane.choices ? `Layer ${selected.layer}: ${decision(pane, selected.layer, selected.token)}.` : "No router decides: the model is dense or its routing was not recorded.");
    }
    const same = here.length < 2 || !here[0].differs(selected.layer, selected.token);
    return `Token ${selected.token}, layer ${selected.layer}. ` + here.map(pane =>
      `In ${quoted(pane.name)}, ${quoted(pane.token(selected.token))}: ${decision(pane, selected.layer, selected.token)}.`).join(" ") +
      (here.length < 2 ? "" : same ? " The same experts." : " Other experts.");
  }

  body.addEventListener("keydown", event => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.key === "Escape" && model.get("selected_expert") !== null && event.target !== field) put(model, { selected_expert: null });
    const inText = event.target.token !== undefined, inside = inText || event.target.tagName === "CANVAS";
    const step = inside && { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], Home: [-Infinity, 0], End: [Infinity, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    tip.hide();
    const { token, layer } = now(), side = inText ? texts.findIndex(one => one.node.contains(event.target)) : -1;
    choose(Math.max(0, Math.min(token + step[0], most())), Math.max(0, Math.min(layer + step[1], model.get("n_layers") - 1)));
    if (inText) queueMicrotask(() => texts[side].focus());  // after the update
  });

  const soon = () => { if (!waiting) { waiting = true; queueMicrotask(update); } };
  model.on("change:selected_token change:selected_layer change:selected_expert change:search", soon);
  model.on("change:data", build);
  new ResizeObserver(() => { fit(); update(); }).observe(maps);
  new MutationObserver(() => grids.forEach(one => one.draw())).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  build();
}

export default { render };
