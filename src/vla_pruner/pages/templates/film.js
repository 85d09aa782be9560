"use strict";
/* Films of episodes: scenes to choose from, runs side by side or one of them with its time line. */
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const make = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};
const ICONS = {
  play: '<svg viewBox="0 0 16 16"><path d="M4 2.2v11.6c0 .5.6.8 1 .5l8.7-5.8a.6.6 0 0 0 0-1L5 1.7a.6.6 0 0 0-1 .5z"/></svg>',
  pause: '<svg viewBox="0 0 16 16"><rect x="3" y="2" width="3.6" height="12" rx=".8"/><rect x="9.4" y="2" width="3.6" height="12" rx=".8"/></svg>',
};
const TINTS = { 1: "rgb(63 169 245 / 0.34)", 2: "rgb(255 163 26 / 0.34)" };

let players = [], timeline = null, step = 0, last = 0, playing = false, overlay = "why", shown = 0, focus = null;

/* one byte per visual token */
const bytes = (text) => text ? Uint8Array.from(atob(text), (c) => c.charCodeAt(0)) : null;
const keptOf = (call) => call.kept.length - call.kept.split("0").length + 1;

/* a canvas at the resolution of the screen, redrawn when its size changes */
function canvas(label) {
  const element = make("canvas", { role: "img", ariaLabel: label });
  new ResizeObserver(() => {
    const size = Math.round(element.clientWidth * devicePixelRatio);
    if (size && element.width !== size) { element.width = element.height = size; draw(); }
  }).observe(element);
  return element;
}

class Player {
  constructor(condition, run, scene) {
    this.condition = condition;
    this.run = run;
    this.recording = run && run.recording;
    this.status = make("output");
    const title = make("h3");
    if (this.recording && data.conditions.length > 1 && focus === null) {
      title.append(make("button", { type: "button", textContent: condition.label, title: "Look closer",
        onclick: () => show(shown, step, condition.name) }));
    } else {
      title.textContent = condition.label;
    }
    this.element = make("article", { className: "player" }, make("header", {}, title, this.status));
    if (!this.recording) {
      const text = run ? "This episode was not recorded." : "This episode has not been run.";
      this.element.append(make("p", { className: "empty", textContent: text }));
      return;
    }
    const { cameras, grids, calls } = this.recording;
    this.offsets = grids.map((_, i) => grids.slice(0, i).reduce((sum, g) => sum + g * g, 0));
    this.calls = calls.map((call) => ({ ...call, semantic: bytes(call.semantic), forecast: bytes(call.forecast) }));
    this.sheets = (this.recording.sheets || scene.sheets).map((source) => {
      const image = new Image();
      image.src = source;
      image.decode().then(draw, () => {});
      return image;
    });
    this.views = cameras.map((camera) => canvas(`${condition.label}, ${camera} camera`));
    const stage = make("div", { className: cameras.length > 1 ? "stage" : "stage one" });
    this.views.forEach((view, i) => stage.append(make("figure", { className: i ? "" : "first" }, view)));
    this.maps = [];
    if (this.calls.some((call) => call.semantic || call.forecast)) {
      const maps = make("figure", { className: "maps" });
      maps.style.setProperty("--views", cameras.length);
      for (const [score, className] of [["semantic", "semantic"], ["forecast", "action"]]) {
        maps.append(make("figcaption", { className, textContent: className }));
        cameras.forEach((camera, view) => {
          const element = canvas(`${condition.label}, ${className} score, ${camera} camera`);
          this.maps.push({ element, score, view, color: `--map-${className}` });
          maps.append(element);
        });
      }
      stage.append(maps);
    } else if (data.no_scores) {
      stage.append(make("p", { className: "empty", textContent: data.no_scores }));
    }
    this.element.append(stage);
  }

  get steps() { return this.recording ? this.recording.frames - 1 : 0; }

  at(frame) { return this.calls.findLast((call) => call.step <= frame); }

  draw(at) {
    if (!this.recording) return;
    const frame = Math.min(at, this.steps), call = this.at(frame);
    this.views.forEach((view, i) => this.drawView(view, i, frame, call));
    for (const map of this.maps) this.drawMap(map, call);
    const ended = at >= this.steps && data.unit === "s";
    this.status.className = ended ? "done" : "";
    if (ended) {
      this.status.textContent = this.run.success ? `✓ done in ${this.steps} steps` : `✗ not done in ${this.steps} steps`;
    } else {
      const what = players.length > 3 ? "" : " tokens";
      this.status.textContent = `${keptOf(call)} of ${call.kept.length}${what}${call.warm_up ? " · warm-up" : ""}`;
    }
  }

