"use strict";
// Shows the values at the pointer, for plots and tokens. Text is inserted only as text nodes.
const SVG = "http://www.w3.org/2000/svg";
const make = (name, css, text) => {
  const node = document.createElement(name);
  if (css) node.className = css;
  if (text !== undefined) node.textContent = text;
  return node;
};

const tip = document.body.appendChild(make("div"));
tip.id = "tip";
function hoverPlot(svg) {
  const plot = JSON.parse(svg.dataset.plot);
  const cursor = svg.querySelector(".cursor");
  const hide = () => { tip.style.display = "none"; cursor.replaceChildren(); };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = plot.series.map((s) => ({ s, point: s.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)) }));
    if (!near.length) return;
    const at = near.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a)).point;
    tip.replaceChildren(make("div", "", `${plot.x} ${at[2]}`));
    const line = document.createElementNS(SVG, "line");
    for (const [key, value] of [["x1", at[0]], ["x2", at[0]], ["y1", 10], ["y2", svg.viewBox.baseVal.height - 24]]) line.setAttribute(key, value);
    cursor.replaceChildren(line);
    for (const { s, point } of near) {
      if (point[2] !== at[2]) continue;
      const row = make("div");
      row.append(make("i", s.css), `${s.name} ${point[3]}`);
      tip.append(row);
      const dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("class", s.css);
      for (const [key, value] of [["cx", point[0]], ["cy", point[1]], ["r", 3.6]]) dot.setAttribute(key, value);
      cursor.append(dot);
    }
    tip.style.display = "block";
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 6);
    tip.style.left = `${Math.max(left, 6)}px`;
    tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 12, 6)}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

const NAMES = { student: "student", base: "base", privileged: "teacher", reference: "ref-only", target: "target" };
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
const figure = (value, digits) => {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
};
const signed = (value) => (Number(figure(value, 2)) > 0 ? "+" : "") + figure(value, 2);
function readTokens(block) {
  const data = JSON.parse(document.getElementById(block.dataset.rollout).textContent);
  const panel = block.closest(".reader").querySelector(".inspector");
  const spans = [...block.children];
  let pinned = -1;
  const open = (is) => {  // on narrow screens the panel is a sheet; a tap on a token opens it
    document.querySelectorAll(".inspector.open").forEach((other) => other.classList.remove("open"));
    panel.classList.toggle("open", is);
  };
  const inspect = (index) => {
    block.querySelector(".on")?.classList.remove("on");
    spans[index].classList.add("on");
    const at = (name) => data.values[name][index];
    const facts = make("table");
    for (const [label, value] of [
      ["Δ_total = log teacher − log student", signed(at("delta_total"))],
      ["Δ_ref = log reference-only − log student", signed(at("delta_reference"))],
      ["Δ_it = log teacher − log reference-only", signed(at("delta_question"))],
      ["log target − log student", signed(at("delta_target"))],
      ...data.statistics.map(([name, symbol]) => [symbol, figure(at(name), 2)]),
    ]) {
      const row = facts.insertRow();
      const head = make("th", "", label);
      row.append(head, make("td", "", value));
    }
    const lists = make("div", "alts");
    for (const name of Object.keys(NAMES)) {
      const column = lists.appendChild(make("section"));
      column.append(make("h5", "", NAMES[name]));
      const row = data.alternatives[name][index];
      for (let k = 0; k < row.length; k += 2) {
        const text = data.alternatives.texts[row[k]];
        const line = column.appendChild(make("div", text === data.pieces[index] ? "same" : ""));
        const bar = make("i");
        bar.style.width = `${Math.round(row[k + 1] * 100)}%`;
        line.append(bar, make("code", "", visible(text)), make("small", "", (row[k + 1] * 100).toFixed(row[k + 1] < 0.0995 ? 1 : 0)));
        line.title = `${visible(text)} ${row[k + 1]}`;
      }
    }
    panel.replaceChildren(
      make("h4", "", `token ${index + 1} of ${spans.length}`),
      make("div", "now", visible(data.pieces[index]) || "(part of the next token)"),
      facts, make("h4", "", "most likely tokens, per cent"), lists,
    );
  };
  const place = (event) => spans.indexOf(event.target.closest("span"));
  block.addEventListener("pointerover", (event) => { if (pinned < 0 && place(event) >= 0) inspect(place(event)); });
  block.addEventListener("click", (event) => {
    const index = place(event);
    if (index < 0) return;
    pinned = pinned === index ? -1 : index;
    inspect(index);
    open(pinned >= 0);
  });
  block.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    pinned = Math.min(Math.max(pinned + move, 0), spans.length - 1);
    inspect(pinned);
    open(true);
    spans[pinned].scrollIntoView({ block: "nearest" });
  });
  inspect(data.first);
}

document.querySelectorAll("svg[data-plot]").forEach(hoverPlot);
document.querySelectorAll(".tokens[data-rollout]").forEach(readTokens);
document.querySelectorAll(".switch").forEach((control) => {
  control.addEventListener("click", (event) => {
    const chosen = event.target.closest("button");
    if (!chosen) return;
    for (const button of control.children) button.setAttribute("aria-pressed", String(button === chosen));
    const area = document.querySelector(".readers");
    area.classList.remove("show-both", "show-it", "show-ref");
    area.classList.add(chosen.value);
  });
});
document.documentElement.dataset.ready = "yes";
