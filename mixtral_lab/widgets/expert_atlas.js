const share = value => Number.isNaN(value) ? "no share" : fixed(100 * value, 1) + "\u00a0%";
const whole = value => Number.isNaN(value) ? "" : String(Math.round(100 * value));
const nth = rank => ["first", "second", "third"][rank] || `${rank + 1}th`;
const plain = token => token.replaceAll("␣", " ");
const listed = words => words.length < 2 ? words.join("") : words.slice(0, -1).join(", ") + " and " + words.at(-1);
const MOST_PAIRED = 64;  // experts: for more of them there is no table of pairs
let made = 0;  // elements that were given an id

// What the study counted, as functions of layer, expert and domain (-1: all). Without a count: NaN; not here: undefined.
function study(model) {
  const about = model.get("about"), data = unpack(model), [first, end] = model.get("held"), tokens = model.get("tokens");
  const { layers, experts, choices } = about;
  const read = (name, ...index) => {
    const { shape, values } = data[name];
    return values[index.reduce((at, one, axis) => at * shape[axis] + one, 0)];
  };
  const among = array => array.reduce((sum, one) => sum + one, 0);
  const all = Array.from({ length: experts }, (_, expert) => expert);
  const taken = (layer, rank, expert) => data.taken.values[(layer * data.taken.shape[1] + rank) * experts + expert];
  const totals = Array.from({ length: layers }, (_, layer) =>
    Array.from({ length: data.taken.shape[1] }, (_, rank) => among(all.map(expert => taken(layer, rank, expert)))));
  const holds = layer => layer >= first && layer < end;
  const usual = (layer, expert) => taken(layer, 0, expert) / totals[layer][0];
  const pair = layer => layer - Math.max(first - 1, 0);  // of the layers `layer` and `layer + 1`
  const goes = (layer, from, to) => taken(layer, 0, from) ? data.moved.values[(pair(layer) * experts + from) * experts + to] : 0;
  return {
    ...about, all, holds, held: [first, end], taken, usual, goes, even: 1 / experts,
    ranks: choices > 1 ? ["all choices", "the first choices", "the second choices"] : ["all choices"],
    share(layer, expert, domain = -1, rank = 0) {
      if (domain < 0) return taken(layer, rank, expert) / totals[layer][rank];
      return holds(layer) ? read("shares", domain, layer - first, rank, expert) : undefined;
    },
    together: (layer, expert, other) => read("together", layer - first, expert, other),
    // Of what an expert reads, the share that comes from each expert of the layer below.
    came(layer, to) {
      const parts = all.map(from => goes(layer - 1, from, to) * taken(layer - 1, 0, from));
      const sum = among(parts);
      return parts.map(part => sum ? part / sum : NaN);
    },
    liked(layer, expert) {
      const found = [];
      for (let nth = 0; nth < data.liked.shape[2]; nth++) {
        const at = [layer - first, expert, nth], token = read("liked", ...at);
        if (token < 0) break;
        const count = read("liked_counts", ...at), occurrences = read("liked_occurrences", ...at);
        const places = [];
        for (let slot = 0; slot < data.liked_places.shape[3]; slot++) {
          const place = read("liked_places", ...at, slot);
          if (place >= 0) places.push({
            domain: read("place_domains", place), rank: read("liked_ranks", ...at, slot),
            words: Array.from({ length: data.places.shape[1] }, (_, near) => tokens[read("places", place, near)]),
          });
        }
        found.push({ token: tokens[token], count, occurrences, lift: count / occurrences / (choices * usual(layer, expert)), places });
      }
      return found;
    },
  };
}

