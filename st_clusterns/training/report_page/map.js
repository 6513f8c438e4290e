// A map of the sentences: points in 0 ... 10,000, moved and zoomed on a canvas.

class SentenceMap {
  constructor(view, title) {
    this.points = data[view];
    this.title = title;
    this.canvas = make("canvas", { id: view, tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    const button = (sign, label, act) => {
      const made = make("button", { type: "button", onclick: act }, sign);
      made.setAttribute("aria-label", `${label}: ${title}`);
      return made;
    };
    const caption = make("figcaption", {}, make("span", {}, title), button("+", "Zoom in", () => this.zoom(1.5)),
      button("−", "Zoom out", () => this.zoom(1 / 1.5)), button("0", "Whole map", () => this.reset()));
    $("maps").append(make("figure", {}, caption, this.canvas));
    this.order = Int32Array.from(data.texts.keys()).sort((a, b) => // one colour after the other, the grey below
      data.colours[data.topics[a]] - data.colours[data.topics[b]] || a - b);
    this.spans = [0, 1].map((side) => {
      const values = this.points.filter((_, i) => i % 2 === side);
      return values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b)) || 1;
    });
    this.labels = this.findLabels();
    this.listen();
    this.reset();
  }

  findLabels() { // the median of each trusted topic, the largest first
    const members = data.names.map(() => []);
    data.topics.forEach((topic, i) => members[topic].push(i));
    const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    const topics = [...data.names.keys()].filter((topic) => members[topic].length && data.trusted[topic]);
    topics.sort((a, b) => members[b].length - members[a].length);
    return topics.map((topic) => [topic, ...[0, 1].map((side) => middle(members[topic].map((i) => this.points[2 * i + side])))]);
  }

  reset() {
    Object.assign(this, { scale: 1, x: 5000, y: 5000 });
    redraw();
  }

  zoom(factor, at) {
    const [x, y] = at ? this.inside(...at) : [this.x, this.y];
    const scale = Math.min(60, Math.max(1, this.scale * factor));
    this.x = x + ((this.x - x) * this.scale) / scale;
    this.y = y + ((this.y - y) * this.scale) / scale;
    this.scale = scale;
    redraw();
  }

  get unit() { // CSS pixels per unit of the map
    const [width, height] = this.spans;
    return 0.92 * Math.min(this.canvas.clientWidth / width, this.canvas.clientHeight / height) * this.scale;
  }

  inside(x, y) {
    return [this.x + (x - this.canvas.clientWidth / 2) / this.unit, this.y + (y - this.canvas.clientHeight / 2) / this.unit];
  }

  outside(i) {
    const unit = this.unit;
    return [(this.points[2 * i] - this.x) * unit + this.canvas.clientWidth / 2,
      (this.points[2 * i + 1] - this.y) * unit + this.canvas.clientHeight / 2];
  }