  drawView(element, i, frame, call) {
    const context = element.getContext("2d"), size = element.width;
    const { size: side, columns, grids } = this.recording, sheet = this.sheets[i];
    if (!size || !sheet.complete) return;
    context.imageSmoothingQuality = "high";
    context.drawImage(sheet, side * (frame % columns), side * Math.floor(frame / columns), side, side, 0, 0, size, size);
    if (overlay === "plain") return;
    const grid = grids[i], edge = (n) => Math.round(n * size / grid);
    for (let cell = 0; cell < grid * grid; cell++) {
      const why = call.kept[this.offsets[i] + cell];
      const x = edge(cell % grid), y = edge(Math.floor(cell / grid));
      const w = edge(cell % grid + 1) - x, h = edge(Math.floor(cell / grid) + 1) - y;
      if (why === "0") {
        context.fillStyle = "rgb(13 14 18 / 0.78)";
        context.fillRect(x, y, w, h);
      } else if (overlay === "why") {
        tint(context, why, x, y, w, h);
      }
    }
  }

  drawMap({ element, score, view, color }, call) {
    const context = element.getContext("2d"), size = element.width;
    if (!size) return;
    const style = getComputedStyle(document.documentElement);
    const low = style.getPropertyValue("--map-zero").trim().split(" ").map(Number);
    const high = style.getPropertyValue(color).trim().split(" ").map(Number);
    const values = call[score], grid = this.recording.grids[view], edge = (n) => Math.round(n * size / grid);
    context.clearRect(0, 0, size, size);
    for (let cell = 0; cell < grid * grid; cell++) {
      const share = values ? Math.sqrt(values[this.offsets[view] + cell] / 255) : 0;
      const x = edge(cell % grid), y = edge(Math.floor(cell / grid));
      context.fillStyle = `rgb(${low.map((from, i) => from + share * (high[i] - from)).join(" ")})`;
      context.fillRect(x, y, edge(cell % grid + 1) - x, edge(Math.floor(cell / grid) + 1) - y);
    }
  }
}

function tint(context, why, x, y, w, h) {
  if (why === "1" || why === "2") {
    context.fillStyle = TINTS[why];
    context.fillRect(x, y, w, h);
  } else if (why === "3") {
    context.fillStyle = TINTS[1];
    context.beginPath(); context.moveTo(x, y); context.lineTo(x + w, y); context.lineTo(x, y + h); context.fill();
    context.fillStyle = TINTS[2];
    context.beginPath(); context.moveTo(x + w, y); context.lineTo(x + w, y + h); context.lineTo(x, y + h); context.fill();
  }
}

/* calls, their latency, and the actions that they led to, over the steps of one run */
class TimeLine {
  constructor(player) {
    this.player = player;
    this.element = find(".timeline");
    this.element.replaceChildren();
    this.width = this.element.clientWidth;
    this.left = 76;
    this.height = 4;
    const svg = this.svg = this.add(null, "svg", { role: "img" });
    svg.setAttribute("aria-label", `Time line of ${player.condition.label}`);
    const { calls } = player, whole = calls[0].kept.length;
    this.blocks("kept", calls.map((call) => keptOf(call)), whole, String);
    if (calls.every((call) => call.latency_ms !== undefined)) {
      const values = calls.map((call) => call.latency_ms);
      this.blocks("ms", values, Math.max(...values), (value) => value.toFixed(value < 10 ? 1 : 0));
    }
    for (const [name, parts, dims] of this.groups()) this.lines(name, parts, dims);
    svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    svg.setAttribute("height", this.height);
    this.cursor = this.add(svg, "line", { class: "cursor", y1: 0, y2: this.height });
    const scrub = (event) => {
      play(false);
      const box = svg.getBoundingClientRect();
      seek(Math.round((event.clientX - box.left - this.left) / (this.width - this.left - 6) * last));
    };
    svg.onpointerdown = (event) => { svg.setPointerCapture(event.pointerId); scrub(event); };
    svg.onpointermove = (event) => { if (svg.hasPointerCapture(event.pointerId)) scrub(event); };
  }

  add(parent, tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    (parent || this.element).append(element);
    return element;
  }

  x(at) { return this.left + at / Math.max(last, 1) * (this.width - this.left - 6); }