// A table of small cells that answers to clicks and arrow keys. `cell(row, column)` gives { text, style, kind } and
// `words(row, column)` says the same in a sentence, for whoever points at the cell or chooses it.
function cellTable({ key, label, rows, columns, step = 1, bare = false, rowHead, columnHead, cell, words, pick }) {
  const name = "atlas" + made++;
  const grid = make("div", { role: "grid", tabindex: 0, "data-key": key, class: "cells" + (bare ? " bare" : ""), "aria-label": label,
    style: `grid-template-columns:${rowHead ? "max-content " : ""}repeat(${columns},minmax(0,1fr))` });
  const cells = [];
  if (columnHead) {
    const heads = make("div", { role: "row", class: "line" });
    if (rowHead) heads.append(make("span", { class: "head" }));
    for (let column = 0; column < columns; column++)
      heads.append(make("span", { role: "columnheader", class: "head" }, column % step ? "" : columnHead(column)));
    grid.append(heads);
  }
  for (let row = 0; row < rows; row++) {
    const line = make("div", { role: "row", class: "line" });
    if (rowHead) line.append(rowHead(row));
    for (let column = 0; column < columns; column++) {
      const { text = "", style = "", kind = "" } = cell(row, column), one = document.createElement("div");
      one.className = "cell " + kind;
      one.setAttribute("role", "gridcell");
      one.setAttribute("style", style);
      if (!bare) one.textContent = text;
      one.words = () => words(row, column);
      cells.push(one);
      line.append(one);
    }
    grid.append(line);
  }
  let chosen = [0, 0], outlined;
  grid.addEventListener("click", event => {
    const at = cells.indexOf(event.target.closest(".cell"));
    if (at >= 0) pick(Math.floor(at / columns), at % columns);
  });
  grid.addEventListener("keydown", event => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const row = Math.min(Math.max(chosen[0] + by[0], 0), rows - 1), column = Math.min(Math.max(chosen[1] + by[1], 0), columns - 1);
    if (row !== chosen[0] || column !== chosen[1]) pick(row, column);
  });
  const mark = (row, column) => {
    if (outlined) {
      outlined.classList.remove("chosen");
      for (const name of ["aria-selected", "aria-label", "id"]) outlined.removeAttribute(name);
    }
    outlined = cells[row * columns + column];
    outlined.classList.add("chosen");
    outlined.id = name;
    outlined.setAttribute("aria-label", outlined.words());
    outlined.setAttribute("aria-selected", "true");
    chosen = [row, column];
    grid.setAttribute("aria-activedescendant", name);
  };
  return Object.assign(grid, { mark });
}

// How a share looks against the usual one: purple is more, orange less; `most` is the largest difference of the table.
function heat(value, usual, most) {
  if (value === undefined || Number.isNaN(value)) return { kind: "none" };
  const strength = most ? Math.min(Math.abs(value - usual) / most, 1) * 0.92 : 0;
  const kind = (value < usual ? "less" : "more") + (strength > 0.68 ? " strong" : "");
  return { kind, style: `--strength:${strength.toFixed(3)}` };
}

// A bar that fills so much of a cell from below, and a line across at what is even.
function barStyle(high, even, colour) {
  const top = (100 * (high || 0)).toFixed(2) + "%";
  return `background:linear-gradient(var(--mark),var(--mark)) 0 ${(100 * (1 - even)).toFixed(2)}%/100% 1px no-repeat,linear-gradient(to top,${colour} ${top},transparent ${top})`;
}

// The legend of such a table.
function heatKey(words) {
  const swatch = kind => make("i", { class: "swatch cell " + kind, style: "--strength:.6" });
  return make("p", { class: "soft key" }, swatch("less"), "less ", swatch("none"), words + " ", swatch("more"), "more");
}

