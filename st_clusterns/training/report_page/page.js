"use strict";
// The data, and small helpers. Every text enters the page by `append` or `textContent`, never as markup.

const $ = (id) => document.getElementById(id);
const LISTED = 200; // sentences in the list of hits, at most
const VIEWS = ["before", "after"];
const state = { query: "", topic: -1, chosen: -1, hover: -1, lit: null }; // lit: one byte a sentence; null: all
const maps = [], matrices = [];
let data, lowered;

async function unpack() {
  const bytes = Uint8Array.from(atob($("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function row(tag, cells, numbers = []) {
  return make("tr", {}, ...cells.map((cell, i) => make(tag, { className: numbers.includes(i) ? "number" : "" }, cell)));
}

function fill(table, header, rows, numbers) {
  const body = make("tbody", {}, ...rows.map((cells) => row("td", cells, numbers)));
  table.replaceChildren(...(header ? [make("thead", {}, row("th", header, numbers))] : []), body);
}

const count = (number) => number.toLocaleString("en");
const fixed = (number) => (number === null ? "–" : number.toFixed(3));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const hue = (topic) => (data.colours[topic] < 0 ? "--none" : `--hue${data.colours[topic]}`);
const named = (topic) => data.names[topic] + (data.trusted[topic] ? "" : " (not trusted)");

function topicLabel(topic) {
  const dot = make("span", { className: "dot" });
  dot.style.background = `var(${hue(topic)})`;
  return make("span", {}, dot, named(topic));
}

function sentenceButton(index, ...more) {
  const button = make("button", { className: "text", type: "button", onclick: () => choose(index) }, data.texts[index]);
  button.onpointerenter = button.onfocus = () => hover(index);
  button.onpointerleave = button.onblur = () => hover(-1);
  button.dataset.sentence = index;
  button.append(...more);
  return button;
}

function quote(text) {
  return make("blockquote", { dir: "auto" }, text);
}

function fit(canvas) { // as many pixels as the screen has; returns the drawing context and the size in CSS pixels
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) Object.assign(canvas, { width: across, height: down });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

function place(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; [...maps, ...matrices].forEach((part) => part.draw()); });
}

// What is highlighted, in both maps at once: a search, a topic, the sentence under the pointer, the chosen one.

function filter() {
  const { query, topic } = state;
  state.lit = query || topic >= 0
    ? Uint8Array.from(lowered, (text, i) => (text.includes(query) && (topic < 0 || data.topics[i] === topic) ? 1 : 0)) : null;
  const hits = state.lit ? [...state.lit.keys()].filter((i) => state.lit[i]) : [...data.texts.keys()];
  $("count").textContent = `${count(hits.length)} of ${count(data.texts.length)} sentences`;
  $("hits-title").textContent = state.lit ? `Sentences found (${count(hits.length)})` : "Sentences";
  $("hits").replaceChildren(...hits.slice(0, LISTED).map((i) => make("li", {}, sentenceButton(i))));
  if (hits.length > LISTED) $("hits").append(make("li", { className: "note" }, `The first ${LISTED} are listed.`));
  $("topic").value = topic;
  document.querySelectorAll("#topics button").forEach((button, i) => button.setAttribute("aria-current", data.bySize[i] === topic));
  redraw();
}

function showTopic(topic) {
  state.topic = topic;
  filter();
}

function hover(index, event) {
  $("tip").hidden = index < 0 || !event;
  if (!$("tip").hidden) {
    $("tip").replaceChildren(data.texts[index], make("small", {}, topicLabel(data.topics[index])));
    const left = event.clientX + 14, width = $("tip").offsetWidth;
    $("tip").style.left = `${Math.max(4, left + width > innerWidth ? event.clientX - width - 14 : left)}px`;
    $("tip").style.top = `${event.clientY + 14}px`;
  }
  if (state.hover !== index) { state.hover = index; redraw(); }
}

function choose(index) {
  state.chosen = index;
  const width = data.neighbours.before.length / data.texts.length;
  const near = VIEWS.map((view) => data.neighbours[view].slice(width * index, width * (index + 1)));
  const list = (title, own, other) => make("div", {}, make("h3", {}, title), make("ol", {}, ...own.map((i) =>
    make("li", {}, sentenceButton(i, ...(other && !other.includes(i) ? [make("span", { className: "new" }, "new")] : []))))));
  $("sentence").replaceChildren(make("h3", {}, "Neighbours of a sentence"), quote(data.texts[index]),
    make("p", { className: "note" }, "Topic: ", topicLabel(data.topics[index])),
    make("div", { className: "pair" }, list("Nearest before", near[0]), list("Nearest after", near[1], near[0])));
  redraw();
}

// Training curves, one for each number that the trainer logged.

function curve(name, entries) {
  const NS = "http://www.w3.org/2000/svg", draw = (tag, attributes, text = "") => {
    const element = document.createElementNS(NS, tag);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    element.append(text);
    return element;
  };
  const [steps, values] = [0, 1].map((side) => entries.map((entry) => entry[side]));
  const scale = (all, from, to) => { const low = Math.min(...all), span = Math.max(...all) - low || 1; return (v) => from + ((v - low) / span) * (to - from); };
  const [x, y] = [scale(steps, 12, 288), scale(values, 108, 30)], short = (value) => String(Number(value.toPrecision(3)));
  const svg = draw("svg", { viewBox: "0 0 300 132", role: "img", "aria-label": `${name}: ${short(values[0])} at first, ${short(values.at(-1))} at last` });
  svg.append(draw("path", { d: "M" + entries.map(([step, value]) => `${x(step)} ${y(value)}`).join("L") }),
    draw("text", { x: 12, y: 16 }, `${name}: ${short(values[0])} → ${short(values.at(-1))}`),
    draw("text", { x: 12, y: 127 }, `step ${steps[0]}`), draw("text", { x: 288, y: 127, "text-anchor": "end" }, `step ${steps.at(-1)}`));
  return svg;
}

// The page.

function build() {
  lowered = data.texts.map((text) => text.toLowerCase());
  data.bySize = [...data.names.keys()].sort((a, b) => data.sizes[b] - data.sizes[a] || a - b);
  for (const id of ["verdict", "privacy", "topics-note", "moved-note", "colours-note"]) $(id).textContent = data.notes[id];
  if (data.texts.some((text) => text.length >= data.limit)) $("privacy").append(` Long sentences are cut to ${data.limit} characters.`);
  const option = (value, text) => make("option", { value }, text);
  $("topic").append(option(-1, "All topics"), ...data.bySize.map((topic) => option(topic, `${named(topic)} (${count(data.sizes[topic])})`)));
  fill($("topics"), ["Topic", "Sentences", "Trust", "Typical sentences"], data.bySize.map((topic) => [
    make("button", { className: "text", type: "button", onclick: () => showTopic(state.topic === topic ? -1 : topic) }, topicLabel(topic)),
    count(data.sizes[topic]), data.trust[topic].toFixed(2), make("div", {}, ...data.examples[topic].map((text) => make("div", { dir: "auto" }, text)))]), [1, 2]);
  fill($("moved"), ["Sentence", "Topic", "New neighbours", "Moved by"], data.moved.map(([i, fresh, gap]) => [
    sentenceButton(i), topicLabel(data.topics[i]), fresh, gap.toFixed(3)]), [2, 3]);
  fill($("measures"), ["Measure", ...data.titles], data.measures.map(([name, ...values]) => [name, ...values.map(fixed)]), [1, 2]);
  fill($("facts"), ["Setting", "Value"], data.facts, []);
  VIEWS.forEach((view, i) => maps.push(new SentenceMap(view, data.titles[i])));
  $("batch").append(...data.batches.map((_, i) => option(i, i + 1)));
  VIEWS.forEach((view, i) => matrices.push(new Matrix(view, data.titles[i])));
  $("batch").onchange = showBatch;
  const curves = Object.entries(data.curves);
  $("training").hidden = !curves.length;
  $("curves").append(...curves.map(([name, entries]) => curve(name, entries)));
  $("search").oninput = () => { state.query = $("search").value.trim().toLowerCase(); filter(); };
  $("topic").onchange = () => showTopic(Number($("topic").value));
  $("controls").onsubmit = (event) => event.preventDefault();
  $("controls").onreset = () => { state.query = ""; showTopic(-1); };
  new ResizeObserver(redraw).observe($("maps"));
  matchMedia("(prefers-color-scheme: dark)").onchange = redraw;
  filter();
  showBatch();
  document.body.dataset.ready = "true";
}

unpack().then((found) => { data = found; build(); }).catch((error) => {
  $("failure").hidden = false;
  $("failure").textContent = `The page could not be drawn (${error}). It needs a browser of 2023 or later.`;
  throw error;
});
