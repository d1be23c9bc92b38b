(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const sites = data.sites.length;
  const layers = data.weights.length / sites;
  const name = (cell) => `layers.${Math.floor(cell / sites)}.${data.sites[cell % sites]}`;
  const $ = (id) => document.getElementById(id);
  const percent = (value) => (value < 10 ? `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %` : `× ${(value + 1).toPrecision(3)}`);

  const state = {
    pins: data.fixed.slice(),
    values: data.budget.slice(),
    sparsity: WinaSolver.modelSparsity(data, data.budget),
    selected: 0,
  };
  let solver = WinaSolver.prepare(data, state.pins);
  let frontier = [];

  function element(tag, attributes = {}, text = "") {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  function say(text, warn = false) {
    $("message").textContent = text;
    $("message").classList.toggle("warn", warn);
  }

  // Solving

  function solve(sparsity, note = "") {
    const [low, high] = solver.range;
    const inside = Math.min(Math.max(sparsity, low), high);
    state.sparsity = inside;
    state.values = solver.at(inside);
    const off = Math.abs(inside - sparsity) > 1e-9;
    if (off) say(`Bounds and pinned cells allow a model sparsity of ${low.toFixed(3)} to ${high.toFixed(3)}.`, true);
    else say(note);
    draw();
  }

  function repin(note) {
    solver = WinaSolver.prepare(data, state.pins);
    sampleFrontier();
    solve(state.sparsity, note);
  }

  function pin(cell, value) {
    state.pins[cell] = value;
    repin(value === null ? `${name(cell)} is free again.` : `${name(cell)} is pinned at ${value.toFixed(3)}.`);
  }

  const rounded = (value) => Math.round(Math.min(Math.max(value, 0), 0.99) * 1e6) / 1e6;

  function sampleFrontier() {
    const [low, high] = solver.range;
    frontier = [];
    for (let step = 0; step <= 48; step += 1) {
      const sparsity = low + ((high - low) * step) / 48;
      frontier.push({
        sparsity,
        own: WinaSolver.totals(data, solver.at(sparsity)).perplexity_rise,
        flat: WinaSolver.totals(data, solver.uniform(sparsity)).perplexity_rise,
      });
    }
  }

  // Building the heat map once

  function buildMap() {
    const head = element("tr");
    head.append(element("th", { scope: "col" }, "layer"));
    for (const site of data.sites) head.append(element("th", { scope: "col" }, site));
    head.append(element("th", { scope: "col" }, "mean"));
    const thead = element("thead");
    thead.append(head);
    const body = element("tbody");
    for (let layer = 0; layer < layers; layer += 1) {
      const row = element("tr");
      row.append(element("th", { scope: "row" }, String(layer)));
      for (let site = 0; site < sites; site += 1) {
        const slot = element("td");
        slot.append(element("button", { type: "button", "data-cell": layer * sites + site, tabindex: -1 }));
        row.append(slot);
      }
      row.append(element("td", { class: "mean" }));
      body.append(row);
    }
    $("map").replaceChildren(thead, body);
  }

  const button = (cell) => $("map").querySelector(`[data-cell="${cell}"]`);

  function select(cell, focus = false) {
    state.selected = cell;
    if (focus) button(cell).focus();
    draw();
  }

  // Drawing

  function drawMap() {
    for (const made of $("map").querySelectorAll("button")) {
      const cell = Number(made.dataset.cell);
      const value = state.values[cell];
      const pinned = state.pins[cell] !== null;
      made.style.setProperty("--v", value.toFixed(4));
      made.textContent = value.toFixed(3);
      made.classList.toggle("deep", value > 0.61);
      made.classList.toggle("selected", cell === state.selected);
      made.tabIndex = cell === state.selected ? 0 : -1;
      made.setAttribute("aria-pressed", String(pinned));
      made.setAttribute("aria-label", `${name(cell)}, sparsity ${value.toFixed(3)}${pinned ? ", pinned" : ""}`);
    }
    $("map").querySelectorAll("td.mean").forEach((slot, layer) => {
      let [dropped, weight] = [0, 0];
      for (let cell = layer * sites; cell < (layer + 1) * sites; cell += 1) {
        dropped += data.weights[cell] * state.values[cell];
        weight += data.weights[cell];
      }
      slot.textContent = (dropped / weight).toFixed(3);
    });
  }

  function drawTiles() {
    const now = WinaSolver.totals(data, state.values);
    const flat = WinaSolver.totals(data, solver.uniform(state.sparsity));
    const tiles = [
      ["Model sparsity", now.model_sparsity.toFixed(4), "weight-averaged"],
      ["Read fraction", now.read_fraction.toFixed(4), `decoder alone ${now.read_fraction_decoder.toFixed(4)}`],
      ["Decode speedup limit", `${now.speedup_limit.toFixed(2)} ×`, "when only bytes count"],
      ["Predicted loss rise", now.loss_rise.toFixed(4), `nats/token; uniform ${flat.loss_rise.toFixed(4)}`],
      ["Predicted perplexity", `+${percent(now.perplexity_rise)}`, `uniform +${percent(flat.perplexity_rise)}`],
    ];
    const made = tiles.map(([title, value, note]) => {
      const tile = element("div");
      const shown = element("dd", {}, value);
      shown.append(element("small", {}, note));
      tile.append(element("dt", {}, title), shown);
      return tile;
    });
    $("tiles").replaceChildren(...made);
  }

  function shape(tag, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  function axes(box, xTicks, yTicks) {
    const made = [];
    for (const [x, text] of xTicks) made.push(shape("text", { x, y: box.bottom + 16, "text-anchor": "middle" }, text));
    for (const [y, text] of yTicks) {
      made.push(shape("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }));
      made.push(shape("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, text));
    }
    return made;
  }

  function drawFrontier() {
    const box = { left: 52, right: 350, top: 12, bottom: 192 };
    const floor = 1e-4;
    const peak = Math.max(...frontier.map((point) => Math.max(point.own, point.flat)), 0.1);
    const decades = [Math.log10(floor), Math.min(Math.ceil(Math.log10(peak)), 1)];
    const x = (sparsity) => box.left + (box.right - box.left) * sparsity;
    const y = (rise) => {
      const at = (Math.log10(Math.max(rise, floor)) - decades[0]) / (decades[1] - decades[0]);
      return box.bottom - (box.bottom - box.top) * Math.min(at, 1);
    };
    const yTicks = [];
    for (let decade = decades[0]; decade <= decades[1]; decade += 1) {
      yTicks.push([y(10 ** decade), `${Number((10 ** (decade + 2)).toPrecision(1))} %`]);
    }
    const line = (key) => frontier.filter((p) => p[key] <= 10 ** decades[1]).map((p) => [x(p.sparsity), y(p[key])]);
    const now = WinaSolver.totals(data, state.values);
    const dot = { class: "dot", cx: x(now.model_sparsity), cy: y(now.perplexity_rise), r: 5.5 };
    const legend = [
      shape("line", { class: "line", x1: 246, x2: 268, y1: 164, y2: 164 }),
      shape("text", { class: "own", x: 274, y: 168 }, "this budget"),
      shape("line", { class: "line flat", x1: 246, x2: 268, y1: 180, y2: 180 }),
      shape("text", { x: 274, y: 184 }, "uniform"),
    ];
    $("frontier").replaceChildren(
      ...axes(box, [0, 0.25, 0.5, 0.75, 1].map((s) => [x(s), String(s)]), yTicks),
      shape("path", { class: "line flat", d: path(line("flat")) }),
      shape("path", { class: "line", d: path(line("own")) }),
      shape("circle", dot),
      ...legend,
    );
  }

  function drawCell() {
    const cell = state.selected;
    const value = state.values[cell];
    const loss = WinaSolver.lossAt(data, cell, value);
    const total = WinaSolver.lossOf(data, state.values);
    const weight = data.weights.reduce((sum, item) => sum + item, 0);
    $("cell-title").textContent = name(cell);
    if (document.activeElement !== $("cell-value")) $("cell-value").value = value.toFixed(3);
    $("cell-pin").checked = state.pins[cell] !== null;
    const share = total > 0 ? `${((100 * loss) / total).toFixed(1)} % of the predicted loss rise, ` : "";
    $("cell-facts").textContent = `${share}${((100 * data.weights[cell]) / weight).toFixed(1)} % of the sparse weights`;
    const box = { left: 52, right: 350, top: 12, bottom: 144 };
    const peak = Math.max(...data.loss[cell], 1e-9);
    const x = (sparsity) => box.left + (box.right - box.left) * sparsity;
    const y = (rise) => box.bottom - (box.bottom - box.top) * Math.min(rise / peak, 1);
    $("curve").replaceChildren(
      ...axes(box, [0, 0.25, 0.5, 0.75, 1].map((s) => [x(s), String(s)]), [0, 0.5, 1].map((part) => [y(part * peak), part ? (part * peak).toPrecision(2) : "0"])),
      shape("path", { class: "line", d: path(data.levels.map((level, i) => [x(level), y(data.loss[cell][i])])) }),
      shape("circle", { class: "dot", cx: x(value), cy: y(loss), r: 5.5 }),
    );
  }

  function draw() {
    $("slider").value = String(state.sparsity);
    if (document.activeElement !== $("sparsity")) $("sparsity").value = state.sparsity.toFixed(4);
    $("slider").setAttribute("aria-valuetext", `model sparsity ${state.sparsity.toFixed(3)}`);
    const pinned = state.pins.filter((value) => value !== null).length;
    $("unpin").disabled = pinned === 0;
    $("pins").textContent = pinned ? `${pinned} of ${state.pins.length} cells pinned` : "No cell is pinned.";
    drawMap();
    drawTiles();
    drawCell();
    drawFrontier();
  }

  // The budget file, as file.py writes it

  function number(value) {
    const text = String(value);
    return text.includes("e") ? value.toFixed(20) : text.includes(".") ? text : `${text}.0`;
  }

  function yaml() {
    const { model } = data;
    const lines = [
      ...data.header.map((line) => `# ${line}`),
      `format: ${data.format}`,
      "model:",
      `  model_type: "${model.model_type}"`,
      `  layers: ${model.layers}`,
      `  hidden_size: ${model.hidden_size}`,
      `  fingerprint: "${model.fingerprint}"`,
      `sparsity: ${number(state.sparsity)}`,
      `score: ${data.score}`,
      "cells:",
      ...state.values.map((value, cell) => `  ${name(cell)}: ${number(value)}`),
    ];
    return `${lines.join("\n")}\n`;
  }

  function download() {
    const url = URL.createObjectURL(new Blob([yaml()], { type: "application/yaml" }));
    const link = element("a", { href: url, download: `budget-${state.sparsity.toFixed(3)}.yaml` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    say("The budget was downloaded; give the file to wina-calib with --budget.");
  }

  // Events

  function typed(input, use) {
    input.addEventListener("change", () => {
      const value = Number(input.value);
      if (input.value === "" || !(value >= 0 && value < 1)) say("A sparsity is a number from 0 up to, not including, 1.", true);
      else use(value);
    });
    input.addEventListener("blur", draw);
  }

  $("slider").addEventListener("input", () => solve(Number($("slider").value)));
  typed($("sparsity"), (value) => solve(value));
  typed($("cell-value"), (value) => pin(state.selected, rounded(value)));
  $("cell-pin").addEventListener("change", () => {
    pin(state.selected, $("cell-pin").checked ? state.values[state.selected] : null);
  });
  $("find").addEventListener("submit", (event) => {
    event.preventDefault();
    const amount = Number($("amount").value) / 100;
    if ($("amount").value === "" || !(amount >= 0)) return say("Write a percentage of at least 0.", true);
    if ($("kind").value === "read") return solve(WinaSolver.sparsityAt(data, amount));
    const sparsity = solver.within(Math.log1p(amount));
    if (sparsity === null) return say("Even the lowest sparsity that bounds and pinned cells allow is predicted worse.", true);
    return solve(sparsity, `Highest sparsity within +${percent(amount)}: ${sparsity.toFixed(4)}.`);
  });
  $("unpin").addEventListener("click", () => {
    state.pins.fill(null);
    repin("All cells are free.");
  });
  $("download").addEventListener("click", download);
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  $("map").addEventListener("click", (event) => {
    const made = event.target.closest("button");
    if (!made) return;
    const cell = Number(made.dataset.cell);
    state.selected = cell;
    pin(cell, state.pins[cell] === null ? state.values[cell] : null);
  });
  $("map").addEventListener("focusin", (event) => {
    const made = event.target.closest("button");
    if (made && Number(made.dataset.cell) !== state.selected) select(Number(made.dataset.cell));
  });
  $("map").addEventListener("keydown", (event) => {
    const cell = state.selected;
    const moves = { ArrowUp: -sites, ArrowDown: sites, ArrowLeft: -1, ArrowRight: 1 };
    const changes = { "+": 0.05, "=": 0.05, "-": -0.05 };
    if (event.key in moves) {
      event.preventDefault();
      const next = cell + moves[event.key];
      if (next >= 0 && next < state.values.length) select(next, true);
    } else if (event.key in changes) {
      event.preventDefault();
      pin(cell, rounded(state.values[cell] + changes[event.key]));
    }
  });

  const { model } = data;
  $("model").textContent = `${model.model_type}, ${model.layers} layers, hidden size ${model.hidden_size}, score ${data.score}`;
  buildMap();
  sampleFrontier();
  draw();
})();
