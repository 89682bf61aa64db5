// Intervene: say what shall happen to experts, tokens and values, and see what becomes of the model's words.

const WAYS = [
  ["nothing", "as it is", ""],
  ["zero", "take its answer away", "0"],
  ["renormalise", "give its weight to the others chosen", "÷"],
  ["next_best", "let tokens take the next best", "→"],
  ["scale", "scale its weight", "×"],
];
const MOST_FACTOR = 3, PAUSE = 180;  // milliseconds that a slider must rest before the model runs
const NARROW = 24, WIDE = 44, HEAD = 92, GUTTER = 42;  // pixels of the token grid: a column, the tokens' names, the layers' numbers
const FOLLOWS = 1, FORCED = 2;  // intervene.py: a decision that changed

const signed = (value, digits) => (value > 0 ? "+" : "") + fixed(value, digits);
const share = p => (100 * p).toFixed(2) + "\u00a0%";
const listed = numbers => numbers.length < 2 ? String(numbers[0]) : numbers.slice(0, -1).join(", ") + " and " + numbers.at(-1);
const experts = numbers => "expert" + (numbers.length === 1 ? " " : "s ") + listed(numbers);
const places = position => position === null ? [] : [position].flat();
const cut = (text, most) => [...text].length > most ? [...text].slice(0, most - 1).join("") + "…" : text;
const running = pieces => pieces.join("").replaceAll("␣", " ").replaceAll("⏎", "⏎\n").replaceAll("⇥", "\t");

// Call `act` once the calls have paused. Until then the slider keeps what the hand gave it: `settle` leaves it alone.
function resting(act) {
  let timer;
  const later = (...given) => {
    clearTimeout(timer);
    later.pending = true;
    timer = setTimeout(() => { later.pending = false; act(...given); }, PAUSE);
  };
  return later;
}
const settle = (one, later, value) => later.pending || one.put(value);

// Which edit in force concerns an expert as a whole: the last one that names it.
function editOf(model, layer, expert) {
  return model.get("edits").findLast(edit => ["ablate", "scale"].includes(edit.kind) && edit.expert === expert &&
    (edit.position ?? null) === null && (edit.layer === layer || edit.layer === null));
}

const wayOf = edit => !edit ? "nothing" : edit.kind === "scale" ? "scale" : edit.how;
const signOf = edit => !edit ? "" : edit.kind === "scale" ? "×" + Number(edit.factor.toFixed(2)) : WAYS.find(way => way[0] === edit.how)[2];
const factorWords = edit => edit.kind === "scale" ? "its weight × " + Number(edit.factor.toFixed(2)) : WAYS.find(way => way[0] === edit.how)[1];

// Put `edit` where one like it stands (`like` tells), at the front or at the end; null takes that one out.
function replaced(edits, like, edit, front = false) {
  const at = edits.findIndex(like), rest = edits.filter(one => !like(one));
  if (edit === null) return rest;
  if (at >= 0) return [...rest.slice(0, at), edit, ...rest.slice(at)];
  return front ? [edit, ...rest] : [...rest, edit];
}

function render({ model, el }) {
  const root = frame(model, el, "intervene");
  const tip = hoverWords(root), about = () => model.get("about");
  const sparse = Boolean(about().experts), live = answers(model);
  const ask = wanted => model.send(wanted);
  let asked = null;  // the edits asked for last, while Python has not answered
  const askEdits = edits => {
    asked = edits;
    ask({ edits });
  };
  const status = make("p", { class: "sr", role: "status" });
  const view = { model, live, sparse, tip, root, about, ask, askEdits, edits: () => asked ?? model.get("edits") };

  const parts = [
    promptPart(view), editsPart(view), sparse && boardPart(view), wordsPart(view), continuationPart(view), gridPart(view), codePart(view),
  ].filter(Boolean);
  const busy = make("p", { class: "busy soft", hidden: true }, "The model is running …");
  if (!live) root.append(make("p", { class: "soft alone" },
    "No model stands behind this page: it shows the state as it was saved, and its controls are off. Open the notebook to change something."));
  const [prompt, edits, ...others] = parts.map(part => part.node);
  const board = sparse ? [others.shift()] : [];
  const [words, continuation, grid, code] = others;
  root.append(prompt, edits, busy, make("div", { class: sparse ? "pair" : "" }, ...board, words), continuation, grid, code, status);

  const draw = () => parts.forEach(part => part.draw());
  const working = () => {
    busy.hidden = !model.get("busy");
    root.setAttribute("aria-busy", String(model.get("busy")));
  };
  model.on("change:turn", () => {
    asked = null;
    draw();
  });
  model.on("change:busy", working);
  for (const name of ["layer", "expert", "token"])
    model.on("change:selected_" + name, () => {
      parts.forEach(part => part.select?.());
      const speaking = parts.filter(part => part.words);
      const ofExpert = name === "expert" || (name === "layer" && speaking[0].node.contains(document.activeElement));
      status.textContent = speaking.at(ofExpert ? 0 : -1).words();
    });
  model.on("change:edits", () => parts.forEach(part => part.mark?.()));
  draw();
  working();
  return () => parts.forEach(part => part.end?.());
}

