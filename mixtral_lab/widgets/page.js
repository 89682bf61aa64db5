
// A page has no kernel: this stands for the model that Jupyter would hand to the widget, with this state. Nothing leaves it.
function still(state) {
  const restored = JSON.parse(state, (key, value) =>
    value && value.$bytes !== undefined
      ? new DataView(Uint8Array.from(atob(value.$bytes), sign => sign.charCodeAt(0)).buffer)
      : value);
  const listeners = {};
  const tell = name => (listeners[name] || []).forEach(listener => listener());
  return {
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
}

function start(place, state) {
  place.replaceChildren();
  widget.render({ model: still(state), el: place });
}
