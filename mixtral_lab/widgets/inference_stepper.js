// One step of inference at a time. Python computes; this script shows a step, and asks for the next one.

const PHASES = ["tokenise", "prefill", "decode", "end"];
const PICKED = ["", "greedy", "drawn", "chosen"];
const ROWS = 10;         // candidates shown
const AROUND = 420;      // tokens shown
const BARS = 120;        // steps in the timeline
const ALL = 41;          // the top-k slider's last place: no cut

// Bytes in words.
function bytes(n) {
  const [unit, size] = n >= 1e9 ? ["GB", 1e9] : n >= 1e6 ? ["MB", 1e6] : n >= 1e3 ? ["kB", 1e3] : ["bytes", 1];
  return (n / size).toFixed(size === 1 || n / size >= 100 ? 0 : 1) + " " + unit;
}

const ms = value => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + " ms";
const share = p => p >= 0.9995 && p < 1 ? "> 99.9 %" : p > 0 && p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(1) + " %";
const range = (from, to) => to - from === 1 ? String(from) : from + " to " + (to - 1);
const positions = (from, to) => (to - from === 1 ? "position " : "positions ") + range(from, to);
const middle = values => [...values].sort((a, b) => a - b)[values.length >> 1];

// The steps from the first to this one.
function pathTo(tree, node) {
  const path = [];
  for (; node !== null && node !== undefined; node = tree.parent[node]) path.push(node);
  return path.reverse();
}

// What temperature, top-k and top-p do to the candidates that are known, best first: as generate.probabilities does it.
// The other tokens are known in groups: `tail` counts those up to so many times `group` below the last known log probability.
function adjusted(raw, tail, group, { temperature, top_k, top_p }) {
  if (temperature === 0) return raw.map((_, at) => at === 0 ? 1 : 0);
  const heat = logarithm => Math.exp((logarithm - Math.log(raw[0])) / temperature);
  const heated = raw.map((p, at) => p > 0 && (top_k === null || at < top_k) ? heat(Math.log(p)) : 0);
  let whole = heated.reduce((a, b) => a + b, 0), room = (top_k === null ? Infinity : top_k) - raw.length;
  const lowest = Math.log(Math.max(raw[raw.length - 1], 1e-30));
  for (let at = 0; at < tail.length && room > 0; room -= tail[at++])
    whole += Math.min(tail[at], room) * heat(lowest - group * (at + 0.5));
  let before = 0;
  const nucleus = heated.map(p => {
    const stays = top_p >= 1 || before < top_p;
    before += p / whole;
    return stays ? p / whole : 0;
  });
  const left = top_p >= 1 ? 1 : before < top_p ? top_p : nucleus.reduce((a, b) => a + b, 0);
  return nucleus.map(p => p / left);
}