// The prompt and how much is written after it.
function promptPart({ model, live, ask, about }) {
  const text = make("textarea", { rows: 2, "aria-label": "prompt", dir: "auto", spellcheck: "false", readonly: !live });
  const read = () => text.value !== model.get("prompt") && ask({ prompt: text.value });
  text.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    read();
  });
  const button = make("button", { disabled: !live, onclick: read }, "Read");
  const asked = resting(max_new_tokens => ask({ max_new_tokens }));
  const length = slider({ label: "tokens to write", min: 0, max: about().most_written, value: 0, oninput: asked });
  length.input.disabled = !live;
  return {
    node: make("div", { class: "prompt" }, text, make("div", { class: "row" }, button, length,
      make("span", { class: "soft" }, "Enter reads the prompt, Shift+Enter makes a new line."))),
    draw() {
      text.value = model.get("prompt");
      settle(length, asked, model.get("max_new_tokens"));
    },
  };
}

// The edits in force, in words and in order.
function editsPart({ model, live, askEdits }) {
  const list = make("ol", { class: "edits" });
  const none = make("p", { class: "soft" }, "No edit is in force: both runs are the same. Choose an expert or a token below and change something.");
  const clear = make("button", { disabled: !live, onclick: () => askEdits([]) }, "Clear all");
  return {
    node: make("section", { class: "inforce", "aria-label": "edits in force" },
      make("div", { class: "row" }, make("h3", {}, "Edits in force"), clear), none, list),
    draw() {
      const shown = model.get("edits"), said = model.get("said");
      none.hidden = said.length > 0;
      clear.hidden = !said.length;
      list.replaceChildren(...said.map((words, at) => make("li", {}, make("span", { dir: "auto" }, words), make("button", {
        class: "remove", disabled: !live, "aria-label": "remove: " + words, title: "Remove this edit",
        onclick: () => askEdits(shown.filter((_, other) => other !== at)),
      }, "✕"))));
    },
  };
}