  find(x, y) { // the nearest sentence that is not filtered out, within 14 pixels
    const [left, top] = this.inside(x, y);
    let best = -1, least = (14 / this.unit) ** 2;
    for (let i = 0; i < data.texts.length; i++) {
      if (state.lit && !state.lit[i]) continue;
      const distance = (this.points[2 * i] - left) ** 2 + (this.points[2 * i + 1] - top) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  draw() {
    const [context, width, height] = fit(this.canvas);
    const size = Math.min(8, Math.max(1.6, 220 / Math.sqrt(data.texts.length)) * Math.sqrt(this.scale)), half = size / 2;
    const [unit, left, top] = [this.unit, width / 2 - this.x * this.unit, height / 2 - this.y * this.unit];
    const colours = data.names.map((_, topic) => css(hue(topic))), pale = css("--line");
    for (const lit of state.lit ? [0, 1] : [1]) {
      context.globalAlpha = lit ? 0.75 : 1; // pale and opaque: many faint dots on top of each other would look solid
      let colour;
      for (const i of this.order) {
        if (state.lit && state.lit[i] !== lit) continue;
        const own = lit ? colours[data.topics[i]] : pale;
        if (colour !== own) context.fillStyle = colour = own;
        const [x, y] = [this.points[2 * i] * unit + left, this.points[2 * i + 1] * unit + top];
        if (x < -size || y < -size || x > width + size || y > height + size) continue;
        if (size < 3) { context.fillRect(x - half, y - half, size, size); continue; } // the eye sees no corners
        context.beginPath();
        context.arc(x, y, half, 0, 2 * Math.PI);
        context.fill();
      }
    }
    context.globalAlpha = 1;
    this.drawLabels(context);
    for (const i of new Set([state.chosen, state.hover])) if (i >= 0) this.ring(context, ...this.outside(i), size);
    const shown = state.lit ? `, ${count(state.lit.reduce((sum, bit) => sum + bit, 0))} highlighted` : "";
    this.canvas.setAttribute("aria-label", `${this.title}: ${count(data.texts.length)} sentences${shown}`);
  }

  drawLabels(context) {
    const taken = [];
    Object.assign(context, { font: "600 11.5px system-ui, sans-serif", textAlign: "center", textBaseline: "middle", lineWidth: 4,
      lineJoin: "round", strokeStyle: css("--page"), fillStyle: css("--ink") });
    for (const [topic, left, top] of this.labels) {
      if (state.topic >= 0 ? topic !== state.topic : state.lit) continue;
      const { clientWidth: width, clientHeight: height } = this.canvas, half = context.measureText(data.names[topic]).width / 2 + 6;
      let [x, y] = [(left - this.x) * this.unit + width / 2, (top - this.y) * this.unit + height / 2];
      if (x < 0 || y < 0 || x > width || y > height) continue;
      x = Math.max(half, Math.min(width - half, x)); // whole, also at the edge
      if (taken.some(([a, b, other]) => Math.abs(a - x) < half + other && Math.abs(b - y) < 18)) continue;
      taken.push([x, y, half]);
      context.strokeText(data.names[topic], x, y);
      context.fillText(data.names[topic], x, y);
    }
  }

  ring(context, x, y, size) {
    for (const [colour, width] of [["--page", 5], ["--ink", 2]]) {
      Object.assign(context, { strokeStyle: css(colour), lineWidth: width });
      context.beginPath();
      context.arc(x, y, size / 2 + 6, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  listen() {
    const { canvas } = this;
    let held = null;
    canvas.onpointerdown = (event) => { held = [...place(event, canvas), 0]; canvas.setPointerCapture(event.pointerId); };
    canvas.onpointermove = (event) => {
      const [x, y] = place(event, canvas);
      if (!held) return hover(this.find(x, y), event);
      this.x -= (x - held[0]) / this.unit;
      this.y -= (y - held[1]) / this.unit;
      held = [x, y, held[2] + Math.abs(x - held[0]) + Math.abs(y - held[1])];
      redraw();
    };
    canvas.onpointerup = (event) => {
      const found = held && held[2] < 4 ? this.find(...place(event, canvas)) : -1;
      held = null;
      if (found >= 0) choose(found);
    };
    canvas.onpointercancel = () => { held = null; };
    canvas.onpointerleave = () => hover(-1);
    canvas.ondblclick = (event) => this.zoom(2, place(event, canvas));
    canvas.addEventListener("wheel", (event) => { // only after a click on the map, so that the page can be scrolled
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), place(event, canvas));
    }, { passive: false });
    canvas.onkeydown = (event) => {
      const step = 60 / this.unit;
      const keys = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (keys[event.key]) { this.x += keys[event.key][0]; this.y += keys[event.key][1]; redraw(); }
      else if (event.key === "+" || event.key === "=") this.zoom(1.5);
      else if (event.key === "-") this.zoom(1 / 1.5);
      else if (event.key === "0") this.reset();
      else return;
      event.preventDefault();
    };
  }
}