function render({ model, el }) {
  const root = frame(model, el, "expert-atlas");
  if (!model.get("about").layers) return;
  let know = study(model);
  const { layers, experts, all, even, ranks } = know;
  const domains = model.get("domains");
  const total = know.tokens.reduce((sum, one) => sum + one, 0);
  const colour = expert => model.get("colours")[expert][0];
  let rank = 0, token = 0;

  const layerNow = () => model.get("selected_layer"), expertNow = () => model.get("selected_expert");
  const domainNow = () => model.get("selected_domain") === null ? -1 : domains.indexOf(model.get("selected_domain"));
  const choose = ({ layer = layerNow(), expert = expertNow(), domain = domainNow() }) => put(model, {
    selected_layer: layer, selected_expert: expert, selected_domain: domain < 0 ? null : domains[domain] });
  const domainName = domain => domain < 0 ? "all domains" : domains[domain];
  const notHere = layer => answers(model) ? `Layer ${layer} is on its way.`
    : `This page holds layers ${know.held[0]} to ${know.held[1] - 1} in full; of layer ${layer} only the shares over all domains. In a notebook all answer.`;

  // A chip that chooses its expert.
  const expertChip = (expert, layer, text = "expert\u00a0" + expert) => {
    const [back, ink] = model.get("colours")[expert];
    return make("button", { class: "chip", style: `background:${back};color:${ink}`, tabindex: layer === undefined ? -1 : 0,
      "aria-label": `Choose expert ${expert} of layer ${layer ?? layerNow()}`, onclick: () => choose({ expert, layer }) }, text);
  };
  const rowChip = expert => make("span", { class: "head", role: "rowheader" }, expertChip(expert, undefined, experts > 16 ? expert : undefined));

  // The controls.
  const layerSlider = slider({ label: "Layer", min: 0, max: layers - 1, value: layerNow(), oninput: layer => choose({ layer }) });
  layerSlider.input.disabled = layers === 1;
  const domainList = make("select", { "aria-label": "Domain", onchange: event => choose({ domain: Number(event.target.value) }) },
    [-1, ...domains.keys()].map(domain => make("option", { value: domain }, domainName(domain))));
  const rankButtons = ranks.map((name, at) => make("button", { "aria-pressed": at === rank, onclick: () => { rank = at; draw(); } }, name.replace("the ", "")));
  const chips = all.map(expert => make("button", { role: "radio", class: "chip", onclick: () => choose({ expert }),
    style: `background:${colour(expert)};color:${model.get("colours")[expert][1]}`, "aria-label": `expert ${expert}` }, expert));
  const expertRow = make("div", { role: "radiogroup", "aria-label": "Expert", class: "experts", onkeydown: event => {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    choose({ expert: (expertNow() + by + experts) % experts });
    chips[expertNow()].focus();
  } }, chips);
  const status = make("p", { role: "status", class: "now" });
  root.append(
    make("p", { class: "soft" }, `${know.model} in ${know.dtype}: ${many(layers, "layer")} of ${many(experts, "expert")}, ${know.choices} for each token. `
      + `Read: ${many(total, "token")} of ${many(domains.length, "domain")}. Choose an expert by anything of its colour, or with arrow keys.`),
    make("div", { class: "row" },
      layerSlider,
      make("label", { class: "field" }, "Domain", domainList),
      ranks.length > 1 ? make("span", { class: "row tight", role: "group", "aria-label": "Which choices count" }, rankButtons) : null),
    make("div", { class: "row" }, make("span", { class: "field" }, "Expert"), expertRow),
    status);

  // The parts. Each is drawn anew only when what it depends on has changed.
  const parts = [];
  const part = (box, needs, fill, after) => parts.push({ box, needs, fill, after, drawn: undefined });
  const card = (kind, title) => make("section", { class: "card " + kind, "aria-label": title });
  const used = card("used", "Which expert is used where"), reads = card("reads", "Which domain goes to whom");
  const company = card("company", "Chosen together"), flow = card("flow", "From layer to layer"), about = card("about", "The chosen expert");
  root.append(make("div", { class: "sheet" }, make("div", { class: "atlas" },
    make("div", { class: "column" }, used, reads, flow), make("div", { class: "column" }, about, company))));

  // Expert by layer.
  part(used, () => [domainNow(), rank, know.held], box => {
    const domain = domainNow();
    const shares = all.map(expert => Array.from({ length: layers }, (_, layer) => know.share(layer, expert, domain, rank)));
    const most = Math.max(...shares.flat().filter(Number.isFinite).map(one => Math.abs(one - even)), 0);
    const lacking = shares[0].some(one => one === undefined);
    const table = cellTable({
      label: `Share of ${ranks[rank]} by expert (rows) and layer (columns), ${domainName(domain)}`,
      rows: experts, columns: layers, step: Math.ceil(layers / 12), bare: layers > 10 || experts > 16,
      rowHead: rowChip,
      columnHead: String,
      cell: (expert, layer) => {
        const value = shares[expert][layer];
        return { ...heat(value, even, most), text: value === undefined ? "" : whole(value) };
      },
      words: (expert, layer) => shares[expert][layer] === undefined ? notHere(layer)
        : `Expert ${expert} in layer ${layer}: ${share(shares[expert][layer])} of ${ranks[rank]}, ${domainName(domain)}. If all experts were used alike: ${share(even)}`,
      pick: (expert, layer) => choose({ expert, layer }),
    });
    table.classList.toggle("many", experts > 16);
    box.replaceChildren(make("h3", {}, "Which expert is used where"),
      make("p", { class: "soft" }, `Share of ${ranks[rank]} in %, ${domainName(domain)}; a column is a layer.`), table,
      heatKey(`than ${share(even)}, even use`), lacking ? make("p", { class: "soft" }, notHere(layerNow())) : "");
    box.table = table;
  }, box => box.table.mark(expertNow(), layerNow()));

  // Domain by expert, as bars; the line across each row is even use.
  part(reads, () => [layerNow(), rank, know.held], box => {
    const layer = layerNow(), rows = domains.length > 1 ? [-1, ...domains.keys()] : [0];
    const head = [make("h3", {}, `Which domain goes to whom in layer ${layer}`)];
    box.table = undefined;
    if (!know.holds(layer)) return box.replaceChildren(...head, make("p", { class: "soft" }, notHere(layer)));
    const value = (row, expert) => know.share(layer, expert, rows[row], rank);
    const most = Math.max(...rows.flatMap((_, row) => all.map(expert => value(row, expert))).filter(Number.isFinite), even) * 1.04;
    box.table = cellTable({
      label: `Share of ${ranks[rank]} in layer ${layer} by domain (rows) and expert (columns)`, rows: rows.length, columns: experts,
      step: Math.ceil(experts / 16),
      rowHead: row => make("span", { class: "head", role: "rowheader" }, make("button", { class: "name", tabindex: -1, title: domainName(rows[row]),
        onclick: () => choose({ domain: rows[row] }) }, domainName(rows[row]))),
      columnHead: String,
      cell: (row, expert) => ({ kind: "bar", style: barStyle(value(row, expert) / most, even / most, colour(expert)) }),
      words: (row, expert) => `${domainName(rows[row])}, layer ${layer}: expert ${expert} has ${share(value(row, expert))} of ${ranks[rank]}. The line is even use, ${share(even)}`,
      pick: (row, expert) => choose({ domain: rows[row], expert }),
    });
    box.rows = rows;
    box.replaceChildren(...head, make("p", { class: "soft" }, `Share of ${ranks[rank]}; the highest bar is ${share(most / 1.04)}. Line: ${share(even)}, even use.`),
      make("div", { class: "scroll", tabindex: rows.length > 16 ? 0 : undefined }, box.table));
  }, box => box.table && box.table.mark(box.rows.indexOf(domainNow()) < 0 ? 0 : box.rows.indexOf(domainNow()), expertNow()));

  // Expert by expert: chosen in one token.
  part(company, () => [layerNow(), know.held], box => {
    const layer = layerNow();
    box.table = undefined;
    const head = [make("h3", {}, `Chosen together in layer ${layer}`)];
    if (know.choices < 2) return box.replaceChildren(...head, make("p", { class: "soft" }, "Every token has one choice only, so no two experts meet in a token."));
    if (!know.holds(layer)) return box.replaceChildren(...head, make("p", { class: "soft" }, notHere(layer)));
    if (experts > MOST_PAIRED) return box.replaceChildren(...head, make("p", { class: "soft" }, `A table of ${experts} by ${experts} cells could not be read: the card of an expert names its company.`));
    const blind = (know.choices - 1) / (experts - 1);
    const value = (expert, other) => expert === other ? NaN : know.together(layer, expert, other);
    const most = Math.max(...all.flatMap(expert => all.map(other => value(expert, other))).filter(Number.isFinite).map(one => Math.abs(one - blind)), 0);
    box.table = cellTable({
      label: `Of the tokens that chose an expert (rows), the share that also chose another (columns), layer ${layer}`,
      rows: experts, columns: experts, step: Math.ceil(experts / 16), bare: experts > 12,
      rowHead: rowChip,
      columnHead: String,
      cell: (expert, other) => ({ ...heat(value(expert, other), blind, most), text: whole(value(expert, other)) }),
      words: (expert, other) => expert === other
        ? `Expert ${expert}: ${many(know.taken(layer, 0, expert), "token")} chose it in layer ${layer}`
        : `Of the ${many(know.taken(layer, 0, expert), "token")} that chose expert ${expert}, ${share(value(expert, other))} also chose expert ${other}; by blind choice ${share(blind)}`,
      pick: (expert, other) => choose({ expert: expert === expertNow() ? other : expert }),
    });
    box.table.classList.toggle("many", experts > 16);
    box.replaceChildren(...head, make("p", { class: "soft" }, "Of the tokens that chose the row's expert, how many % also chose the column's; all domains."),
      box.table, heatKey(`than ${share(blind)}, blind choice`));
  }, box => box.table && box.table.mark(expertNow(), expertNow()));

  // Where tokens come from and go to, as ribbons between the layers.
  part(flow, () => [layerNow(), expertNow(), know.held], box => {
    const layer = layerNow(), expert = expertNow();
    const head = [make("h3", {}, layers === 1 ? "From layer to layer" : `Through layer ${layer}, from layer to layer`)];
    if (layers === 1) return box.replaceChildren(...head, make("p", { class: "soft" }, "The model has one layer, so nothing goes from layer to layer."));
    if (!know.holds(layer)) return box.replaceChildren(...head, make("p", { class: "soft" }, notHere(layer)));
    const few = experts <= 12;
    box.replaceChildren(...head, make("p", { class: "soft" },
      `Width: share of the layer's choices, all domains. ${few ? "Strong" : "Drawn"}: expert ${expert} of layer ${layer}. A ribbon has the colour of where it comes from.`),
      ribbons(layer, expert, few));
  });

  function ribbons(layer, expert, few) {
    const shown = [layer - 1, layer, layer + 1].filter(one => one >= 0 && one < layers);
    const wide = 440, thick = 26, top = 20, gap = few ? 6 : 1.5, high = few ? 260 : Math.max(300, experts * 7);
    const x = column => shown.length === 1 ? 0 : column * (wide - thick) / (shown.length - 1);
    const room = high - gap * (experts - 1);
    const node = shown.map(one => {
      let y = top;
      return all.map(e => {
        const tall = room * know.usual(one, e), at = { y, tall, out: y, in: y };
        y += tall + gap;
        return at;
      });
    });
    const drawing = make("svg", { viewBox: `0 0 ${wide} ${high + top + 2}`, role: "group",
      "aria-label": `Where the tokens of expert ${expert} in layer ${layer} come from and go to; the numbers stand in its card` });
    shown.forEach((one, column) => drawing.append(make("text", { class: "head", y: 11, "text-anchor": column === 0 ? "start" : column === shown.length - 1 ? "end" : "middle",
      x: column === 0 ? 0 : column === shown.length - 1 ? wide : x(column) + thick / 2 }, `layer ${one}`)));
    const behind = make("g"), before = make("g");
    for (let column = 0; column < shown.length - 1; column++)
      for (const from of all) for (const to of all) {
        const below = shown[column], going = know.goes(below, from, to);
        const tall = room * know.usual(below, from) * going;
        const a = node[column][from], b = node[column + 1][to], y0 = a.out, y1 = b.in;
        a.out += tall;
        b.in += tall;
        const mine = below === layer ? from === expert : to === expert;
        if (tall < 0.05 || !(mine || few)) continue;
        const left = x(column) + thick, right = x(column + 1), middle = (left + right) / 2;
        (mine ? before : behind).append(make("path", { class: "ribbon" + (mine ? " mine" : ""), fill: colour(from), stroke: colour(from),
          d: `M${left} ${y0}C${middle} ${y0} ${middle} ${y1} ${right} ${y1}V${y1 + tall}C${middle} ${y1 + tall} ${middle} ${y0 + tall} ${left} ${y0 + tall}Z`,
          "aria-label": `Of what expert ${from} reads in layer ${below}, ${share(going)} goes to expert ${to} in layer ${below + 1}, which has ${share(know.usual(below + 1, to))} of everything there`,
          onclick: () => choose({ layer: below, expert: from }) }));
      }
    drawing.append(behind, before);
    shown.forEach((one, column) => all.forEach(e => {
      const { y, tall } = node[column][e], here = one === layer && e === expert;
      const group = make("g", { class: "node", onclick: () => choose({ layer: one, expert: e }),
        "aria-label": `Expert ${e} of layer ${one} has ${share(know.usual(one, e))} of all choices. Click to look at it` },
      make("rect", { x: x(column), y, width: thick, height: Math.max(tall, 0.5), fill: colour(e), class: here ? "chosen" : "" }));
      if (tall >= 11) group.append(make("text", { x: x(column) + thick / 2, y: y + tall / 2 + 4, "text-anchor": "middle", fill: model.get("colours")[e][1] }, e));
      drawing.append(group);
    }));
    return drawing;
  }

  // Lines of a name, a bar and a number; a tick marks what is usual.
  const bars = (lines, fill, kind = "") => {
    const most = Math.max(...lines.map(line => Math.max(line.value || 0, line.usual || 0)), 1e-9);
    return make("div", { class: "bars " + kind }, lines.map(line => make("div", { class: "line" + (line.chosen ? " chosen" : ""), "aria-label": line.words, role: "group" },
      make("span", { class: "label" }, line.label),
      make("span", { class: "track" },
        make("i", { class: "fill", style: `width:${100 * (line.value || 0) / most}%;background:${line.fill || fill}` }),
        line.usual === undefined ? null : make("i", { class: "tick", style: `left:${100 * line.usual / most}%` })),
      make("span", { class: "number" }, share(line.value)))));
  };
  const block = (title, ...inside) => make("div", { class: "block" }, make("h4", {}, title), ...inside);
  const sorted = lines => lines.sort((a, b) => (b.value || 0) - (a.value || 0));

  part(about, () => [layerNow(), expertNow(), domainNow(), know.held], box => {
    const layer = layerNow(), expert = expertNow(), domain = domainNow(), here = know.holds(layer);
    const fill = colour(expert), words = [inWords(layer, expert, domain)];
    const blocks = [];
    const took = know.taken(layer, 0, expert);
    const most = Math.max(...Array.from({ length: layers }, (_, one) => know.share(one, expert, domain)).filter(Number.isFinite), even) * 1.04;
    const byLayer = cellTable({
      key: "by-layer",
      label: `Share of all choices of expert ${expert} by layer, ${domainName(domain)}`, rows: 1, columns: layers, step: Math.ceil(layers / 12),
      columnHead: String, bare: true,
      cell: (_, one) => ({ kind: "bar", style: barStyle(know.share(one, expert, domain) / most, even / most, fill) }),
      words: (_, one) => know.share(one, expert, domain) === undefined ? notHere(one)
        : `Layer ${one}: expert ${expert} has ${share(know.share(one, expert, domain))} of all choices, ${domainName(domain)}; even use ${share(even)}`,
      pick: (_, one) => choose({ layer: one }),
    });
    byLayer.mark(0, layer);
    blocks.push(block("By layer", byLayer));
    if (ranks.length > 1 && (here || domain < 0)) blocks.push(block("First and second choice", bars(ranks.map((name, at) => ({
      label: name.replace(/the | choices/g, ""), value: know.share(layer, expert, domain, at), usual: even,
      words: `${share(know.share(layer, expert, domain, at))} of ${name} in layer ${layer}, ${domainName(domain)}; even use ${share(even)}` })), fill)));
    if (here) {
      const byDomain = sorted(domains.map((name, at) => ({ label: make("button", { class: "name", title: name, tabindex: -1, onclick: () => choose({ domain: at }) }, name),
        value: know.share(layer, expert, at), usual: even, chosen: at === domain, name,
        words: `${name}: ${share(know.share(layer, expert, at))} of its choices in layer ${layer} go to expert ${expert}; even use ${share(even)}` })));
      blocks.push(block("By domain", make("div", { class: "scroll low", tabindex: domains.length > 10 ? 0 : undefined }, bars(byDomain, fill, "named"))));
      if (took && know.choices > 1) {
        const blind = (know.choices - 1) / (experts - 1);
        blocks.push(block("In company of", bars(sorted(all.filter(other => other !== expert).map(other => ({ label: expertChip(other, layer), fill: colour(other),
          value: know.together(layer, expert, other), usual: blind,
          words: `${share(know.together(layer, expert, other))} of the tokens of expert ${expert} also chose expert ${other}; by blind choice ${share(blind)}` }))).slice(0, 5))));
      }
      if (took && layer > 0) blocks.push(block(`Comes from layer ${layer - 1}`, bars(sorted(know.came(layer, expert).map((value, from) => ({
        label: expertChip(from, layer - 1), fill: colour(from), value, usual: know.usual(layer - 1, from),
        words: `${share(value)} of what expert ${expert} reads comes from expert ${from} of layer ${layer - 1}, which has ${share(know.usual(layer - 1, from))} of everything there` }))).slice(0, 5))));
      if (took && layer < layers - 1) blocks.push(block(`Goes to layer ${layer + 1}`, bars(sorted(all.map(to => ({
        label: expertChip(to, layer + 1), fill: colour(to), value: know.goes(layer, expert, to), usual: know.usual(layer + 1, to),
        words: `${share(know.goes(layer, expert, to))} of what expert ${expert} reads goes on to expert ${to} of layer ${layer + 1}, which has ${share(know.usual(layer + 1, to))} of everything there` }))).slice(0, 5))));
    } else words.push(make("p", { class: "soft" }, notHere(layer)));
    token = here ? Math.max(know.liked(layer, expert).findIndex(one => one.places.length), 0) : 0;
    box.replaceChildren(
      make("h3", { class: "title" }, chip(model, expert), ` in layer ${layer}, ${domainName(domain)}`),
      ...words, make("div", { class: "blocks" }, blocks), here ? favourites(layer, expert) : "",
      make("p", { class: "soft" }, "Ticks and lines: what even use, blind choice, or the share of everything there would give. Company, neighbours in depth and tokens: all domains."));
  });

  // Everything about an expert, in sentences.
  function inWords(layer, expert, domain) {
    const name = `Expert ${expert}`, said = [];
    const took = know.taken(layer, 0, expert), value = know.share(layer, expert, domain);
    if (!took) return make("p", { class: "words" }, `No token chose expert ${expert} in layer ${layer}.`);
    if (value !== undefined && !Number.isNaN(value)) {
      const by = ranks.length > 1 ? `: ${share(know.share(layer, expert, domain, 1))} of the first and ${share(know.share(layer, expert, domain, 2))} of the second` : "";
      said.push(`${name} has ${share(value)} of all choices in layer ${layer}, ${domainName(domain)}${by}. Even use would be ${share(even)}.`);
    }
    said.push(`${took.toLocaleString("en")} of ${many(total, "token")} chose it.`);
    if (know.holds(layer)) {
      const order = [...domains.keys()].sort((a, b) => know.share(layer, expert, b) - know.share(layer, expert, a));
      if (domains.length > 1) said.push(`Its share is largest in ${domains[order[0]]} (${share(know.share(layer, expert, order[0]))}) and smallest in ${domains[order.at(-1)]} (${share(know.share(layer, expert, order.at(-1)))}).`);
      const best = know.liked(layer, expert).slice(0, 3).map(one => quoted(one.token));
      if (best.length) said.push(`It likes ${listed(best)}.`);
      const top = values => values.reduce((best, one, at) => one > values[best] ? at : best, 0);
      if (know.choices > 1) {
        const other = top(all.map(one => one === expert ? -1 : know.together(layer, expert, one)));
        said.push(`Its most frequent company is expert ${other}, in ${share(know.together(layer, expert, other))} of its tokens.`);
      }
      const ways = [];
      if (layer > 0) {
        const came = know.came(layer, expert), from = top(came);
        ways.push(`comes most often from expert ${from} of layer ${layer - 1} (${share(came[from])})`);
      }
      if (layer < layers - 1) {
        const to = top(all.map(one => know.goes(layer, expert, one)));
        ways.push(`goes on most often to expert ${to} of layer ${layer + 1} (${share(know.goes(layer, expert, to))})`);
      }
      if (ways.length) said.push(`What it reads ${listed(ways)}.`);
    }
    return make("p", { class: "words" }, said.join(" "));
  }

  // The tokens that an expert likes; under them, some places where it read the chosen one.
  function favourites(layer, expert) {
    const found = know.liked(layer, expert);
    if (!found.length) return block("Favourite tokens", make("p", { class: "soft" }, `No token that occurs ${know.fewest} times or more goes to it more often than others do.`));
    const name = "atlas" + made++;
    const places = make("div", { class: "places", "aria-live": "polite" });
    const options = found.map((one, at) => make("div", { role: "option", id: name + "-" + at, class: "liked",
      "aria-label": `${quoted(one.token)}: ${fixed(one.lift, 1)} times its share of all tokens; it reads ${one.count} of ${one.occurrences}`,
      onclick: () => { token = at; show(); } },
    make("span", { class: "word" }, one.token), make("span", {}, "×\u00a0" + fixed(one.lift, 1)),
    make("span", { class: "soft" }, `${one.count} of ${one.occurrences}`)));
    const list = make("div", { role: "listbox", tabindex: 0, class: "list", "data-key": "liked", "aria-label": "Favourite tokens by lift", onkeydown: event => {
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      token = Math.min(Math.max(token + by, 0), found.length - 1);
      show();
    } }, options);
    const show = () => {
      options.forEach((one, at) => one.setAttribute("aria-selected", String(at === token)));
      list.setAttribute("aria-activedescendant", name + "-" + token);
      const one = found[token];
      places.replaceChildren(make("p", { class: "soft" }, one.places.length
        ? `Places where expert ${expert} read ${quoted(one.token)}:`
        : `Expert ${expert} read none of the few places that were kept of ${quoted(one.token)}.`),
      ...one.places.map(place => make("p", { class: "place" }, make("span", { class: "soft" }, domains[place.domain] + (know.choices > 1 ? `, ${nth(place.rank)} choice` : "")),
        make("span", { class: "tokens" }, place.words.map((word, at) => word === undefined ? ""
          : at === know.before ? chip(model, expert, plain(word)) : make("span", {}, plain(word)))))));
    };
    show();
    return block("Favourite tokens, by lift", make("div", { class: "likes" }, list, places));
  }

  // The words of whatever is pointed at.
  const tip = hoverWords(root);
  root.addEventListener("pointermove", event => {
    const one = event.target.closest && event.target.closest(".cell, .bars .line, .ribbon, .node, .liked");
    const words = one && (one.words ? one.words() : one.getAttribute("aria-label"));
    if (words) tip.show(words, event.clientX, event.clientY);
    else tip.hide();
  });
  root.addEventListener("pointerleave", () => tip.hide());

  function draw() {
    const layer = layerNow(), expert = expertNow(), domain = domainNow();
    layerSlider.put(layer);
    domainList.value = String(domain);
    rankButtons.forEach((button, at) => button.setAttribute("aria-pressed", String(at === rank)));
    chips.forEach((one, at) => {
      one.setAttribute("aria-checked", String(at === expert));
      one.tabIndex = at === expert ? 0 : -1;
    });
    const value = know.share(layer, expert, domain, rank);
    status.textContent = value === undefined ? notHere(layer)
      : `Layer ${layer}, expert ${expert}, ${domainName(domain)}: ${share(value)} of ${ranks[rank]}; even use would be ${share(even)}.`;
    for (const one of parts) {
      const needs = one.needs(), same = one.drawn && needs.every((need, at) => need === one.drawn[at]);
      if (!same) {
        const focused = root.getRootNode().activeElement, key = one.box.contains(focused) && focused.dataset.key;
        one.fill(one.box);
        if (key) one.box.querySelector(`[data-key="${key}"]`)?.focus({ preventScroll: true });
      }
      one.drawn = needs;
      if (one.after) one.after(one.box);
    }
  }
  let waiting = false;
  const later = () => {
    if (waiting) return;
    waiting = true;
    queueMicrotask(() => { waiting = false; draw(); });
  };
  const anew = () => { know = study(model); later(); };
  const chosen = ["change:selected_layer", "change:selected_expert", "change:selected_domain"];
  for (const name of chosen) model.on(name, later);
  model.on("change:held", anew);
  draw();
  return () => {
    for (const name of chosen) model.off(name, later);
    model.off("change:held", anew);
  };
}

export default { render };
