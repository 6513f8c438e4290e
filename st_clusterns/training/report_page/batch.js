// A batch: the cosines of all its pairs before and after, with the negatives that matter marked.

const KINDS = ["", "false", "hard"];

class Matrix {
  constructor(view, title) {
    this.view = view;
    this.canvas = make("canvas", { id: `batch-${view}`, tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${title}: cosines of the sentences of a batch`);
    $("matrices").append(make("figure", {}, make("figcaption", {}, make("span", {}, title)), this.canvas));
    this.canvas.onclick = (event) => {
      const cell = this.canvas.clientWidth / batch().rows.length;
      const [x, y] = place(event, this.canvas);
      showPair(Math.floor(y / cell), Math.floor(x / cell));
    };
    this.canvas.onkeydown = (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [first, second] = state.cell || [0, 0];
      showPair(first + step[0], second + step[1]);
    };
  }

  draw() {
    const [context, width] = fit(this.canvas);
    const { rows, kinds } = batch(), n = rows.length, cell = width / n, [low, high] = cosineRange();
    const ends = ["--low", "--high"].map((name) => css(name).split(",").map(Number));
    const marks = KINDS.map((kind) => kind && css(`--${kind}`));
    context.lineWidth = Math.max(1, cell / 6);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) {
        const share = Math.min(1, Math.max(0, (batch()[this.view][i * n + j] / 1000 - low) / (high - low || 1)));
        context.fillStyle = `rgb(${ends[0].map((from, c) => Math.round(from + (ends[1][c] - from) * share))})`;
        context.fillRect(j * cell, i * cell, cell + 0.5, cell + 0.5);
      }
    }
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) {
        const kind = kinds[i * n + j], inset = cell * 0.2, [left, top, side] = [j * cell + inset, i * cell + inset, cell - 2 * inset];
        if (!kind) continue;
        context.strokeStyle = marks[kind];
        context.beginPath();
        if (KINDS[kind] === "false") context.rect(left, top, side, side);
        else { context.moveTo(left, top); context.lineTo(left + side, top + side); context.moveTo(left + side, top); context.lineTo(left, top + side); }
        context.stroke();
      }
    }
    if (!state.cell) return;
    Object.assign(context, { strokeStyle: css("--accent"), lineWidth: 2 });
    const [first, second] = state.cell;
    context.strokeRect(0, first * cell, width, cell);
    context.strokeRect(second * cell, 0, cell, width);
  }
}

const batch = () => data.batches[$("batch").selectedIndex];

function cosineRange() { // of different sentences, before and after, so that the two matrices compare
  const { rows, before, after } = batch();
  const others = [...before, ...after].filter((_, i) => (i % rows.length ** 2) % (rows.length + 1));
  return [Math.min(...others) / 1000, Math.max(...others) / 1000];
}

function showPair(first, second) {
  const { rows, before, after, kinds } = batch(), n = rows.length, bound = (i) => Math.min(n - 1, Math.max(0, i));
  state.cell = [bound(first), bound(second)];
  const at = state.cell[0] * n + state.cell[1], pair = state.cell.map((i) => rows[i]);
  const what = state.cell[0] === state.cell[1] ? "The sentence itself." : data.kinds[kinds[at]];
  $("cell").replaceChildren(...pair.flatMap((i) => [quote(data.texts[i]), make("p", { className: "note" }, "Topic: ", topicLabel(data.topics[i]))]),
    make("p", {}, make("strong", {}, `Cosine ${fixed(before[at] / 1000)} before, ${fixed(after[at] / 1000)} after. `), what));
  redraw();
}

function showBatch() {
  state.cell = null;
  const [low, high] = cosineRange();
  $("scale").replaceChildren(`cosine ${low.toFixed(2)}`, make("b"), high.toFixed(2));
  const { rows, kinds } = batch(), pairs = Math.max(1, rows.length * (rows.length - 1));
  const share = (kind) => `${((100 * kinds.filter((each) => KINDS[each] === kind).length) / pairs).toFixed(1)} %`;
  $("batch-note").textContent = `${rows.length} sentences drawn at random, as for training, in the order of their topics. In contrastive learning each row has all other sentences as negatives. Of these, ${share("false")} are probably false and ${share("hard")} are hard.`;
  redraw();
}
