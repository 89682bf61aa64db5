// A conversation: messages in a log, answers as tokens on the colours of their experts, and a box to write in.

// The text of an answer, token by token. A character may take several tokens: they share a span, the last one's colour fills
// it, and those before show as a strip under it.
function answerText(model, say) {
  const spans = [];
  let waiting = [], count = 0, here = -1;
  const layer = () => model.get("selected_layer");
  const colour = expert => (model.get("colours")[expert] || ["#888888", "#000000"])[0];
  const paint = span => {
    const chosen = span.tokens.map(token => token.experts[layer()]);
    if (chosen[0] === undefined) return;
    const [fill, ink] = model.get("colours")[chosen.at(-1)] || ["#888888", "#000000"];
    const before = chosen.slice(0, -1), share = 100 / Math.max(1, before.length);
    const strip = before.map((expert, at) => `${colour(expert)} ${at * share}% ${(at + 1) * share}%`).join(",");
    span.node.style.background = (strip ? `linear-gradient(to right,${strip}) 0 100%/100% 4px no-repeat,` : "") + fill;
    span.node.style.color = ink;
  };
  const words = span => {
    const seen = quoted(span.text.replaceAll(" ", "␣").replaceAll("\n", "⏎"));
    const [first, last] = [span.tokens[0].at, span.tokens.at(-1).at];
    return first === last ? `Token ${first} of the answer ${seen}` : `Tokens ${first} to ${last} of the answer, together ${seen}`;
  };
  const inLayer = span => {
    const chosen = span.tokens.map(token => token.experts[layer()]);
    if (chosen[0] === undefined) return words(span) + ".";
    const experts = chosen.length > 1 ? `experts ${chosen.join(", ")} in turn` : `expert ${chosen[0]}`;
    return `${words(span)}: first choice in layer ${layer()} is ${experts}.`;
  };
  const inAll = span => {
    const experts = span.tokens.at(-1).experts;
    return inLayer(span) + (experts.length > 1 ? ` In layers 0 to ${experts.length - 1}: ${Array.from(experts).join(" ")}.` : "");
  };
  const go = at => {
    if (!spans.length) return;
    spans[here]?.node.classList.remove("here");
    here = Math.max(0, Math.min(spans.length - 1, at));
    spans[here].node.classList.add("here");
    spans[here].node.scrollIntoView({ block: "nearest" });
    say(inAll(spans[here]));
  };
  const node = make("div", {
    class: "tokens", dir: "auto", tabindex: 0, role: "group", "aria-label": "Answer; arrow keys go from token to token",
    onkeydown(event) {
      const to = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: Infinity }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      go(to);
    },
    onclick(event) {
      const at = spans.findIndex(span => span.node === event.target);
      if (at >= 0) go(at);
    },
    onblur() { spans[here]?.node.classList.remove("here"); },
  });
  return {
    node, inLayer,
    get text() { return spans.map(span => span.text).join("").trim(); },
    span: target => spans.find(span => span.node === target),
    paint() { spans.forEach(paint); },
    add(text, experts) {
      const at = count++;
      if (text === null) return;  // markup: in the trace, not in the chat
      waiting.push({ at, experts });
      if (text === "") return;
      const span = { node: make("span", {}, text), text, tokens: waiting };
      waiting = [];
      spans.push(span);
      paint(span);
      node.append(span.node);
    },
  };
}

// A box for several lines.
const lines = attributes => make("textarea", { rows: 2, dir: "auto", ...attributes });

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // where the browser lends no clipboard: an address without https
    const box = make("textarea", { style: "position:fixed;opacity:0" });
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
}