// Layers × experts: how often each was used, what happens to it, and the menu of the chosen one.
function boardPart(view) {
  const { model, live, tip, edits, askEdits, about } = view;
  const { layers, experts: n, choices } = about();
  const high = Math.max(20, Math.min(30, Math.round(560 / layers)));  // pixels of a row
  const cells = [];  // [layer][expert]
  const table = make("div", {
    class: "board", role: "grid", "aria-label": "experts: a row per layer, a column per expert", style: `--experts:${n};--row:${high}px`,
  });
  const wayNames = make("div", { class: "ways", role: "radiogroup", "aria-label": "what happens to this expert" });
  const heading = make("h3", {}), usage = make("p", { class: "soft" });
  const group = "way" + Math.random().toString(36).slice(2), radios = {};
  const chosen = () => [model.get("selected_layer"), model.get("selected_expert")];
  const usedBy = (layer, expert) => unpackOnce(model).used.values[layer * n + expert];

  // Let something else happen to the chosen expert.
  function change(way, factor) {
    const [layer, expert] = chosen();
    const edit = way === "nothing" ? null : way === "scale"
      ? { kind: "scale", layer, expert, factor, position: null } : { kind: "ablate", layer, expert, how: way };
    askEdits(replaced(edits(), one => ["ablate", "scale"].includes(one.kind) && one.layer === layer &&
      one.expert === expert && (one.position ?? null) === null, edit));
  }
  const scaleLater = resting(factor => change("scale", factor));
  const factor = slider({
    label: "factor", min: 0, max: MOST_FACTOR, step: 0.05, value: 1, show: value => "× " + value.toFixed(2),
    oninput: value => { radios.scale.checked = true; scaleLater(value); },
  });
  factor.input.disabled = !live;
  for (const [way, words, sign] of WAYS) {
    radios[way] = make("input", {
      type: "radio", name: group, value: way, disabled: !live, onchange: () => change(way, Number(factor.input.value)),
    });
    wayNames.append(make("label", {}, radios[way], make("span", { class: "sign", "aria-hidden": "true" }, sign), words));
  }
  wayNames.append(factor);

  const everywhere = (kind, edit) => askEdits(replaced(edits(), one => one.kind === kind && one.layer === null, edit, true));
  const perTokenLater = resting(k => everywhere("top_k", k === choices ? null : { kind: "top_k", k, layer: null }));
  const perToken = slider({
    label: "experts per token", min: 1, max: n, value: choices, oninput: perTokenLater,
    show: k => k === choices ? `${k} (as trained)` : String(k),
  });
  const warmth = position => Number((10 ** position).toPrecision(3));
  const temperatureLater = resting(at => everywhere("temperature", warmth(at) === 1 ? null : { kind: "temperature", t: warmth(at), layer: null }));
  const temperature = slider({
    label: "router temperature", min: -1, max: 1, step: 0.05, value: 0, oninput: temperatureLater, show: at => warmth(at).toFixed(2),
  });
  for (const one of [perToken, temperature]) one.input.disabled = !live;

  const words = (layer, expert) => {
    const edit = editOf(model, layer, expert), used = usedBy(layer, expert);
    return `Layer ${layer}, expert ${expert}: chosen by ${used} of the prompt's ${many(about().seq, "token")} (${percent(used / about().seq)})` +
      (edit ? "; now: " + factorWords(edit) + "." : ".");
  };
  const choose = (layer, expert) => put(model, { selected_layer: layer, selected_expert: expert });

  const header = make("div", { role: "row", class: "line" }, make("span", { class: "corner soft" }, "layer"));
  for (let expert = 0; expert < n; expert++) header.append(make("span", { role: "columnheader", class: "number" }, expert));
  table.append(header);
  for (let layer = layers - 1; layer >= 0; layer--) {
    const line = make("div", { role: "row", class: "line" }, make("span", { role: "rowheader", class: "soft layer" }, layer));
    cells[layer] = [];
    for (let expert = 0; expert < n; expert++) {
      const dot = make("span", { class: "dot" });
      const cell = make("button", {
        class: "cell", role: "gridcell", tabindex: -1, "data-layer": layer, "data-expert": expert,
        onclick: () => choose(layer, expert),
        onmousemove: event => tip.show(words(layer, expert), event.clientX, event.clientY),
        onmouseleave: () => tip.hide(),
      }, dot);
      cells[layer].push({ cell, dot });
      line.append(cell);
    }
    table.append(line);
  }
  table.addEventListener("keydown", event => {
    const [layer, expert] = chosen();
    const steps = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -n], End: [0, n] };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (!live) return;
      const cycle = ["nothing", "zero", "renormalise", "next_best"], now = cycle.indexOf(wayOf(editOf(model, layer, expert)));
      change(cycle[(now + 1) % cycle.length]);
    } else if (["Delete", "Backspace"].includes(event.key) && live) {
      event.preventDefault();
      change("nothing");
    } else if (steps[event.key]) {
      event.preventDefault();
      const within = (value, most) => Math.max(0, Math.min(most - 1, value));
      choose(within(layer + steps[event.key][0], layers), within(expert + steps[event.key][1], n));
      cells[model.get("selected_layer")][model.get("selected_expert")].cell.focus();
    }
  });

  let before = [0, 0];
  function select() {
    const [layer, expert] = chosen(), edit = editOf(model, layer, expert);
    cells[before[0]][before[1]].cell.tabIndex = -1;
    cells[before[0]][before[1]].cell.removeAttribute("aria-selected");
    cells[layer][expert].cell.tabIndex = 0;
    cells[layer][expert].cell.setAttribute("aria-selected", "true");
    before = [layer, expert];
    const used = usedBy(layer, expert);
    heading.replaceChildren(chip(model, expert), ` in layer ${layer}`);
    usage.textContent = `Chosen by ${used} of the prompt's ${many(about().seq, "token")}` + (used ? ` (${percent(used / about().seq)}).` : ": changing it changes nothing there.");
    if (!scaleLater.pending) radios[wayOf(edit)].checked = true;
    if (edit?.layer === null) usage.textContent += " The edit concerns every layer: take it back in the list above.";
    settle(factor, scaleLater, edit?.kind === "scale" ? Math.min(edit.factor, MOST_FACTOR) : 1);
  }
  function mark() {
    const colours = model.get("colours"), most = Math.max(1, ...unpackOnce(model).used.values);
    cells.forEach((line, layer) => line.forEach(({ cell, dot }, expert) => {
      const edit = editOf(model, layer, expert), sign = signOf(edit);
      const size = Math.max(3, Math.round((high - 6) * Math.sqrt(usedBy(layer, expert) / most)));
      dot.className = edit ? "dot changed" + (sign.length > 2 ? " long" : "") : "dot";
      dot.textContent = sign;
      dot.style = edit ? `border-color:${colours[expert][0]}` : `width:${size}px;height:${size}px;background:${colours[expert][0]}`;
      cell.setAttribute("aria-label", words(layer, expert));
    }));
    const global = kind => model.get("edits").find(edit => edit.kind === kind && edit.layer === null);
    settle(perToken, perTokenLater, global("top_k")?.k ?? choices);
    settle(temperature, temperatureLater, Math.log10(global("temperature")?.t ?? 1));
    select();
  }
  const legend = make("p", { class: "soft" }, "The larger a dot, the more of the prompt's tokens chose the expert there. " +
    "Choose one; then Enter goes from one change to the next, Delete takes it back.");
  return {
    node: make("section", { class: "card experts" }, make("h3", {}, "Experts"), make("div", { class: "boardrow" },
      make("div", { class: "boardbox" }, table), make("div", { class: "menu" }, heading, usage, wayNames)), legend,
    make("div", { class: "row router" }, perToken, temperature)),
    draw: mark,
    mark,
    select,
    words: () => words(...chosen()),
  };
}