  blocks(name, values, top, written) {
    const height = 34, { calls, steps } = this.player, bottom = this.height + height;
    this.add(this.svg, "text", { class: "name", x: 0, y: this.height + 22 }, name);
    calls.forEach((call, i) => {
      const from = this.x(call.step), to = this.x(i + 1 < calls.length ? calls[i + 1].step : Math.max(steps, call.step + 1));
      const tall = Math.max(2, values[i] / top * (height - 12));
      const box = this.add(this.svg, "rect", { class: call.warm_up || !call.kept.includes("0") ? "warm" : "cut",
        x: from, y: bottom - tall, width: Math.max(1, to - from - 1.5), height: tall, "data-step": call.step });
      const text = written(values[i]);
      if (to - from > 7 * text.length) this.add(this.svg, "text", { x: from, y: bottom - tall - 2 }, text);
      this.add(box, "title", {}, `call ${i + 1}: ${name} ${text}`);
    });
    this.height = bottom + 8;
  }

  groups() {
    const { calls } = this.player;
    if (!calls.every((call) => call.actions)) return [];
    const dims = calls[0].actions[0].length;
    if (dims !== 7) return [["action", [], [...Array(dims).keys()]]];
    return [["move", "xyz", [0, 1, 2]], ["turn", "xyz", [3, 4, 5]], ["gripper", [], [6]]];
  }

  lines(name, parts, dims) {
    const height = dims.length > 1 ? 54 : 30, middle = this.height + height / 2;
    const { calls, steps } = this.player;
    const points = calls.flatMap((call) => call.actions.map((action, i) => [call.step + i, action])).filter(([at]) => at < steps);
    const top = Math.max(1e-9, ...points.flatMap(([, action]) => dims.map((dim) => Math.abs(action[dim]))));
    this.add(this.svg, "text", { class: "name", x: 0, y: middle + 4 }, name);
    [...parts].forEach((part, i) => this.add(this.svg, "text", { x: 44 + 10 * i, y: middle + 4, style: `fill: var(--series-${i})` }, part));
    this.add(this.svg, "line", { class: "base", x1: this.left, x2: this.width - 6, y1: middle, y2: middle });
    dims.forEach((dim, i) => {
      const y = (action) => middle - action[dim] / top * (height / 2 - 4);
      const path = points.map(([at, action], n) =>
        `${n ? "L" : "M"}${this.x(at).toFixed(1)},${y(action).toFixed(1)}H${this.x(at + 1).toFixed(1)}`).join("");
      this.add(this.svg, "path", { d: path, style: `stroke: var(--series-${i % 6})` });
    });
    this.height += height + 6;
  }

  draw() {
    if (this.element.clientWidth !== this.width) { timeline = new TimeLine(this.player); timeline.draw(); return; }
    const x = this.x(Math.min(step, this.player.steps));
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    const now = this.player.at(Math.min(step, this.player.steps)).step;
    this.svg.querySelectorAll("rect").forEach((box) => box.classList.toggle("now", Number(box.dataset.step) === now));
  }
}

function draw() {
  for (const player of players) player.draw(step);
  if (timeline) timeline.draw();
  find(".transport input").value = step;
  find(".time").textContent = data.unit === "s"
    ? `${(step / data.hz).toFixed(1)} s of ${(last / data.hz).toFixed(1)} s` : `call ${step + 1} of ${last + 1}`;
}

function play(on) {
  playing = on;
  find(".play").innerHTML = on ? ICONS.pause : ICONS.play;
  find(".play").setAttribute("aria-label", on ? "Pause" : "Play");
}

function seek(to) { step = Math.max(0, Math.min(last, to)); draw(); }

/* the next call, or the one before */
function seekCall(move) {
  const starts = [...new Set(players.flatMap((player) => (player.calls || []).map((call) => call.step)))].sort((a, b) => a - b);
  const to = move > 0 ? starts.find((at) => at > step) : starts.findLast((at) => at < step);
  if (to !== undefined) seek(to);
}

