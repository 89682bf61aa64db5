// Figures, widgets and the theme of the site's pages. Nothing here asks another machine for anything.
"use strict";
(() => {
  const folder = document.currentScript.src.replace(/[^/]*$/, "");

  // Widgets look here for the theme, as JupyterLab says it.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const chosen = document.body.dataset.theme;
    document.body.dataset.jpThemeLight = String(chosen === "light" || (chosen !== "dark" && !system.matches));
  };
  new MutationObserver(paint).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  system.addEventListener("change", paint);
  paint();

  const loading = {};
  const load = name => loading[name] ||= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    Object.assign(script, { src: folder + name, onload: resolve, onerror: () => reject(new Error(name + " is missing")) });
    document.head.append(script);
  });

  // Figures have a width that their texts are set for: where there is less room, the whole figure becomes smaller.
  const fit = new ResizeObserver(seen => {
    for (const { target } of seen) {
      const place = target.firstElementChild;
      const room = target.clientWidth / place.offsetWidth, scale = Math.min(1, Math.max(0.6, room));
      place.style.transform = scale < 1 ? `scale(${scale})` : "";
      target.style.height = scale * place.offsetHeight + "px";
      target.style.overflowX = room < scale ? "auto" : "hidden";  // a browser scrolls as far as the unscaled figure goes
    }
  });

  // A figure is drawn when it is nearly in sight; so is plotly fetched, and only once.
  const draw = async figure => {
    const place = figure.firstElementChild;
    await load("plotly.min.js");
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    await Plotly.newPlot(place, data, layout, { responsive: !layout.width, displaylogo: false });
    figure.dataset.drawn = "yes";
  };
  const sight = new IntersectionObserver(seen => {
    for (const { target, isIntersecting } of seen)
      if (isIntersecting) { sight.unobserve(target); draw(target); }
  }, { rootMargin: "800px" });
  for (const figure of document.querySelectorAll(".lab-figure")) { sight.observe(figure); fit.observe(figure); }

  for (const widget of document.querySelectorAll(".lab-widget")) {
    const kind = widget.dataset.kind;
    const style = document.createElement("link");
    Object.assign(style, { rel: "stylesheet", href: folder + `widgets/${kind}.css` });
    document.head.append(style);
    load(`widgets/${kind}.js`).then(() =>
      mixtralLabWidgets[kind](widget.querySelector(".place"), widget.querySelector("script").textContent));
  }

  // From file:// a browser lets no page read another, so the search shows titles without excerpts.
  if (typeof DOCUMENTATION_OPTIONS !== "undefined" && location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
})();