// The candidates for the next token, and the numbers that sum the change up.
function wordsPart({ model }) {
  const numbers = make("div", { class: "numbers" });
  const rows = make("tbody", {});
  const head = ["next token", "", "baseline", "edited", "points", "nats"];
  const hints = ["", "", "probability without the edits", "probability under the edits", "difference in percentage points", "change of the log-probability, in nats"];
  const table = make("table", { class: "candidates" },
    make("caption", { class: "soft" }, "The ten likeliest of either run. ", make("span", { class: "key base" }), " baseline ", make("span", { class: "key edit" }), " edited"),
    make("thead", {}, make("tr", {}, head.map((name, at) => make("th", { scope: "col", title: hints[at] }, name)))), rows);

  function row(one, most) {
    const bar = (p, kind) => make("span", { class: "bar " + kind, style: `width:${(100 * p / most).toFixed(2)}%` });
    const points = 100 * (one.edited - one.baseline), nats = one.edited_log_p - one.baseline_log_p;
    return make("tr", {
      title: `${quoted(one.token)} (id ${one.id}): ${share(one.baseline)} before, ${share(one.edited)} under the edits; ` +
        `log-probability ${fixed(one.baseline_log_p, 3)} and ${fixed(one.edited_log_p, 3)} nats.`,
    }, make("th", { scope: "row", dir: "auto" }, cut(one.token, 16)), make("td", { class: "bars" }, bar(one.baseline, "base"), bar(one.edited, "edit")),
    make("td", {}, share(one.baseline)), make("td", {}, share(one.edited)),
    make("td", { class: Math.abs(points) < 0.005 ? "soft" : "" }, signed(Math.abs(points) < 0.005 ? 0 : points, 2)),
    make("td", { class: Math.abs(nats) < 0.0005 ? "soft" : "" }, signed(Math.abs(nats) < 0.0005 ? 0 : nats, 3)));
  }
  const number = (name, value, words) => make("div", {}, make("span", { class: "soft" }, name), make("strong", {}, value), make("span", { class: "soft" }, words));
  return {
    node: make("section", { class: "card words" }, make("h3", {}, "The next token"), numbers, table),
    draw() {
      const { kl, candidates, decisions, forced, follows } = model.get("comparison");
      const before = model.get("baseline").loss, after = model.get("edited").loss;
      const changed = forced + follows;
      numbers.replaceChildren(...[
        number("KL, baseline → edited", (kl && kl < 0.0005 ? kl.toExponential(1).replace("-", "−") : fixed(kl, 3)) + " nats",
          "D(baseline ‖ edited) of the next token: 0 if nothing changed"),
        number("loss on the prompt", before === null ? "–" : `${fixed(before, 3)} → ${fixed(after, 3)}`,
          before === null ? "a single token foretells nothing" : `${signed(after - before, 4)} nats per token`),
        decisions && number("decisions changed", `${changed.toLocaleString("en")} of ${decisions.toLocaleString("en")}`,
          changed ? `${percent(changed / decisions)}: ${forced} by the edit itself, ${follows} that follow` : "every token takes the experts it took"),
      ].filter(Boolean));
      const most = Math.max(...candidates.map(one => Math.max(one.baseline, one.edited)));
      rows.replaceChildren(...candidates.map(one => row(one, most)));
    },
  };
}