function show(number, at, wanted = focus) {
  shown = number;
  const scene = data.scenes[number];
  focus = scene.runs[wanted] && scene.runs[wanted].recording ? wanted : null;
  document.querySelectorAll(".scenes button").forEach((button, i) => {
    button.setAttribute("aria-selected", i === number);
    button.tabIndex = i === number ? 0 : -1;
  });
  find(".say").textContent = `“${scene.instruction}”`;
  const chosen = data.conditions.filter(({ name }) => focus === null || name === focus);
  players = chosen.map((condition) => new Player(condition, scene.runs[condition.name], scene));
  find(".players").replaceChildren(...players.map((player) => player.element));
  find(".films").classList.toggle("focused", focus !== null);
  const chips = data.conditions.filter(({ name }) => scene.runs[name] && scene.runs[name].recording);
  find(".focuses").hidden = chips.length < 2;
  find(".focuses").replaceChildren(...[{ name: null, label: "side by side" }, ...chips].map(({ name, label }) => {
    const chip = make("button", { type: "button", className: "chip", textContent: label, onclick: () => show(shown, step, name) });
    chip.setAttribute("aria-pressed", name === focus);
    return chip;
  }));
  last = Math.max(...players.map((player) => player.steps));
  find(".transport input").max = last;
  find(".timeline").hidden = find(".keys").hidden = true;
  const single = players.length === 1 && players[0].recording ? players[0] : null;
  find(".timeline").hidden = find(".keys").hidden = !single;
  timeline = single ? new TimeLine(single) : null;
  seek(at === undefined ? scene.start : at);
}

data.scenes.forEach((scene, i) => {
  const pips = make("span", { className: "pips" });
  const outcomes = data.unit === "s" ? data.conditions.map(({ name, label }) => {
    const run = scene.runs[name];
    pips.append(make("i", { className: !run ? "none" : run.success ? "yes" : "" }));
    return `${label}: ${!run ? "not run" : run.success ? "done" : "not done"}`;
  }) : [];
  const button = make("button", { type: "button", role: "tab", title: outcomes.join("\n"), onclick: () => show(i) },
    `${i + 1} ${scene.name}`, pips);
  button.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.stopPropagation();
    const next = (i + move + data.scenes.length) % data.scenes.length;
    show(next);
    document.querySelectorAll(".scenes button")[next].focus();
  });
  find(".scenes").append(button);
});
find(".scenes").hidden = data.scenes.length < 2;

/* the legend names what occurs */
const codes = new Set(data.scenes.flatMap(({ runs }) => Object.values(runs)).flatMap((run) => run.recording ? run.recording.calls : [])
  .flatMap((call) => [...call.kept]));
document.querySelectorAll(".films .legend li").forEach((item) => { item.hidden = !codes.has(item.dataset.code); });

find(".play").onclick = () => { if (!playing && step >= last) seek(0); play(!playing); };
find(".transport input").oninput = (event) => { play(false); seek(Number(event.target.value)); };
const overlays = document.querySelectorAll('input[name="overlay"]');
overlays.forEach((input) => { input.onchange = () => { overlay = input.value; draw(); }; });

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, summary") || event.ctrlKey || event.metaKey || event.altKey || !data.scenes.length) return;
  const { key } = event, onButton = event.target.closest("button, a");
  if (key === " " && !onButton) find(".play").click();
  else if (key === "ArrowRight" || key === "ArrowLeft") {
    const move = key === "ArrowRight" ? 1 : -1;
    play(false);
    if (event.shiftKey) seekCall(move); else seek(step + move);
  }
  else if (key === "Home") seek(0);
  else if (key === "End") seek(last);
  else if ("123".includes(key) && key) overlays[Number(key) - 1].click();
  else if (key === "Escape" && focus !== null && data.conditions.length > 1) show(shown, step, null);
  else return;
  event.preventDefault();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", draw);

let before = 0, debt = 0;
function tick(now) {
  if (playing) {
    debt += Math.min(now - before, 200) / 1000 * data.speed;
    while (debt >= 1) {
      debt -= 1;
      if (step >= last) { play(false); break; }
      seek(step + 1);
    }
  }
  before = now;
  requestAnimationFrame(tick);
}

/* A page opens at the first scene that every run solved; page.html#scene=2&step=12&run=vla-pruner@0.25 at a certain moment. */
if (data.scenes.length) {
  const wanted = new URLSearchParams(location.hash.slice(1));
  play(false);
  const everywhere = (scene) => data.conditions.every(({ name }) => scene.runs[name] && scene.runs[name].success);
  const first = Math.max(0, data.scenes.findIndex(everywhere)) + 1;
  const scene = Math.min(data.scenes.length, Math.max(1, Number(wanted.get("scene")) || first)) - 1;
  show(scene, wanted.has("step") ? Number(wanted.get("step")) || 0 : undefined, wanted.get("run") || data.focus);
  requestAnimationFrame(tick);
} else {
  find(".films").hidden = true;
}
