// A page without Jupyter: widgets as in a notebook, their models in step with those in Python over one socket.

const revive = (key, value) => value && value.$bytes !== undefined
  ? new DataView(Uint8Array.from(atob(value.$bytes), sign => sign.charCodeAt(0)).buffer)
  : value;
const place = document.getElementById("widget");
const socket = new WebSocket("ws://" + location.host + "/socket");
const models = new Map();  // by key; of one that is still on its way: a promise
const waiting = new Map();  // who waits for a model: its key to a function
const say = message => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); };

function makeModel(id, name, state) {
  const listeners = {};
  let changed = {};
  const tell = (what, ...rest) => [...(listeners[what] || [])].forEach(listener => listener(...rest));
  const take = (values, mine) => {
    const news = Object.keys(values).filter(key => state[key] !== values[key]);
    Object.assign(state, values);
    if (mine) for (const key of news) changed[key] = values[key];
    for (const key of news) tell("change:" + key);
    if (news.length) tell("change");
  };
  return {
    name, tell, take,
    lost: id === place.dataset.key ? "The server has stopped. What is shown stays; start it again and reload this page to go on." : "",
    get: key => state[key],
    set: (key, value) => take({ [key]: value }, true),
    save_changes() {
      if (Object.keys(changed).length) say({ id, method: "update", state: changed });
      changed = {};
    },
    send: content => say({ id, method: "custom", content }),
    on(names, listener) { for (const one of names.split(/\s+/)) (listeners[one] ||= []).push(listener); },
    off(one, listener) { listeners[one] = (listeners[one] || []).filter(known => listener && known !== listener); },
    widget_manager: { get_model: getModel, create_view: createView },
  };
}

function getModel(id) {
  if (!models.has(id)) models.set(id, new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    say({ id, method: "open" });
  }));
  return models.get(id);
}

async function createView(model) {
  if (!document.querySelector(`link[href="/${model.name}.css"]`)) {
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: `/${model.name}.css` });
    const there = new Promise(resolve => { style.onload = style.onerror = resolve; });
    document.head.insertBefore(style, document.querySelector('link[href="/app.css"]'));
    await there;
  }
  const { default: widget } = await import(`/${model.name}.js`);
  const el = document.createElement("div");
  const end = await widget.render({ model, el });
  return { el, remove() { if (typeof end === "function") end(); el.remove(); } };
}

socket.addEventListener("message", async event => {
  const message = JSON.parse(event.data, revive), { id } = message;
  if (message.method === "open") {
    const model = makeModel(id, message.name, message.state);
    models.set(id, model);
    waiting.get(id)?.resolve(model);
    waiting.delete(id);
    return;
  }
  const model = models.get(id);
  if (message.method === "close") models.delete(id);
  if (!model?.take) return;
  if (message.method === "custom") model.tell("msg:custom", message.content, message.buffers);
  else if (message.state) model.take(message.state, false);
});

socket.addEventListener("close", () => {
  for (const model of models.values()) if (model.tell) model.tell("comm_live_update");
});

socket.addEventListener("open", async () => {
  const view = await createView(await getModel(place.dataset.key));
  place.replaceChildren(view.el);
  place.querySelector(".compose textarea")?.focus();
});