// What either run writes, side by side; from the first difference on, marked.
function continuationPart({ model }) {
  const where = make("p", { class: "soft" });
  const texts = ["baseline", "edited"].map(name => ({ name, text: make("p", { class: "tokens", dir: "auto" }) }));
  return {
    node: make("section", { class: "card" }, make("h3", {}, "What it writes"), where, make("div", { class: "texts" },
      texts.map(({ name, text }) => make("div", { class: "text " + name }, make("h4", {}, name), text)))),
    draw() {
      const at = model.get("comparison").first_difference;
      const written = texts.map(({ name }) => model.get(name).tokens);
      const longest = Math.max(...written.map(tokens => tokens.length));
      where.textContent = !model.get("max_new_tokens") ? "Nothing is written: move “tokens to write”."
        : at === null ? `Both write the same ${many(longest, "token")}, greedily.`
          : at === 0 ? "They differ from the first token on." : at === 1 ? "The first token is the same; then they part." : `The first ${at} tokens are the same; then they part.`;
      texts.forEach(({ name, text }, side) => {
        const tokens = written[side], until = at === null ? tokens.length : at;
        const rest = tokens.slice(until);
        text.replaceChildren(running(tokens.slice(0, until)));
        if (at !== null) text.append(rest.length
          ? make("mark", { title: `${name} from token ${at} on` }, make("b", {}, running(rest.slice(0, 1))), running(rest.slice(1)))
          : make("mark", { class: "end" }, "(ends here)"));
      });
    },
  };
}

