// Draws every chart of the page into the element of its name. Colours follow page.css, light, dark and printed.
"use strict";

const charts = JSON.parse(document.getElementById("charts").textContent);
const config = { displaylogo: false, displayModeBar: false, responsive: true };
const begun = performance.now();

const drawn = Object.entries(charts).map(([name, { data, layout }]) => {
  const place = document.getElementById(name);
  // A map is a square: on a phone it is not higher than wide.
  if (layout.yaxis.scaleanchor) layout.height = Math.min(layout.height, 0.85 * place.clientWidth);
  return Plotly.newPlot(place, data, layout, config);
});

Promise.all(drawn).then(() => {
  document.body.dataset.drawn = Math.round(performance.now() - begun);
});
