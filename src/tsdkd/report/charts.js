"use strict";
// The charts of the log. Names are a user's: they only ever become textContent.
(() => {
  const source = document.getElementById("chart-data");
  if (!source) return;
  const { runs, charts } = JSON.parse(source.textContent);
  const hiddenRuns = new Set();
  const margin = { left: 56, right: 10, top: 8, bottom: 24 };
  const height = 200;
  const dashes = ["", "5 3", "1 3", "8 3 1 3"];
  const numColors = 6;

  function add(parent, tag, attributes = {}, text = "") {
    const isSvg = tag === "svg" || parent.namespaceURI === "http://www.w3.org/2000/svg";
    const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text) element.textContent = text;
    parent.append(element);
    return element;
  }

  // 0.8412, 1,234 or 5e-6: never an offset or a factor beside the axis
  function format(x, digits = 4) {
    if (x === null) return "not finite";
    const rounded = Number(x.toPrecision(Math.min(Math.max(digits, 1), 15)));
    const size = Math.abs(rounded);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return rounded.toExponential().replace("e+", "e");
    return rounded.toLocaleString("en-US", { maximumFractionDigits: 15 });
  }

  function linearTicks(low, high, count, smallest = 0) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(smallest, power * [1, 2, 5, 10].find((m) => m * power > rough * 0.999));
    const digits = Math.floor(Math.log10(Math.max(Math.abs(low), Math.abs(high)))) - Math.floor(Math.log10(step)) + 1;
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push([i * step, format(i * step, digits)]);
    return ticks;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const every = Math.max(1, Math.ceil(decades / 5));
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += every)
      for (const factor of decades < 2 ? [1, 2, 5] : [1]) ticks.push(factor * 10 ** power);
    const inside = ticks.filter((x) => x >= low && x <= high);
    return inside.length > 1 ? inside.map((x) => [x, format(x)]) : linearTicks(low, high, 4);
  }

  function nearest(sorted, x) {
    let low = 0;
    let high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < x) low = middle;
      else high = middle;
    }
    return Math.abs(sorted[low] - x) <= Math.abs(sorted[high] - x) ? low : high;
  }

  class Chart {
    constructor(holder, { title, unit, log, lines }) {
      Object.assign(this, { holder, title, unit, log, lines, zoom: null, step: null, hidden: new Set() });
      this.svg = add(holder, "svg", { tabindex: 0, role: "slider", "aria-label": `${title}: values by step`, height });
      this.keys = add(holder, "div", { class: "keys" });
      this.place = add(this.keys, "span", { class: "place" });
      this.values = lines.map((line, i) => this.addKey(line, i));
      this.reset = add(this.keys, "button", { type: "button", class: "reset", hidden: "" }, "Reset zoom");
      this.reset.addEventListener("click", () => this.zoomTo(null));
      this.listen();
      new ResizeObserver(() => this.draw()).observe(holder);
      this.draw();
    }

    addKey(line, i) {
      const key = add(this.keys, "button", { type: "button", "aria-pressed": "true", class: "key", title: "Show or hide this line" });
      const swatch = add(add(key, "svg", { width: 22, height: 10, "aria-hidden": "true" }), "line", { x1: 0, x2: 22, y1: 5, y2: 5 });
      this.style(swatch, line);
      add(key, "span", { class: "name" }, this.nameOf(line));
      key.addEventListener("click", () => {
        if (!this.hidden.delete(i)) this.hidden.add(i);
        key.setAttribute("aria-pressed", String(!this.hidden.has(i)));
        this.draw();
      });
      return add(key, "b");
    }

    nameOf(line) {
      const run = line.named_by_run ? runs[line.run] : "";
      return run && line.name ? `${run}: ${line.name}` : run || line.name || this.title;
    }

    style(element, line) {
      element.style.stroke = `var(--series-${line.color % numColors})`;
      element.setAttribute("stroke-dasharray", dashes[line.dash % dashes.length]);
      element.classList.add("line");
    }

    get shown() {
      return this.lines.filter((line, i) => !this.hidden.has(i) && !hiddenRuns.has(line.run));
    }

    get steps() {
      const [low, high] = this.zoom ?? [-Infinity, Infinity];
      const steps = new Set(this.shown.flatMap((line) => line.x.filter((x) => x >= low && x <= high)));
      return [...steps].sort((a, b) => a - b);
    }

    xRange() {
      if (this.zoom) return this.zoom;
      const steps = this.steps;
      const [low, high] = [steps[0] ?? 0, steps.at(-1) ?? 1];
      return low === high ? [low - 0.5, high + 0.5] : [low, high];
    }

    yRange([left, right]) {
      let [low, high] = [Infinity, -Infinity];
      for (const { x, y } of this.shown)
        for (let i = 0; i < x.length; i++)
          if (x[i] >= left && x[i] <= right && this.isDrawn(y[i])) [low, high] = [Math.min(low, y[i]), Math.max(high, y[i])];
      if (low > high) return this.log ? [0.1, 1] : [0, 1];
      if (this.log) return high / low < 1.1 ? [low / 1.5, high * 1.5] : [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
      const size = Math.max(Math.abs(low), Math.abs(high)) || 1;
      const room = Math.max(0.06 * (high - low), 5e-3 * size);
      const top = this.unit === "%" && high <= 100 ? Math.min(100, high + room) : high + room; // shares
      return [low >= 0 ? Math.max(0, low - room) : low - room, top];
    }

    isDrawn(y) {
      return y !== null && (!this.log || y > 0);
    }

    draw() {
      const width = this.holder.clientWidth;
      if (!width) return; // in a closed group: drawn when it opens
      const [left, right] = this.xRange();
      const [low, high] = this.yRange([left, right]);
      const scale = this.log ? Math.log : (y) => y;
      const plot = { width: width - margin.left - margin.right, height: height - margin.top - margin.bottom };
      this.toX = (step) => margin.left + ((step - left) / (right - left)) * plot.width;
      this.toStep = (x) => left + ((x - margin.left) / plot.width) * (right - left);
      this.toY = (y) => margin.top + (1 - (scale(y) - scale(low)) / (scale(high) - scale(low))) * plot.height;
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.drawAxes(width, this.log ? logTicks(low, high) : linearTicks(low, high, 5), linearTicks(left, right, width / 75, 1));
      const clip = add(this.svg, "svg", { x: margin.left - 4, y: 0, width: plot.width + 8, height, class: "plot" });
      clip.setAttribute("viewBox", `${margin.left - 4} 0 ${plot.width + 8} ${height}`);
      for (const line of this.shown) this.drawLine(clip, line, [left, right]);
      this.cursor = add(this.svg, "g", { class: "cursor" });
      this.selection = add(this.svg, "rect", { class: "selection", y: margin.top, height: plot.height, width: 0 });
      this.reset.hidden = !this.zoom;
      this.svg.setAttribute("aria-valuemin", left);
      this.svg.setAttribute("aria-valuemax", right);
      this.select(this.step);
    }

    drawAxes(width, yTicks, xTicks) {
      const bottom = height - margin.bottom;
      for (const [value, text] of yTicks) {
        const y = this.toY(value);
        add(this.svg, "line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y, y2: y });
        add(this.svg, "text", { class: "y", x: margin.left - 6, y: y + 4, "text-anchor": "end" }, text);
      }
      add(this.svg, "text", { x: margin.left - 10, y: bottom + 16, "text-anchor": "end", class: "axis" }, "step");
      for (const [value, text] of xTicks) {
        const x = this.toX(value);
        add(this.svg, "line", { class: "grid", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
        const anchor = x > width - 30 ? "end" : "middle";
        add(this.svg, "text", { class: "x", x: anchor === "end" ? width - 2 : x, y: bottom + 16, "text-anchor": anchor }, text);
      }
    }

    drawLine(parent, line, [left, right]) {
      let path = "";
      let isGap = true;
      const inside = [];
      line.y.forEach((y, i) => {
        if (this.isDrawn(y)) path += `${isGap ? "M" : "L"}${this.toX(line.x[i]).toFixed(1)} ${this.toY(y).toFixed(1)}`;
        isGap = !this.isDrawn(y);
        if (!isGap && line.x[i] >= left && line.x[i] <= right) inside.push([line.x[i], y]);
      });
      this.style(add(parent, "path", { d: path, fill: "none" }), line);
      if (inside.length <= 40) for (const [x, y] of inside) this.dot(parent, line, x, y, 2.2);
    }

    dot(parent, line, x, y, r) {
      add(parent, "circle", { cx: this.toX(x), cy: this.toY(y), r }).style.fill = `var(--series-${line.color % numColors})`;
    }

    // The values at a step, or, without one, the last ones
    select(step) {
      const steps = this.steps;
      this.step = step === null || !steps.length ? null : steps[nearest(steps, step)];
      this.cursor?.replaceChildren();
      const texts = this.lines.map((line, i) => {
        const at = this.step === null ? line.x.length - 1 : nearest(line.x, this.step);
        const other = this.step !== null && line.x[at] !== this.step ? ` (step ${format(line.x[at], 15)})` : "";
        const isShown = this.shown.includes(line);
        this.values[i].textContent = isShown ? `${format(line.y[at])}${other}` : "";
        this.values[i].parentElement.hidden = hiddenRuns.has(line.run);
        if (isShown && this.cursor && this.step !== null && !other && this.isDrawn(line.y[at]))
          this.dot(this.cursor, line, line.x[at], line.y[at], 4);
        return isShown ? `${this.nameOf(line)} ${this.values[i].textContent}` : "";
      });
      this.place.textContent = this.step === null ? "last value" : `step ${format(this.step, 15)}`;
      if (this.cursor && this.step !== null) {
        const x = this.toX(this.step);
        const rule = add(this.cursor, "line", { x1: x, x2: x, y1: margin.top, y2: height - margin.bottom });
        this.cursor.prepend(rule);
      }
      this.svg.setAttribute("aria-valuenow", this.step ?? steps.at(-1) ?? 0);
      this.svg.setAttribute("aria-valuetext", [this.place.textContent, ...texts.filter(Boolean)].join(", "));
    }

    zoomTo(range) {
      if (range && range[1] - range[0] < 1) return;
      this.zoom = range;
      this.draw();
    }

    listen() {
      let start = null;
      const xOf = (event) => event.clientX - this.svg.getBoundingClientRect().left;
      const inPlot = (x) => Math.max(margin.left, Math.min(this.holder.clientWidth - margin.right, x));
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.button === 0) start = inPlot(xOf(event));
        this.svg.setPointerCapture(event.pointerId);
      });
      this.svg.addEventListener("pointermove", (event) => {
        const x = inPlot(xOf(event));
        this.select(this.toStep(x));
        if (start === null) return;
        this.selection.setAttribute("x", Math.min(start, x));
        this.selection.setAttribute("width", Math.abs(x - start));
      });
      this.svg.addEventListener("pointerup", (event) => {
        const ends = start === null ? [] : [start, inPlot(xOf(event))].sort((a, b) => a - b);
        start = null;
        this.selection.setAttribute("width", 0);
        if (ends.length && ends[1] - ends[0] > 6) this.zoomTo(ends.map(this.toStep));
      });
      this.svg.addEventListener("pointercancel", () => {
        start = null;
        this.selection.setAttribute("width", 0);
      });
      this.svg.addEventListener("pointerleave", () => this.select(null));
      this.svg.addEventListener("dblclick", () => this.zoomTo(null));
      this.svg.addEventListener("blur", () => this.select(null));
      this.svg.addEventListener("keydown", (event) => this.press(event));
    }

    press(event) {
      const steps = this.steps;
      if (!steps.length || event.ctrlKey || event.metaKey || event.altKey) return;
      const at = this.step === null ? steps.length - 1 : nearest(steps, this.step);
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
      const factor = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
      if (to !== undefined) this.select(steps[Math.max(0, Math.min(steps.length - 1, to))]);
      else if (factor) this.zoomAround(steps[at], factor);
      else if (event.key === "Escape") this.zoomTo(null);
      else return;
      event.preventDefault();
    }

    zoomAround(step, factor) {
      const [left, right] = this.xRange();
      const zoom = this.zoom;
      this.zoom = null;
      const [first, last] = this.xRange();
      this.zoom = zoom;
      const range = [Math.max(first, step - (step - left) * factor), Math.min(last, step + (right - step) * factor)];
      this.zoomTo(range[0] === first && range[1] === last ? null : range);
    }
  }

  const drawn = [...document.querySelectorAll("[data-chart]")].map((holder) => new Chart(holder, charts[holder.dataset.chart]));
  for (const box of document.querySelectorAll("#runs input"))
    box.addEventListener("change", () => {
      if (box.checked) hiddenRuns.delete(Number(box.value));
      else hiddenRuns.add(Number(box.value));
      for (const chart of drawn) chart.draw();
      for (const number of document.querySelectorAll("#curves [data-run]")) number.hidden = hiddenRuns.has(Number(number.dataset.run));
      for (const figure of document.querySelectorAll("#curves figure")) {
        const lines = [...figure.querySelectorAll("[data-chart]")].flatMap((h) => charts[h.dataset.chart].lines);
        figure.hidden = !figure.querySelector("[data-run]:not([hidden])") && !lines.some((l) => !hiddenRuns.has(l.run));
      }
    });
})();