function render({ model, el }) {
  const root = frame(model, el, "inference-stepper");
  const about = model.get("about"), alone = !answers(model);
  const tip = hoverWords(root);
  const cursor = { layer: 0, at: 0 };
  const room = {};  // pixels across, by place: asking costs a layout, so only once for each width of the whole
  let arrays = null, asked = -1, timer = 0, again = false;

  // What is shown: the tree, the way through it, and the step on that way.
  const tree = () => model.get("tree");
  const path = () => pathTo(tree(), model.get("leaves")[model.get("branch")]);
  const shownNode = () => path()[Math.min(model.get("step"), path().length - 1)];
  const sampling = () => ({ temperature: model.get("temperature"), top_p: model.get("top_p"), top_k: model.get("top_k") });
  const over = node => PHASES[tree().phase[node]] === "end";
  const open = node => !over(node) && tree().end[node] >= about.n_prompt;
  const written = way => way.filter(node => tree().phase[node] >= 2);

  // Candidates and experts of a step: as Python says it now, or as it was kept; null where it was not kept.
  function details(node) {
    const now = model.get("now");
    if (now.node === node) return now;
    arrays ||= unpack(model);
    const row = arrays.kept ? arrays.kept.values.indexOf(node) : -1;
    if (row < 0) return null;
    const width = arrays.ids.shape[1], from = arrays.from.values[row], to = arrays.from.values[row + 1];
    const below = [...arrays.below.values.slice(row * width, (row + 1) * width)].filter(value => !Number.isNaN(value));
    const ids = [...arrays.ids.values.slice(row * width, row * width + below.length)];
    const experts = [...arrays.experts.values.slice(from, to)];
    const groups = arrays.tail.shape[1];
    return {
      node, ids, experts,
      tail: [...arrays.tail.values.slice(row * groups, (row + 1) * groups)],
      raw: below.map(value => Math.exp(-value)),
      words: ids.map(id => model.get("words")[id]),
      shares: [...arrays.shares.values.slice(from, to)],
      shown: experts.length / (about.n_layers * (about.n_choices || 1)),
    };
  }

  // What sampling leaves of the candidates: exact where Python said it, else from those that are known.
  function after(found) {
    const { temperature, top_p, top_k } = sampling();
    const same = found.adjusted && JSON.stringify(found.sampling) === JSON.stringify([temperature, top_p, top_k]);
    return same ? found.adjusted : adjusted(found.raw, found.tail, about.group, sampling());
  }

  // Asking
  function ask(message) {
    asked = shownNode();
    model.send({ at: asked, ...message });
  }

  function show(step) {
    put(model, { step: Math.max(0, Math.min(step, path().length - 1)) });
  }

  function onward() {
    if (model.get("step") + 1 < path().length) show(model.get("step") + 1);
    else if (alone || over(shownNode())) put(model, { playing: false });
    else if (asked !== shownNode()) ask({ kind: "forward" });
  }

  // The branch is shown at its last step.
  function showBranch(number) {
    const last = pathTo(tree(), model.get("leaves")[number]).length - 1;
    if (alone) { model.set("branch", number); show(last); } else put(model, { branch: number });
  }

  // Controls
  const needsModel = "This needs the model, which a saved page does not have.";
  const backButton = make("button", { onclick: () => { put(model, { playing: false }); show(model.get("step") - 1); } }, "◀ Back");
  const stepButton = make("button", { class: "primary", onclick: onward }, "Step ▶");
  const playButton = make("button", { onclick: () => put(model, { playing: !model.get("playing") }) });
  const speed = slider({
    label: "Speed", min: -2, max: 5, step: 0.5, value: Math.log2(model.get("speed")),
    oninput: value => put(model, { speed: 2 ** value }), show: value => `${Number((2 ** value).toFixed(2))} a second`,
  });
  const place = slider({ label: "Step", min: 0, max: 1, value: 0, oninput: show, show: value => `${value} of ${path().length - 1}` });
  place.classList.add("place");
  const strip = make("ol", { class: "strip", "aria-label": "Phases" });
  const says = make("p", { class: "says", role: "status" });

  const tokensHead = make("p", { class: "soft" });
  const tokensBox = make("div", { class: "tokens" });
  const flowing = make("p", { class: "legend soft" },
    make("span", { class: "key flying" }, "in flight"), " goes through the model in this step   ",
    make("span", { class: "key cached" }, "in the cache"), " its keys and values are kept   ",
    make("span", { class: "key gone" }, "evicted"), " overwritten in the ring   ",
    make("span", { class: "key waiting" }, "waiting"), " not read yet");

  const candidates = make("div", { class: "candidates" });
  const candidatesNote = make("p", { class: "soft" });
  const drawButton = make("button", { onclick: () => ask({ kind: "draw" }) }, "Draw with these settings");
  const typed = make("input", { type: "text", size: 14, placeholder: "␣the", "aria-label": "Another token to take next; ␣ is a space" });
  const takeTyped = make("button", { onclick: () => typed.value && ask({ kind: "choose", token: typed.value }) }, "Take it");
  typed.addEventListener("keydown", event => { if (event.key === "Enter") takeTyped.click(); });

  const temperature = slider({
    label: "Temperature", min: 0, max: 2, step: 0.01, value: 0, oninput: value => put(model, { temperature: value }),
    show: value => value ? value.toFixed(2) : "0 (greedy)",
  });
  const topP = slider({
    label: "Top-p", min: 0.01, max: 1, step: 0.01, value: 1, oninput: value => put(model, { top_p: value }), show: value => value.toFixed(2),
  });
  const topK = slider({
    label: "Top-k", min: 1, max: ALL, value: ALL, oninput: value => put(model, { top_k: value === ALL ? null : value }),
    show: value => value === ALL ? "all" : String(value),
  });
  const seed = make("input", { type: "number", min: 0, step: 1, style: "width:7em", "aria-label": "Seed" });
  seed.addEventListener("change", () => {
    if (/^\d{1,15}$/.test(seed.value)) put(model, { seed: Number(seed.value) });
    else seed.value = model.get("seed");
  });
  const effect = make("p", { class: "effect soft" });
  const branchList = make("ul", { class: "branches" });

  const grid = make("div", { class: "grid", tabindex: 0, role: "group", "aria-label": "Chosen experts: arrow keys move by layer and token" });
  const gridSays = make("p", { class: "soft", role: "status" });
  const legend = make("p", { class: "legend" });
  const ringBox = make("div", { class: "ring" });
  const ringSays = make("p", { class: "soft" });
  const bars = make("div", { class: "bars" });
  const timeSays = make("div", { class: "time" });

  const card = (title, ...children) => make("section", { class: "card", "aria-label": title }, make("h3", {}, title), ...children);
  root.append(
    make("div", { class: "row controls" }, backButton, stepButton, playButton, speed, place),
    make("div", { class: "card head" }, strip, says),
    card("Tokens", tokensHead, tokensBox, flowing),
    make("div", { class: "columns" },
      card("Next token", candidatesNote, candidates,
        make("div", { class: "row take" }, make("label", { class: "slider" }, make("span", {}, "Another token"), typed), takeTyped)),
      make("div", { class: "stack" },
        card("Sampling", temperature, topP, topK,
          make("div", { class: "row" }, make("label", { class: "slider" }, make("span", {}, "Seed"), seed), drawButton), effect),
        card("Branches", branchList)),
      card("Experts of the tokens in flight", legend, grid, gridSays),
      card("Cache", ringBox, ringSays)),
    card("Time and memory", bars, timeSays));
  if (alone) {
    for (const control of [typed, takeTyped, drawButton, seed]) { control.disabled = true; control.title = needsModel; }
    root.append(make("p", { class: "soft alone" },
      "A saved page: walk through the recorded steps and branches, and try the sliders. New tokens and new branches need the model."));
  }

  // Drawing
  function drawControls() {
    const step = model.get("step"), last = path().length - 1, node = shownNode(), playing = model.get("playing");
    backButton.disabled = step === 0;
    stepButton.disabled = step === last && (alone || over(node));
    stepButton.title = step < last ? "On along this branch" : over(node) ? "The text has ended" : alone ? needsModel : "The model takes its next step";
    playButton.textContent = playing ? "❚❚ Pause" : "▶▶ Play";
    playButton.setAttribute("aria-pressed", playing);
    playButton.disabled = !playing && stepButton.disabled;
    place.input.max = Math.max(last, 1);
    place.input.disabled = last === 0;
    place.put(step);
    speed.put(Math.log2(model.get("speed")));
    temperature.input.max = Math.max(2, model.get("temperature"));
    temperature.put(model.get("temperature"));
    topP.put(model.get("top_p"));
    topK.put(model.get("top_k") === null ? ALL : Math.min(model.get("top_k"), ALL - 1));
    if (document.activeElement !== seed) seed.value = model.get("seed");
    if (!alone) for (const control of [typed, takeTyped, drawButton]) control.disabled = !open(node);
    if (!alone && model.get("temperature") === 0) drawButton.textContent = "Take the likeliest";
    else drawButton.textContent = "Draw with these settings";
  }

  function drawHead() {
    const t = tree(), node = shownNode(), way = pathTo(t, node), phase = t.phase[node];
    const chunks = Math.ceil(about.n_prompt / about.chunk);
    const counts = PHASES.map((_, at) => way.filter(one => t.phase[one] === at).length);
    const labels = ["Tokenise", `Prefill: chunk ${counts[1]} of ${chunks}`, counts[2] ? `Decode: token ${counts[2]}` : "Decode", "End"];
    strip.replaceChildren(...labels.map((label, at) =>
      make("li", { class: at === phase ? "now phase" + at : "", "aria-current": at === phase ? "step" : null }, label)));
    says.textContent = sentence(node);
  }

  // What happens in this step.
  function sentence(node) {
    const t = tree(), phase = t.phase[node], from = t.start[node], to = t.end[node];
    if (phase === 0)
      return `The text is cut into ${many(about.n_prompt, "token")} of the vocabulary's ${about.vocab.toLocaleString("en")}. Nothing has gone through the model yet.`;
    if (phase === 1) {
      const left = about.n_prompt - to;
      const what = to - from === 1 ? "One given token goes" : `${to - from} given tokens go`;
      return `${what} through all ${about.n_layers} layers ${to - from === 1 ? "" : "side by side "}(${positions(from, to)}); ${to - from === 1 ? "its" : "their"} keys and values go into the cache. `
        + (left ? `${many(left, "token")} of the prompt ${left === 1 ? "is" : "are"} still to be read.` : "The prompt is read: what comes after it is now open.");
    }
    const token = quoted(t.token[node]), chance = share(t.chance[node]);
    const how = { greedy: `the likeliest token (${chance})`, drawn: `drawn (the model gave it ${chance})`, chosen: `chosen by hand (the model gave it ${chance})` }[PICKED[t.how[node]]];
    if (phase === 3) return `The text ends with ${token}, ${how}. It is never read: nothing is asked about what follows it.`;
    return `${token}, ${how}, goes through all ${about.n_layers} layers alone (position ${from}). It looks back at what the cache keeps of the tokens before it.`;
  }

  function drawTokens() {
    const t = tree(), node = shownNode(), way = path(), upTo = way.slice(0, model.get("step") + 1);
    const prompt = model.get("prompt"), from = about.n_prompt - prompt.length;
    const pieces = [...prompt, ...written(upTo).map(one => t.token[one])];
    const whole = from + pieces.length, start = t.start[node], end = t.end[node];
    const evicted = Math.max(0, end - about.ring);
    const focus = end > start ? end : whole;
    const last = Math.min(whole, Math.max(focus + 60, AROUND)), first = Math.max(from, Math.min(last, focus + 60) - AROUND);
    const states = { flying: "in flight", cached: "in the cache", gone: "evicted: its slot was overwritten", waiting: over(node) ? "never read" : "not read yet" };
    tokensBox.replaceChildren();
    if (first > 0) tokensBox.append(make("span", { class: "soft" }, `… ${many(first, "token")} before …`));
    for (let position = first; position < last; position++) {
      const kind = position >= start && position < end ? "flying" : position >= end ? "waiting" : position < evicted ? "gone" : "cached";
      const piece = pieces[position - from];
      const who = position < about.n_prompt ? "given" : "written";
      tokensBox.append(make("span", {
        class: "token " + kind, title: `position ${position}, ${quoted(piece)}, ${who}: ${states[kind]}`,
      }, piece.replaceAll("␣", " ")));
      if (piece.includes("⏎")) tokensBox.append(make("br"));
    }
    if (last < whole) tokensBox.append(make("span", { class: "soft" }, `… ${many(whole - last, "token")} after`));
    const cached = Math.min(start, end) - Math.min(evicted, start);
    tokensHead.textContent = [
      `${end - start} in flight`, `${Math.max(0, cached)} from earlier steps in the cache`,
      about.window ? `${evicted} evicted by the window of ${about.window}` : "none ever evicted: this model has no window",
      over(node) ? "the last one is never read" : `${whole - end} waiting`,
    ].join(" · ");
  }

  function bar(p, kind, words) {
    return make("td", { class: "bar " + kind }, make("i", { style: `width:max(${p > 0 ? 1 : 0}px, calc((100% - 64px) * ${p}))` }), make("span", {}, words));
  }

  function drawCandidates() {
    const t = tree(), node = shownNode(), found = details(node), way = path();
    const nextNode = way[model.get("step") + 1], focused = document.activeElement && candidates.contains(document.activeElement)
      ? document.activeElement.dataset.row : null;
    const nextPrompt = !over(node) && t.end[node] < about.n_prompt && t.end[node] > 0;
    candidates.replaceChildren();
    effect.textContent = "";
    if (!found || !found.raw.length) {
      candidatesNote.textContent = !found
        ? "The candidates of this step are not kept: too many steps were made after it."
        : over(node) ? "Nothing follows: the last token is never read." : "Nothing yet: step on, and the model reads the prompt.";
      return;
    }
    const left = after(found), known = found.ids.length;
    const given = nextPrompt ? found.words.indexOf(tokenAt(t.end[node])) : -1;
    const taken = nextPrompt ? found.ids[given] ?? -1 : nextNode === undefined ? -1 : t.id[nextNode];
    const word = nextPrompt ? "given" : "taken";
    candidatesNote.textContent = nextPrompt ? "What the model would say here. The prompt goes on as given, whatever it says."
      : alone ? "Dark: the model’s probabilities. Purple: what sampling leaves of them."
        : "Dark: the model’s probabilities. Purple: what sampling leaves of them. Take a token by its button; another one than before makes a branch.";
    const kept = left.filter(p => p > 0).length;
    const { temperature: heat, top_p, top_k } = sampling();
    const rows = [...Array(Math.min(ROWS, known)).keys()];
    const place = found.ids.indexOf(taken);
    if (place >= ROWS) rows.push(place);
    const lines = rows.map(at => {
      const cut = left[at] === 0 ? (heat === 0 ? "cut: greedy" : top_k !== null && at >= top_k ? "cut by top-k" : "cut by top-p") : null;
      const mine = found.ids[at] === taken;
      const button = make("button", {
        "data-row": at, disabled: alone || !open(node), class: mine ? "mine" : "", dir: "auto",
        title: alone ? needsModel : `token ${found.ids[at]}: take it next`,
        "aria-label": `${found.words[at]}, ${share(found.raw[at])}, after sampling ${cut || share(left[at])}${mine ? `, ${word} on this branch` : ""}`,
        onclick: () => ask({ kind: "choose", token: found.ids[at] }),
      }, found.words[at]);
      return make("tr", { class: cut ? "cut" : "" },
        make("td", { class: "rank" }, at + 1), make("td", { class: "word" }, button, mine ? make("span", { class: "soft" }, " ◂ " + word) : null),
        bar(found.raw[at], "raw", share(found.raw[at])), bar(left[at], "left", cut || share(left[at])));
    });
    if (taken >= 0 && place < 0)
      lines.push(make("tr", {}, make("td", { class: "rank" }, "…"), make("td", { class: "word" }, make("span", {}, t.token[nextNode]), make("span", { class: "soft" }, " ◂ taken")),
        bar(t.chance[nextNode], "raw", share(t.chance[nextNode])), make("td")));
    const shown = rows.filter(at => at < ROWS);
    const rest = values => Math.max(0, 1 - shown.reduce((sum, at) => sum + values[at], 0));
    const exact = found.adjusted && left === found.adjusted;
    const unsure = !exact && heat !== 0 && kept === known && known < about.vocab && (heat !== 1 || top_p < 1);
    lines.push(make("tr", { class: "rest" }, make("td"), make("td", { class: "word soft" }, `${(about.vocab - shown.length).toLocaleString("en")} others`),
      bar(rest(found.raw), "raw", share(rest(found.raw))), bar(rest(left), "left", share(rest(left)))));
    candidates.append(make("table", {},
      make("thead", {}, make("tr", {}, make("th"), make("th", { class: "word" }, "token"), make("th", {}, "model"), make("th", {}, "after sampling"))),
      make("tbody", {}, lines)));
    const many40 = kept === known && heat !== 0 ? `${known} or more` : String(kept);
    effect.textContent = (heat === 0 ? "Temperature 0 takes the likeliest token, always. "
      : `${many40} of ${about.vocab.toLocaleString("en")} tokens can be drawn. `
        + (heat < 1 ? "A temperature below 1 makes the likely likelier. " : heat > 1 ? "A temperature above 1 evens the chances. " : "")
        + (place >= 0 || taken < 0 ? `The first has ${share(left[0])} instead of ${share(found.raw[0])}. ` : ""))
      + (unsure ? `This page knows the ${known} likeliest tokens one by one and the others in groups: with these settings, shares may be a little off.` : "");
    if (focused !== null) candidates.querySelector(`button[data-row="${focused}"]`)?.focus();
  }

  candidates.addEventListener("keydown", event => {
    const buttons = [...candidates.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key];
    if (at < 0 || to === undefined || !buttons[to]) return;
    buttons[to].focus();
    event.preventDefault();
  });

  function drawExperts() {
    const t = tree(), node = shownNode(), found = details(node);
    grid.replaceChildren();
    legend.replaceChildren();
    gridSays.textContent = "";
    grid.hidden = true;
    if (!about.n_experts) { gridSays.textContent = `${about.model} is a dense model: every token takes the same way, and no router chooses.`; return; }
    if (!found) { gridSays.textContent = "The experts of this step are not kept: too many steps were made after it."; return; }
    if (!found.experts.length) { gridSays.textContent = "No token goes through the model in this step."; return; }
    grid.hidden = false;
    const layers = about.n_layers, choices = about.n_choices, seq = found.shown;
    const wide = Math.max(200, (room.grid ||= grid.clientWidth) - 2 || 380), left = 52, cell = Math.min(240, (wide - left) / seq);
    const high = Math.max(7, Math.min(19, 400 / layers)), top = 2;
    const gap = cell > 8 ? 2 : cell > 4 ? 1 : 0;
    const svg = make("svg", { width: left + cell * seq + 2, height: top + high * layers + 2, "aria-hidden": "true" });
    for (let layer = 0; layer < layers; layer++) {
      const y = top + layer * high;
      if (high >= 12 || layer % Math.ceil(12 / high) === 0)
        svg.append(make("text", { x: left - 6, y: y + high / 2 + 4, "text-anchor": "end", class: "label" }, "layer " + layer));
      for (let at = 0; at < seq; at++) {
        let x = left + at * cell;
        const first = (layer * seq + at) * choices;
        const total = found.shares.slice(first, first + choices).reduce((a, b) => a + b, 0) || 1;
        for (let choice = 0; choice < choices; choice++) {
          const expert = found.experts[first + choice], width = (cell - gap) * found.shares[first + choice] / total;
          const [colour, ink] = model.get("colours")[expert];
          svg.append(make("rect", { x, y: y + 1, width: Math.max(0, width), height: high - 2, fill: colour, "data-expert": expert }));
          if (width >= 15 && high >= 13)
            svg.append(make("text", { x: x + width / 2, y: y + high / 2 + 4, fill: ink, "text-anchor": "middle", class: "number" }, expert));
          x += width;
        }
      }
    }
    cursor.layer = Math.min(cursor.layer, layers - 1);
    cursor.at = Math.min(cursor.at, seq - 1);
    const mark = make("rect", { class: "mark", rx: 2, height: high, fill: "none" });
    const words = (layer, at) => {
      const position = t.end[node] - seq + at, first = (layer * seq + at) * choices;
      const who = found.experts.slice(first, first + choices).map((expert, choice) => `expert ${expert} (${found.shares[first + choice]} %)`);
      return `Layer ${layer}, ${quoted(tokenAt(position))} at ${position}: ${who.join(", ")}.`;
    };
    const point = () => {
      for (const [name, value] of Object.entries({ x: left + cursor.at * cell - 1, y: top + cursor.layer * high, width: cell - gap + 2 })) mark.setAttribute(name, value);
      const fed = t.end[node] - t.start[node];
      gridSays.textContent = words(cursor.layer, cursor.at) + (fed > seq ? ` The last ${seq} of ${fed} tokens in flight are shown.` : "");
    };
    const under = event => {
      const box = svg.getBoundingClientRect();
      const at = Math.floor((event.clientX - box.left - left) / cell), layer = Math.floor((event.clientY - box.top - top) / high);
      return at >= 0 && at < seq && layer >= 0 && layer < layers ? { layer, at } : null;
    };
    svg.addEventListener("pointermove", event => {
      const spot = under(event);
      if (spot) tip.show(words(spot.layer, spot.at), event.clientX, event.clientY); else tip.hide();
    });
    svg.addEventListener("pointerleave", tip.hide);
    svg.addEventListener("click", event => { const spot = under(event); if (spot) { Object.assign(cursor, spot); point(); } });
    grid.onkeydown = event => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      cursor.layer = Math.max(0, Math.min(layers - 1, cursor.layer + move[0]));
      cursor.at = Math.max(0, Math.min(seq - 1, cursor.at + move[1]));
      point();
      event.preventDefault();
    };
    svg.append(mark);
    grid.append(svg);
    const seen = [...new Set(found.experts)].sort((a, b) => a - b);
    legend.append(...seen.slice(0, 16).map(expert => chip(model, expert)), seen.length > 16 ? ` and ${seen.length - 16} more` : "");
    point();
  }

  // The readable piece at a position of what is shown.
  function tokenAt(position) {
    const prompt = model.get("prompt"), from = about.n_prompt - prompt.length;
    if (position < about.n_prompt) return position < from ? "…" : prompt[position - from];
    const node = written(path())[position - about.n_prompt];
    return node === undefined ? "…" : tree().token[node];
  }

  function drawCache() {
    const t = tree(), node = shownNode(), ring = about.ring, start = t.start[node], end = t.end[node];
    const filled = Math.min(end, ring), fresh = Math.min(end - start, ring), width = 1000;
    const svg = make("svg", { viewBox: `0 0 ${width} 44`, preserveAspectRatio: "none", role: "img", "aria-label": `${filled} of ${ring} slots filled` });
    const part = (from, to, kind) => svg.append(make("rect", { x: width * from / ring, y: 0, width: Math.max(width * (to - from) / ring, 2), height: 44, class: kind }));
    part(0, ring, "empty");
    if (filled) part(0, filled, "filled");
    const first = (end - fresh) % ring, head = Math.min(fresh, ring - first);
    if (head) part(first, first + head, "fresh");
    if (fresh > head) part(0, fresh - head, "fresh");
    if (ring <= 64)
      for (let slot = 1; slot < ring; slot++) svg.append(make("line", { x1: width * slot / ring, x2: width * slot / ring, y1: 0, y2: 44, class: "split" }));
    ringBox.replaceChildren(svg, make("div", { class: "ends soft" }, make("span", {}, "slot 0"), make("span", {}, `slot ${ring - 1}`)));
    const lost = [Math.max(0, start - ring), Math.max(0, end - ring)];
    const slots = fresh ? (fresh > head ? `slots ${first} to ${ring - 1} and 0 to ${fresh - head - 1}` : `slot${fresh === 1 ? "" : "s"} ${range(first, first + fresh)}`) : "";
    ringSays.textContent = `${filled.toLocaleString("en")} of ${ring.toLocaleString("en")} slots filled (${percent(filled / ring)}): `
      + `${bytes(filled * about.slot_bytes)} of ${bytes(ring * about.slot_bytes)}, ${bytes(about.slot_bytes)} a token over all layers. `
      + (fresh ? `This step wrote ${slots}. ` : "This step wrote nothing. ")
      + (lost[1] > lost[0] ? `That overwrote ${positions(...lost)}, which the window of ${about.window} no longer sees. ` : "")
      + (about.window && ring === about.window ? `Position p lies in slot p mod ${ring}.`
        : about.window ? `The text stays shorter than the window of ${about.window}: nothing is ever overwritten.`
          : "Without a window, every token keeps its slot.");
  }

  function drawTime() {
    const t = tree(), way = path(), step = Math.min(model.get("step"), way.length - 1), node = way[step];
    const first = Math.max(0, Math.min(step - (BARS >> 1), way.length - BARS)), seen = way.slice(first, first + BARS);
    const wide = Math.max(300, (room.bars ||= bars.clientWidth) - 4 || 800), high = 92, base = 74, left = 54;
    const cell = Math.min(34, (wide - left) / seen.length);
    const spent = way.map(one => t.ms[one]).filter(value => value > 0);
    const top = Math.min(Math.max(...spent, 0.01), 4 * (middle(spent) || 1));
    const svg = make("svg", { width: wide, height: high, role: "img", "aria-label": "Milliseconds of each step" });
    svg.append(make("line", { x1: left, x2: wide, y1: base + 0.5, y2: base + 0.5, class: "axis" }),
      make("text", { x: left - 6, y: base + 4, "text-anchor": "end", class: "label" }, "0"),
      make("text", { x: left - 6, y: 16, "text-anchor": "end", class: "label" }, ms(top)));
    seen.forEach((one, at) => {
      const height = Math.min(1, t.ms[one] / top) * (base - 10), x = left + at * cell, number = first + at;
      const group = make("g", { class: "step" + (one === node ? " here" : ""), "data-step": number });
      group.append(make("rect", { x, y: 4, width: cell, height: base, class: "back" }),
        make("rect", { x: x + (cell > 5 ? 1 : 0), y: base - height, width: Math.max(1, cell - (cell > 5 ? 2 : 0.4)), height: Math.max(height, 0.5), class: "phase" + t.phase[one] }));
      if (t.ms[one] > top) group.append(make("path", { d: `M${x} ${base - height + 8} l${cell / 2} -4 l${cell / 2} 4`, class: "torn" }));
      if (cell >= 16 || number % 10 === 0) group.append(make("text", { x: x + cell / 2, y: base + 13, "text-anchor": "middle", class: "label" }, number));
      svg.append(group);
    });
    const under = event => Number(event.target.closest("[data-step]")?.dataset.step ?? -1);
    svg.addEventListener("click", event => { if (under(event) >= 0) show(under(event)); });
    svg.addEventListener("pointermove", event => {
      const one = way[under(event)];
      if (one === undefined) tip.hide();
      else tip.show(`Step ${under(event)}, ${PHASES[t.phase[one]]}, ${many(t.end[one] - t.start[one], "token")}: ${ms(t.ms[one])}`
        + (t.ms[one] > top ? " (higher than drawn)" : ""), event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", tip.hide);
    bars.replaceChildren(svg);
    timeSays.replaceChildren(...timeWords(node, way, first, seen.length));
  }

  // Milliseconds and bytes of this step and of both phases, and why they differ.
  function timeWords(node, way, first, count) {
    const t = tree(), lines = [];
    const of = phase => way.filter(one => t.phase[one] === phase);
    const sum = (nodes, column) => nodes.reduce((total, one) => total + t[column][one], 0);
    const tokens = nodes => nodes.reduce((total, one) => total + t.end[one] - t.start[one], 0);
    const about_ = (name, nodes, key) => nodes.length ? make("tr", { class: key },
      make("th", { class: "word" }, name), make("td", {}, nodes.length), make("td", {}, tokens(nodes) || "–"), make("td", {}, ms(sum(nodes, "ms"))),
      make("td", {}, tokens(nodes) ? ms(sum(nodes, "ms") / tokens(nodes)) : "–"),
      make("td", {}, tokens(nodes) ? bytes(sum(nodes, "read") / tokens(nodes)) : "–"),
      make("td", {}, tokens(nodes) ? (about.on_gpu ? "" : "≥ ") + bytes(Math.max(...nodes.map(one => t.activations[one]))) : "–"),
      make("td", {}, tokens(nodes) ? bytes(Math.min(Math.max(...nodes.map(one => t.end[one])), about.ring) * about.slot_bytes) : "–")) : null;
    lines.push(make("div", { class: "wide" }, make("table", {},
      make("thead", {}, make("tr", {}, ["", "steps", "tokens", "time", "per token", "weights read per token", "values in flight", "cache at its end"].map((head, at) =>
        make("th", { class: at ? "" : "word" }, head)))),
      make("tbody", {}, about_("Tokenise", of(0), "key0"), about_("Prefill", of(1), "key1"), about_("Decode", of(2), "key2"),
        tokens([node]) ? about_("This step", [node], "this") : null))));
    const seq = t.end[node] - t.start[node];
    if (seq) lines.push(make("p", {},
      seq === 1
        ? `Why a written token is dear: this step had to read ${bytes(t.read[node])} of the ${bytes(about.model_bytes)} of weights for one token alone. Tokens read together share one reading.`
        : `Why a given token is cheap: this step read ${bytes(t.read[node])} of the ${bytes(about.model_bytes)} of weights once for ${seq} tokens, `
          + `${bytes(t.read[node] / seq)} a token. A written token has to wait for the one before, and reads its weights alone.`));
    const cut = count < way.length ? `Steps ${first} to ${first + count - 1} of ${way.length - 1} are drawn. ` : "";
    lines.push(make("p", { class: "soft" }, cut + (about.on_gpu
      ? `Measured on ${about.device}, ${about.dtype}: milliseconds between two CUDA events around the model; values in flight are the peak of torch.cuda.max_memory_allocated above what was held before. `
      : `${about.device}, ${about.dtype}. Measured: milliseconds of wall clock around the model. Computed from shapes, since PyTorch does not count memory on a CPU: values in flight, a lower bound. `)
      + "Weights read are counted from the experts that were chosen, each once a step: a lower bound too. The first step of a kind is slower, while kernels are made ready."));
    return lines;
  }

  function drawBranches() {
    const t = tree(), leaves = model.get("leaves"), taken = new Set(), here = model.get("branch");
    const focused = branchList.contains(document.activeElement) ? Number(document.activeElement.dataset.branch) : -1;
    branchList.replaceChildren(...leaves.map((leaf, number) => {
      const way = pathTo(t, leaf), shared = way.filter(node => taken.has(node)).length;
      way.forEach(node => taken.add(node));
      const own = way.slice(number ? shared : 0).filter(node => t.phase[node] >= 2).map(node => t.token[node]).join("");
      const name = number ? `after step ${shared - 1}:` : "first:";
      const button = make("button", { "data-branch": number, "aria-pressed": String(number === here), onclick: () => showBranch(number), title: `Branch ${number}, ${many(way.length, "step")}` },
        `${number} · ${name} `, make("bdi", { class: "said" }, own ? own.slice(0, 60).replaceAll("␣", " ").replaceAll("⏎", " ⏎ ") + (own.length > 60 ? "…" : "") : "(nothing written yet)"));
      return make("li", { class: number ? "forked" : "" }, button);
    }));
    if (focused >= 0) branchList.querySelector(`[data-branch="${focused}"]`)?.focus();
  }

  // Draw everything once, however many traits changed; while playing, the next step is asked for after this one is drawn.
  function draw() {
    again = false;
    drawControls();
    drawHead();
    drawTokens();
    drawCandidates();
    drawExperts();
    drawCache();
    drawTime();
    drawBranches();
    clearTimeout(timer);
    if (model.get("playing")) timer = setTimeout(() => { if (root.isConnected && model.get("playing")) onward(); }, 1000 / model.get("speed"));
  }

  function changed() {
    if (again) return;
    again = true;
    queueMicrotask(draw);
  }

  model.on("change:data", () => { arrays = null; });
  model.on("change:now", () => { asked = -1; });
  model.on("change:notice", () => { asked = -1; });
  for (const name of ["step", "branch", "leaves", "tree", "now", "words", "data", "temperature", "top_p", "top_k", "seed", "playing", "speed"])
    model.on("change:" + name, changed);
  let wide = 0;
  new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - wide) < 2) return;
    wide = root.clientWidth;
    room.grid = room.bars = 0;
    changed();
  }).observe(root);
  draw();
}

export default { render };