function render({ model, el }) {
  const root = frame(model, el, "chat-panel");
  const about = model.get("about"), alone = !answers(model), can = !alone && about.chat;
  const status = make("p", { class: "soft status", role: "status" });
  const say = text => { status.textContent = text; };
  const tip = hoverWords(root);
  const why = alone ? "This page has no model." : can ? null : "This model cannot hold a conversation.";

  // What was said.
  const log = make("div", { class: "log", role: "log", "aria-live": "polite", "aria-label": "Conversation", tabindex: 0 });
  let drawn = [], first = new Uint8Array(0), live = null, sought = false;

  const question = turn => make("div", { class: "said user", role: "article", "aria-label": "You" },
    make("div", { class: "words", dir: "auto" }, turn.texts.join("")));

  function answer(turn) {
    const text = answerText(model, say);
    const wide = about.layers;
    let at = turn.start;
    for (const piece of turn.texts) {
      text.add(piece, turn.coloured ? first.subarray(at * wide, (at + 1) * wide) : []);
      at += 1;
    }
    const copied = make("button", { title: "Copy this answer's text", async onclick() {
      await copyText(text.text);
      say("Copied.");
      copied.textContent = "copied";
      setTimeout(() => { copied.textContent = "copy"; }, 1500);
    } }, "copy");
    const routing = about.experts && make("button", {
      class: "routing", disabled: alone, title: alone ? "Opens only in a notebook: this page has no model." : "Every router's decisions for this answer, below",
      onclick() { sought = true; model.send({ do: "explore", answer: turn.answer }); },
    }, "routing");
    const line = make("div", { class: "line soft" }, make("span", {}, turn.line), copied, routing || null);
    return { text, node: make("div", { class: "said model", role: "article", "aria-label": about.model },
      turn.texts.some(piece => piece) ? text.node : make("em", { class: "soft" }, "(nothing)"), line) };
  }

  const following = change => {
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    change();
    if (follow) log.scrollTop = log.scrollHeight;
  };

  function draw() {
    first = (unpack(model).first || { values: first }).values;
    let start = 0;
    const nodes = [];
    if (model.get("left_out")) nodes.push({ node: make("p", { class: "soft" }, `${many(model.get("left_out"), "earlier message")} not shown here; panel.messages has them.`) });
    model.get("turns").forEach((turn, at) => {
      turn = { ...turn, start };
      start += turn.coloured;
      const key = JSON.stringify(turn), old = drawn.find(one => one.key === key && one.at === at);
      nodes.push(old || { key, at, ...(turn.role === "user" ? { node: question(turn) } : answer(turn)) });
    });
    if (!nodes.length) nodes.push({ node: make("p", { class: "soft nothing" }, alone ? "Nothing was said."
      : can ? "Nothing has been said yet." : "No conversation is possible.") });
    drawn = nodes;
    const busy = model.get("busy") && !alone;
    if (!busy) live = null;
    else if (!live) {
      const text = answerText(model, say), wait = make("span", { class: "soft wait" }, "reading …");
      live = { text, wait, got: 0, node: make("div", { class: "said model writing", role: "article", "aria-label": about.model }, text.node, wait) };
      model.send({ do: "catch up" });
    }
    following(() => {
      const wanted = [...nodes.map(one => one.node), ...(live ? [live.node] : [])];
      for (const child of [...log.children]) if (!wanted.includes(child)) child.remove();
      wanted.forEach((node, at) => { if (log.children[at] !== node) log.insertBefore(node, log.children[at] || null); });
    });
    log.setAttribute("aria-busy", busy);
  }

  model.on("msg:custom", said => {
    if (!live || said.tokens === undefined) return;
    if (said.from > live.got) { model.send({ do: "catch up" }); return; }
    following(() => {
      for (const [text, experts] of said.tokens.slice(live.got - said.from)) { live.text.add(text, experts); live.got += 1; }
      live.wait.textContent = live.got ? "" : "reading …";
    });
  });

  log.addEventListener("mousemove", event => {
    const all = [...drawn.map(one => one.text), live && live.text];
    const at = all.find(text => text && text.node.contains(event.target)), span = at && at.span(event.target);
    span ? tip.show(at.inLayer(span), event.clientX, event.clientY) : tip.hide();
  });
  log.addEventListener("mouseleave", () => tip.hide());

  // Whose choices the colours show.
  const layers = make("div", { class: "row layers" });
  if (about.experts) {
    const pick = slider({ label: "colours of layer", min: 0, max: about.layers - 1, value: model.get("selected_layer"),
      oninput: layer => put(model, { selected_layer: layer }) });
    model.on("change:selected_layer", () => {
      pick.put(model.get("selected_layer"));
      for (const one of [...drawn, live]) if (one && one.text) one.text.paint();
    });
    layers.append(pick, make("span", { class: "legend", "aria-label": "colours of the experts" },
      make("span", { class: "soft" }, "first choice: expert"), model.get("colours").map((_, expert) => chip(model, expert, String(expert)))));
  }

  // The box.
  let sent = null;
  const box = lines({ "aria-label": "Your message", disabled: !can,
    placeholder: "Your message. Enter sends, Shift+Enter starts a new line.",
    onkeydown(event) {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      ask();
    } });
  const ask = () => {
    if (!box.value.trim()) return;
    if (model.get("busy")) { say("An answer is still being written."); return; }
    sent = box.value;
    model.send({ do: "send", text: sent });
    box.focus();
  };
  const send = make("button", { class: "send", disabled: !can, onclick: ask }, "Send");
  const stop = make("button", { class: "stop", hidden: true, onclick() { model.send({ do: "stop" }); box.focus(); } }, "Stop");
  const clear = make("button", { class: "clear", disabled: !can, title: why ?? "Forget the conversation; the settings stay",
    onclick() { model.send({ do: "clear" }); say("The conversation is cleared."); box.focus(); } }, "Clear");
  const compose = alone
    ? make("p", { class: "soft lone" }, "This page has no model, so nothing can be sent from it: open the notebook and run its cell to go on.")
    : make("div", { class: "compose" }, box, make("div", { class: "buttons" }, send, stop, clear));

  // How the next answer is drawn.
  const sampling = make("div", { class: "row sampling" });
  const temperature = slider({ label: "temperature", min: 0, max: 2, step: 0.05, value: model.get("temperature"),
    show: t => t === 0 ? "0, greedy" : fixed(t), oninput: t => put(model, { temperature: t }) });
  const top = slider({ label: "top-p", min: 0.05, max: 1, step: 0.05, value: model.get("top_p"), show: p => fixed(p), oninput: p => put(model, { top_p: p }) });
  const number = (name, least, empty, words) => make("input", { type: "number", min: least, step: 1, placeholder: empty, "aria-label": words, title: words,
    onchange(event) {
      const given = event.target.value.trim(), whole = Math.max(least, Math.round(Number(given)));
      if (given === "" && empty) put(model, { [name]: null });
      else if (given !== "" && Number.isSafeInteger(whole)) put(model, { [name]: whole });
      settings();
    } });
  const seed = number("seed", 0, "random", "seed: the same number draws the same answer again");
  const longest = number("max_new_tokens", 1, "", "the longest answer, in tokens");
  sampling.append(temperature, top, make("label", { class: "slider" }, make("span", {}, "seed"), seed),
    make("label", { class: "slider" }, make("span", {}, "at most"), longest, make("span", {}, "tokens")));
  function settings() {
    temperature.put(model.get("temperature"));
    top.put(model.get("top_p"));
    seed.value = model.get("seed") ?? "";
    longest.value = model.get("max_new_tokens");
    const greedy = model.get("temperature") === 0;
    for (const one of [temperature.input, longest]) one.disabled = !can;
    for (const one of [top.input, seed]) one.disabled = !can || greedy;
    for (const one of [top, seed]) one.title = greedy ? "Counts only above temperature 0, where tokens are drawn" : "";
  }
  model.on("change:temperature change:top_p change:seed change:max_new_tokens", settings);

  // The system prompt, and the text as the model reads it.
  const system = lines({ "aria-label": "System prompt", disabled: !can, placeholder: "none",
    onchange() { put(model, { system: system.value.trim() || null }); } });
  const tone = make("details", { class: "system" }, make("summary", {}, "System prompt"), system,
    make("p", { class: "soft" }, "Applies from the next message on: for every answer the model reads the whole conversation anew, this text with it."));
  const reads = make("pre", { class: "reads", dir: "auto", tabindex: 0, "aria-label": "What the model read" });
  const showReads = () => reads.replaceChildren(...model.get("reads").map(([text, markup]) => make("span", { class: markup ? "markup" : null }, text)),
    ...(model.get("reads").length ? [] : [make("span", { class: "soft" }, "Nothing yet.")]));
  const showSystem = () => {
    system.value = model.get("system") ?? "";
    tone.firstChild.textContent = "System prompt" + (model.get("system") ? "" : ": none");
  };
  model.on("change:system", showSystem);
  model.on("change:reads", showReads);
  const room = make("p", { class: "soft room" });
  const showRoom = () => { room.textContent = model.get("room"); };
  model.on("change:room", showRoom);

  // The routing of an answer, opened here.
  const below = make("div", { class: "explorer", hidden: true });
  let view = null;
  async function explore() {
    const id = model.get("explorer");
    if (view) view.remove();
    view = null;
    below.replaceChildren();
    below.hidden = !id || alone;
    if (below.hidden) return;
    try {
      const child = await model.widget_manager.get_model(id);
      const made = await model.widget_manager.create_view(child);
      if (model.get("explorer") !== id) { made.remove(); return; }
      view = made;
      below.replaceChildren(make("div", { class: "row" }, make("h3", {}, "The routing of this answer and of all that was read for it"),
        make("button", { class: "close", onclick() { model.send({ do: "close" }); box.focus(); } }, "Close")), made.el);
      if (sought) below.scrollIntoView({ block: "nearest" });
      sought = false;
    } catch {
      below.replaceChildren(make("p", { class: "soft" }, "The routing cannot be shown here. In a cell, panel.explore(answer) opens it."));
    }
  }
  model.on("change:explorer", explore);

  const follow = () => {
    const busy = model.get("busy") && !alone;
    if (busy && sent !== null) { if (box.value === sent) box.value = ""; sent = null; }
    send.hidden = busy;
    stop.hidden = !busy;
    say(busy ? "The model is answering." : "");
    draw();
  };
  model.on("change:busy", follow);
  model.on("change:turns change:data change:left_out", draw);

  root.append(tone, layers, log, status, compose, sampling, room,
    make("details", {}, make("summary", {}, "What the model read for the last answer"), reads), below);
  settings();
  showSystem();
  showReads();
  showRoom();
  follow();
  explore();
}

export default { render };
