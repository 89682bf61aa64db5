
// A page has no kernel: this stands for the model that Jupyter would hand to the widget. Nothing leaves it.
const restored = JSON.parse(document.getElementById("state").textContent, (key, value) =>
  value && value.$bytes !== undefined
    ? new DataView(Uint8Array.from(atob(value.$bytes), sign => sign.charCodeAt(0)).buffer)
    : value);
const listeners = {};
const tell = name => (listeners[name] || []).forEach(listener => listener());
const model = {
  alone: true,  // base.js: `answers(model)`
  get: name => restored[name],
  set(name, value) {
    if (restored[name] === value) return;
    restored[name] = value;
    tell("change:" + name);
    tell("change");
  },
  save_changes() {},
  send() {},
  on(names, listener) { for (const name of names.split(/\s+/)) (listeners[name] ||= []).push(listener); },
  off(name, listener) { listeners[name] = (listeners[name] || []).filter(one => listener && one !== listener); },
};
const place = document.getElementById("widget");
place.replaceChildren();
widget.render({ model, el: place });
