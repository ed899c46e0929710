"use strict";
// The page says everything without this script; it adds exact readings on the curves, and sorting.
(() => {
  const written = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };

  for (const chart of document.querySelectorAll(".chart[data-curves]")) {
    const data = JSON.parse(chart.dataset.curves);
    const svg = chart.querySelector("svg");
    const cursor = chart.appendChild(Object.assign(document.createElement("div"), { className: "cursor" }));
    const reading = chart.appendChild(Object.assign(document.createElement("div"), { className: "reading" }));
    const steps = [...new Set(data.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    const hide = () => { cursor.style.display = reading.style.display = "none"; };
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), outer = chart.getBoundingClientRect();
      const [left, width] = [data.area.left * box.width, data.area.width * box.width];
      const at = (event.clientX - box.left - left) / width;
      if (at < -0.02 || at > 1.02) return hide();
      const [low, high] = data.area.x_range;
      const wanted = low + at * (high - low);
      const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      const x = box.left - outer.left + left + ((step - low) / (high - low)) * width;
      const top = box.top - outer.top + (1 - data.area.bottom - data.area.height) * box.height;
      cursor.style.cssText = `display:block;left:${x}px;top:${top}px;height:${data.area.height * box.height}px`;
      reading.textContent = "";
      const line = (text) => reading.appendChild(Object.assign(document.createElement("div"), { textContent: text }));
      line(`step ${step}`);
      for (const series of data.series) {
        const index = series.x.indexOf(step);
        if (index >= 0) line(`${series.label}: ${written(series.y[index])}`);
      }
      reading.style.display = "block";
      reading.style.left = x > outer.width / 2 ? `${x - reading.offsetWidth - 8}px` : `${x + 8}px`;
    });
  }

  const order = document.getElementById("pair-order");
  if (order) {
    const list = document.querySelector(".pairs");
    const given = [...list.children];
    order.addEventListener("change", () => {
      const gain = (pair) => Number(pair.dataset.gain);
      const sorted = [...given];
      if (order.value === "best") sorted.sort((a, b) => gain(b) - gain(a));
      if (order.value === "worst") sorted.sort((a, b) => gain(a) - gain(b));
      list.append(...sorted);
    });
  }
})();