// Tokens × layers: who chose whom, before and after; the chosen cell can be rerouted, its sites patched and multiplied.
function gridPart(view) {
  const { model, live, sparse, tip, root, about, edits, askEdits } = view;
  const { layers, experts: n } = about();
  const row = Math.max(8, Math.min(22, Math.round(440 / layers))), height = HEAD + layers * row + 4;
  const canvas = make("canvas", { "aria-hidden": "true" });
  const spacer = make("div", { class: "spacer" }, canvas);
  const box = make("div", {
    class: "tokengrid", tabindex: 0, role: "application", "aria-label": "tokens and layers: arrow keys choose a cell",
  }, spacer);
  const panel = make("div", { class: "token" });
  const hint = make("p", { class: "soft" });
  const site = make("select", { "aria-label": "site", disabled: !live });
  const other = make("input", { type: "text", "aria-label": "text of the other run", placeholder: "another text, which has this position", disabled: !live });
  let picked = [], of = "", column = NARROW;
  const at = () => [model.get("selected_layer"), model.get("selected_token")];
  const nameOf = (pattern, layer) => pattern.replace("*", layer);
  const choicesAt = (which, layer, token) => {
    const array = unpackOnce(model)[which], shown = token - about().first;
    if (!array || shown < 0) return [];
    const [, seq, k] = array.shape, start = (layer * seq + shown) * k;
    return [...new Set(array.values.slice(start, start + k))];
  };
  const changedAt = (layer, token) => {
    const array = unpackOnce(model).changed, shown = token - about().first;
    return array && shown >= 0 ? array.values[layer * array.shape[1] + shown] : 0;
  };
  const tokenAt = token => model.get("tokens")[token - about().first] ?? "(not shown)";
  const words = (layer, token) => {
    const name = `Token ${token} ${quoted(tokenAt(token))}, layer ${layer}`;
    if (!sparse) return name + ".";
    const before = choicesAt("before", layer, token), after = choicesAt("after", layer, token), why = changedAt(layer, token);
    return !why ? `${name}: ${experts(before)}.`
      : `${name}: ${experts(before)} before, ${experts(after)} under the edits, ${why === FORCED ? "because an edit says so" : "as a consequence"}.`;
  };

  // Only what is in view is drawn, however long the prompt.
  function draw() {
    const wide = box.clientWidth, context = canvas.getContext("2d"), dense = devicePixelRatio || 1;
    if (!wide) return;
    const tokens = model.get("tokens");
    column = Math.max(NARROW, Math.min(WIDE, Math.floor((wide - GUTTER - 8) / tokens.length)));
    const from = Math.floor(box.scrollLeft / column), shift = box.scrollLeft - from * column;
    spacer.style.width = GUTTER + tokens.length * column + 8 + "px";
    spacer.style.height = height + "px";
    canvas.style.width = Math.min(wide, GUTTER + tokens.length * column + 8) + "px";
    canvas.style.height = height + "px";
    canvas.width = Math.round(parseFloat(canvas.style.width) * dense);
    canvas.height = height * dense;
    context.scale(dense, dense);
    const look = getComputedStyle(root), colour = name => look.getPropertyValue("--" + name).trim();
    const colours = model.get("colours").map(pair => pair[0]), { before, after, changed } = unpackOnce(model);
    const anyChange = changed && changed.values.some(Boolean), [layer, token] = at();
    const until = Math.min(tokens.length, from + Math.ceil(wide / column) + 1);
    for (let shown = from; shown < until; shown++) {
      const x = GUTTER + (shown - from) * column - shift, here = shown + about().first === token;
      if (here) {
        context.fillStyle = colour("rule");
        context.fillRect(x, 0, column - 2, HEAD - 2);
      }
      context.save();
      context.translate(x + column / 2 + 4, HEAD - 6);
      context.rotate(-Math.PI / 2);
      context.font = `${here ? "bold " : ""}12px "DejaVu Sans Mono", Menlo, Consolas, monospace`;
      context.fillStyle = here ? colour("ink") : colour("soft");
      context.fillText(cut(tokens[shown], 11), 0, 0);
      context.restore();
      for (let l = 0; l < layers; l++) {
        const y = HEAD + (layers - 1 - l) * row, across = column - 2, high = row - 2;
        if (!before) {
          context.fillStyle = colour("rule");
          context.fillRect(x, y, across, high);
        } else {
          const why = changed.values[l * tokens.length + shown];
          const part = (array, left, width) => {
            const k = array.shape[2], start = (l * tokens.length + shown) * k;
            const upper = k > 1 ? Math.round(high * 0.64) : high;
            context.fillStyle = colours[array.values[start]];
            context.fillRect(left, y, width, upper);
            if (k < 2) return;
            context.fillStyle = colours[array.values[start + 1]];
            context.fillRect(left, y + upper, width, high - upper);
          };
          context.globalAlpha = anyChange && !why ? 0.3 : 1;
          if (why) {
            part(before, x, across / 2);
            part(after, x + across / 2, across / 2);
            context.strokeStyle = colour("mark");
            context.lineWidth = 1.5;
            context.strokeRect(x, y, across, high);
            if (why === FORCED) {
              context.fillStyle = colour("paper");
              context.strokeRect(x + across / 2 - 3, y + high / 2 - 3, 6, 6);
              context.fillRect(x + across / 2 - 3, y + high / 2 - 3, 6, 6);
            }
          } else part(before, x, across);
          context.globalAlpha = 1;
        }
        if (here && l === layer) {
          context.strokeStyle = colour("accent");
          context.lineWidth = 3;
          context.strokeRect(x - 1, y - 1, across + 2, high + 2);
        }
      }
    }
    context.fillStyle = look.getPropertyValue("--card").trim();
    context.fillRect(0, 0, GUTTER - 3, height);
    context.font = '12px system-ui, "Liberation Sans", sans-serif';
    context.textAlign = "right";
    const every = Math.ceil(14 / row);
    for (let l = 0; l < layers; l += every) {
      context.fillStyle = l === layer ? colour("ink") : colour("soft");
      context.fillText(l, GUTTER - 8, HEAD + (layers - 1 - l) * row + row / 2 + 4);
    }
    context.fillStyle = colour("soft");
    context.fillText("layer", GUTTER - 4, HEAD - 8);
  }
  const cellUnder = event => {
    const bounds = box.getBoundingClientRect(), x = event.clientX - bounds.left - GUTTER + box.scrollLeft, y = event.clientY - bounds.top - HEAD;
    const shown = Math.floor(x / column), layer = layers - 1 - Math.floor(Math.max(y, 0) / row);
    if (event.clientX - bounds.left < GUTTER || shown < 0 || shown >= model.get("tokens").length || layer < 0) return null;
    return [y < 0 ? model.get("selected_layer") : layer, shown + about().first];
  };
  const choose = (layer, token) => put(model, { selected_layer: layer, selected_token: token });
  canvas.addEventListener("click", event => {
    const cell = cellUnder(event);
    if (cell) choose(...cell);
  });
  canvas.addEventListener("mousemove", event => {
    const cell = cellUnder(event);
    if (cell) tip.show(words(...cell), event.clientX, event.clientY);
    else tip.hide();
  });
  canvas.addEventListener("mouseleave", () => tip.hide());
  box.addEventListener("scroll", () => { tip.hide(); draw(); });
  box.addEventListener("keydown", event => {
    const [layer, token] = at(), { first } = about(), last = first + model.get("tokens").length - 1;
    const moved = {
      ArrowUp: [layer + 1, token], ArrowDown: [layer - 1, token], ArrowLeft: [layer, token - 1], ArrowRight: [layer, token + 1],
      Home: [layer, first], End: [layer, last], PageUp: [layer, token - 10], PageDown: [layer, token + 10],
    }[event.key];
    if (!moved) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(layers - 1, moved[0])), Math.max(first, Math.min(last, moved[1])));
    const x = (model.get("selected_token") - first) * column, room = box.clientWidth - GUTTER - column;
    box.scrollLeft = Math.max(x - room, Math.min(box.scrollLeft, x));
  });

  // What can be done with the chosen token in the chosen layer.
  const isReroute = edit => {
    const [layer, token] = at();
    return edit.kind === "reroute" && edit.layer === layer && places(edit.position).length === 1 && places(edit.position)[0] === token;
  };
  const chips = make("div", { class: "row chips", role: "group", "aria-label": "experts to send the token to, the first choice first" });
  const send = make("button", { onclick: () => {
    const [layer, position] = at();
    askEdits(replaced(edits(), isReroute, { kind: "reroute", layer, position, experts: picked }));
  } });
  const free = make("button", { disabled: !live, onclick: () => askEdits(replaced(edits(), isReroute, null)) }, "Let it choose itself again");
  const buttons = [];
  for (let expert = 0; expert < (n || 0); expert++) {
    const [colour, ink] = model.get("colours")[expert];
    buttons.push(make("button", { class: "pick", disabled: !live, style: `--colour:${colour};--on:${ink}`, onclick: () => {
      picked = picked.includes(expert) ? picked.filter(one => one !== expert) : [...picked, expert];
      drawPicks();
    } }));
  }
  chips.append(...buttons);
  function drawPicks() {
    const need = about().choices_by_layer[at()[0]] ?? 0, lacking = need - picked.length;
    buttons.forEach((button, expert) => {
      const place = picked.indexOf(expert);
      button.textContent = place < 0 ? String(expert) : `${expert} · ${place + 1}.`;
      button.setAttribute("aria-pressed", String(place >= 0));
      button.setAttribute("aria-label", `expert ${expert}` + (place < 0 ? "" : `, choice ${place + 1}`));
    });
    send.disabled = !live || lacking !== 0;
    send.textContent = lacking > 0 ? `Choose ${lacking} more` : lacking < 0 ? `Choose ${-lacking} fewer` : "Send it there";
    free.hidden = !model.get("edits").some(isReroute);
  }
  const siteName = () => nameOf(site.value, at()[0]);
  const isFactor = edit => edit.kind === "multiply" && edit.site === siteName();
  const factorLater = resting((name, value) => askEdits(replaced(edits(), edit => edit.kind === "multiply" && edit.site === name,
    value === 1 ? null : { kind: "multiply", site: name, factor: value })));
  const factor = slider({
    label: "all of this site", min: 0, max: MOST_FACTOR, step: 0.05, value: 1, show: value => "× " + value.toFixed(2),
    oninput: value => factorLater(siteName(), value),
  });
  factor.input.disabled = !live;
  const patchNow = () => {
    if (!other.value) return other.focus();
    const position = at()[1], name = siteName();
    askEdits(replaced(edits(), edit => edit.kind === "patch" && edit.site === name && edit.position === position,
      { kind: "patch", site: name, text: other.value, position }));
  };
  other.addEventListener("keydown", event => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    patchNow();
  });
  const patchButton = make("button", { disabled: !live, onclick: patchNow }, "Patch");
  const heading = make("h4", { dir: "auto" }), takes = make("p", { class: "takes" });
  site.addEventListener("change", () => drawFactor());
  const drawFactor = () => {
    const edit = model.get("edits").find(isFactor), whole = siteName().endsWith("router.experts");
    settle(factor, factorLater, edit ? Math.min(edit.factor, MOST_FACTOR) : 1);
    factor.input.disabled = !live || whole;
  };
  panel.append(heading, takes);
  if (sparse) panel.append(make("p", { class: "label" }, "Send it to other experts:"), chips, make("div", { class: "row" }, send, free));
  panel.append(make("p", { class: "label" }, "Change a value:"), make("div", { class: "row" }, site, factor),
    make("div", { class: "row patch" }, make("span", { class: "soft" }, "or put in, at this position, what it is after"), other, patchButton));

  function select() {
    const [layer, token] = at(), now = `${layer} ${token} ${about().choices_by_layer[layer]}`;
    heading.replaceChildren(`Token ${token} ${quoted(cut(tokenAt(token), 40))} in layer ${layer}`);
    const before = choicesAt("before", layer, token), after = choicesAt("after", layer, token);
    takes.replaceChildren(...(sparse ? ["takes ", before.map(expert => [chip(model, expert), " "]),
      changedAt(layer, token) ? [" before, ", after.map(expert => [chip(model, expert), " "]), " under the edits"] : []].flat(3) : []));
    const wanted = site.value;
    site.replaceChildren(...about().sites.map(pattern => make("option", { value: pattern }, nameOf(pattern, layer))));
    site.value = wanted || (about().sites.includes("layers.*.residual.after") ? "layers.*.residual.after" : about().sites[0]);
    if (now !== of) picked = (model.get("edits").find(isReroute)?.experts ?? []).slice();
    of = now;
    drawFactor();
    if (sparse) drawPicks();
    draw();
  }
  const legend = !sparse ? [] : [make("p", { class: "soft" }, "Upper part of a cell: first choice; lower part: second. " +
    "Framed, left before and right after: another set of experts. A square in the middle: because an edit says so.")];
  const watch = new ResizeObserver(draw), themes = new MutationObserver(draw);
  watch.observe(box);
  themes.observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  return {
    node: make("section", { class: "card" }, make("h3", {}, sparse ? "The prompt's tokens and who reads them" : "The prompt's tokens"), ...legend, hint, box, panel),
    draw() {
      const { first, seq } = about();
      hint.hidden = !first;
      hint.textContent = `The last ${model.get("tokens").length.toLocaleString("en")} of ${seq.toLocaleString("en")} tokens.`;
      of = "";
      select();
    },
    select,
    words: () => words(...at()),
    end() { watch.disconnect(); themes.disconnect(); },
  };
}

// The same in Python, to take along.
function codePart({ model }) {
  const code = make("code", {}), text = make("pre", { tabindex: 0, "aria-label": "Python code" }, code), done = make("span", { class: "soft", role: "status" });
  const copy = make("button", { onclick: async () => {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    let copied = false;
    try {
      await navigator.clipboard.writeText(model.get("code"));
      copied = true;
    } catch {
      copied = document.execCommand("copy");
    }
    done.textContent = copied ? "Copied." : "Selected: copy it with Ctrl+C.";
  } }, "Copy");
  return {
    node: make("section", { class: "card" }, make("div", { class: "row" }, make("h3", {}, "The same in Python"), copy, done), text),
    draw() {
      code.textContent = model.get("code");
      done.textContent = "";
    },
  };
}

// The arrays, unpacked once for each answer.
const unpacked = new WeakMap();
function unpackOnce(model) {
  const data = model.get("data"), known = unpacked.get(model);
  if (known && known.data === data) return known.arrays;
  const arrays = unpack(model);
  unpacked.set(model, { data, arrays });
  return arrays;
}

export default { render };
