"use strict";
// The token view. Completions are a model's: their text only ever becomes textContent.
(async () => {
  const source = document.getElementById("token-data");
  if (!source) return (document.body.dataset.ready = "true");
  const runs = JSON.parse(source.textContent);
  const byId = (id) => document.getElementById(id);
  const view = { run: 0, record: 0, sample: 0, token: 0, metric: "student_entropy" };
  const cache = new Map();

  async function unpack(column) {
    const bytes = Uint8Array.from(atob(column.data), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const count = planes.length / column.size;
    return Uint32Array.from({ length: count }, (_, i) => {
      let value = 0;
      for (let k = column.size - 1; k >= 0; k--) value = value * 256 + planes[k * count + i];
      return value;
    });
  }

  async function columns() {
    const key = `${view.run}/${view.record}`;
    if (!cache.has(key)) {
      const packed = Object.entries(record().columns);
      cache.set(key, Object.fromEntries(await Promise.all(packed.map(async ([k, v]) => [k, await unpack(v)]))));
    }
    return cache.get(key);
  }

  const run = () => runs[view.run];
  const record = () => run().records[view.record];
  const firstToken = () => record().lengths.slice(0, view.sample).reduce((a, b) => a + b, 0);
  const value = (data, name, i) => {
    const [low, high] = record().ranges[name];
    return low + (data[name][i] / 65535) * (high - low);
  };
  const isFlag = (name) => ["is_opener", "is_high_entropy", "is_triggered"].includes(name);
  const visible = (text) => (text.trim() === "" ? text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥").replace(/ /g, "␣") : text);

  function range() {
    if (view.metric === "kendall_tau") return [-1, 1];
    if (isFlag(view.metric) || view.metric === "gate") return [0, 1];
    return [0, Math.max(...run().records.map((r) => r.ranges[view.metric][1]))];
  }

  function colour(x, [low, high]) {
    const share = (x - low) / Math.max(high - low, 1e-12);
    if (low < 0) {
      const side = share < 0.5 ? "--minus" : "--scale";
      return `color-mix(in oklab, var(${side}) ${Math.round(200 * Math.abs(share - 0.5))}%, var(--low))`;
    }
    return `color-mix(in oklab, var(--scale) ${Math.round(100 * Math.min(1, Math.max(0, share)))}%, var(--low))`;
  }

  async function draw(focus = false) {
    view.record = Math.min(view.record, run().records.length - 1);
    view.sample = Math.min(view.sample, record().lengths.length - 1);
    view.token = Math.max(0, Math.min(view.token, record().lengths[view.sample] - 1));
    const data = await columns();
    const limits = range();
    byId("place").textContent = `${view.sample + 1} of ${record().lengths.length}`;
    byId("step").max = run().records.length - 1;
    byId("step").value = view.record;
    byId("at").textContent = record().step;
    byId("step").setAttribute("aria-valuetext", `step ${record().step}`);
    byId("low").textContent = isFlag(view.metric) ? "no" : limits[0].toFixed(1);
    byId("high").textContent = isFlag(view.metric) ? "yes" : limits[1].toFixed(1);
    byId("scale").style.setProperty("--from", colour(limits[0], limits));
    byId("scale").style.setProperty("--to", colour(limits[1], limits));
    byId("prompt").textContent = record().prompts[view.sample].map((i) => run().texts[i]).join("");
    const first = firstToken();
    byId("text").replaceChildren(
      ...Array.from({ length: record().lengths[view.sample] }, (_, t) => {
        const span = document.createElement("span");
        span.textContent = visible(run().texts[data.token[first + t]]);
        span.style.background = colour(value(data, view.metric, first + t), limits);
        span.setAttribute("role", "option");
        span.tabIndex = -1;
        span.dataset.token = t;
        return span;
      }),
    );
    await select(view.token, focus);
  }

  async function select(token, focus = true) {
    const spans = byId("text").children;
    if (!spans.length) return byId("details").replaceChildren();
    spans[view.token]?.setAttribute("aria-selected", "false");
    if (spans[view.token]) spans[view.token].tabIndex = -1;
    view.token = token;
    spans[token].setAttribute("aria-selected", "true");
    spans[token].tabIndex = 0;
    if (focus) spans[token].focus({ preventScroll: false });
    await drawDetails();
  }

  async function drawDetails() {
    const data = await columns();
    const i = firstToken() + view.token;
    const list = document.createElement("dl");
    for (const { name, title } of run().metrics) {
      const entry = document.createElement("div");
      const key = document.createElement("dt");
      const definition = document.createElement("dd");
      const x = value(data, name, i);
      key.textContent = `${title}: `;
      definition.textContent = isFlag(name) ? (x > 0.5 ? "yes" : "no") : x.toFixed(3);
      entry.append(key, definition);
      list.append(entry);
    }
    const table = document.createElement("table");
    const heads = ["student's candidate", "student", "teacher", "teacher's rank"];
    table.append(row("th", heads));
    const n = record().candidates;
    for (let c = 0; c < n; c++) {
      const j = i * n + c;
      const text = visible(run().texts[data.candidates[j]]);
      const mark = data.candidates[j] === data.token[i] ? " ←" : "";
      const percent = (x) => (x < 1 ? "< 0.1 %" : `${(x / 10).toFixed(1)} %`);
      table.append(row("td", [text + mark, percent(data.student_share[j]), percent(data.teacher_share[j]), data.teacher_rank[j] + 1]));
    }
    const title = document.createElement("strong");
    title.textContent = `Token ${view.token + 1} of ${record().lengths[view.sample]}: ${visible(run().texts[data.token[i]])}`;
    byId("details").replaceChildren(title, list, table);
  }

  function row(kind, cells) {
    const line = document.createElement("tr");
    for (const text of cells) {
      const cell = document.createElement(kind);
      cell.textContent = text;
      line.append(cell);
    }
    return line;
  }

  function turnSample(by) {
    const count = record().lengths.length;
    view.sample = (view.sample + by + count) % count;
    view.token = 0;
  }

  byId("text").addEventListener("click", (event) => {
    if (event.target.dataset.token) select(Number(event.target.dataset.token));
  });
  let pointer = "";
  const positionOf = (event) => `${event.screenX} ${event.screenY}`;
  byId("text").addEventListener("mouseover", (event) => {
    // a pointer that rests is over another token when the text changes: the user hasn't pointed at it
    if (event.target.dataset.token && positionOf(event) !== pointer) select(Number(event.target.dataset.token), false);
  });
  byId("text").addEventListener("mousemove", (event) => (pointer = positionOf(event)));
  byId("text").addEventListener("keydown", async (event) => {
    const last = record().lengths[view.sample] - 1;
    const to = { ArrowRight: view.token + 1, ArrowLeft: view.token - 1, Home: 0, End: last }[event.key];
    if (to !== undefined) await select(Math.max(0, Math.min(last, to)));
    else if (event.key === "PageDown" || event.key === "PageUp") {
      turnSample(event.key === "PageDown" ? 1 : -1);
      await draw(true);
    } else return;
    event.preventDefault();
  });
  byId("previous").addEventListener("click", () => (turnSample(-1), draw()));
  byId("next").addEventListener("click", () => (turnSample(1), draw()));
  byId("step").addEventListener("input", () => ((view.record = Number(byId("step").value)), draw()));
  byId("metric").addEventListener("change", () => ((view.metric = byId("metric").value), draw()));
  byId("run")?.addEventListener("change", () => ((view.run = Number(byId("run").value)), draw()));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const { name, title } of run().metrics) {
    const option = document.createElement("option");
    option.value = name;
    option.textContent = title;
    byId("metric").append(option);
  }
  await draw();
  document.body.dataset.ready = "true";
})();
