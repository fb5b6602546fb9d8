"use strict";

/* What the interactive figures share: planes with points that can be moved, sliders, numbers.

   A figure is a file of its own, NAME.js, that calls touch.add("NAME", {..., mount(frame)}): its
   mathematics as pure functions, which tests/test_figures.py compares with the library, and mount,
   which puts planes and controls into the frame. Classic scripts, since the book is also read
   from files, from where browsers load no modules. Nothing moves unless the reader moves it. */
const touch = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 42, right: 12, top: 28, bottom: 40 };
  const BARE = { left: 10, right: 10, top: 28, bottom: 10 }; // without ticks
  const figures = {};
  let count = 0; // of ids and groups of buttons, unique in a page

  // ------------------------------------------------------------------------------ numbers

  const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴" };
  Object.assign(SUPERSCRIPT, { 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" });

  /** A power of ten as it is printed, 10⁻³. */
  const power = (exponent) => "10" + [...String(exponent)].map((c) => SUPERSCRIPT[c]).join("");

  /** A number as it is printed: a true minus, and a power of ten for the very large and small. */
  function number(value, digits = 2) {
    if (!Number.isFinite(value)) return value > 0 ? "∞" : value < 0 ? "−∞" : "–";
    const size = Math.abs(value);
    if (size >= 1e4 || (size < 0.5 * 10 ** -digits && size > 1e-13)) {
      const [mantissa, exponent] = value.toExponential(1).split("e");
      return `${mantissa.replace("-", "−")} · ${power(Number(exponent))}`;
    }
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }

  const clamp = (value, [low, high]) => Math.min(Math.max(value, low), high);

  const range = (n, from, to) =>
    Array.from({ length: n }, (_, i) => from + ((to - from) * i) / (n - 1));

  /** Product of a matrix, given by its rows, and a matrix or a vector. */
  const multiply = (A, B) =>
    A.map((row) =>
      Array.isArray(B[0])
        ? B[0].map((_, j) => row.reduce((sum, a, k) => sum + a * B[k][j], 0))
        : row.reduce((sum, a, k) => sum + a * B[k], 0),
    );

  const rotation = (angle) => [
    [Math.cos(angle), -Math.sin(angle)],
    [Math.sin(angle), Math.cos(angle)],
  ];

  /** Singular value decomposition of a 2×2 matrix, A = Σ S[i] u[i] v[i]ᵀ with S[0] ≥ S[1]. */
  function svd([[a, b], [c, d]]) {
    // A is the sum of a multiple of a rotation and a multiple of a reflection.
    const turn = [(a + d) / 2, (c - b) / 2];
    const flip = [(a - d) / 2, (c + b) / 2];
    const [p, q] = [Math.hypot(...turn), Math.hypot(...flip)];
    const [s, t] = [Math.atan2(turn[1], turn[0]), Math.atan2(flip[1], flip[0])];
    const [left, right] = [(t + s) / 2, (t - s) / 2];
    const sign = p >= q ? 1 : -1;
    return {
      S: [p + q, Math.abs(p - q)],
      u: [
        [Math.cos(left), Math.sin(left)],
        [-sign * Math.sin(left), sign * Math.cos(left)],
      ],
      v: [
        [Math.cos(right), Math.sin(right)],
        [-Math.sin(right), Math.cos(right)],
      ],
    };
  }

  // ----------------------------------------------------------------------------- elements

  function element(parent, name, attributes = {}, text = "") {
    const inside = name === "svg" || (parent && parent.namespaceURI === SVG);
    const node = inside ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    write(node, text);
    if (parent) parent.append(node);
    return node;
  }

  /** Put text into an element: *x* is set in italics, _{max} as an index. */
  function write(node, text) {
    const inside = node.namespaceURI === SVG;
    node.replaceChildren();
    for (const part of String(text).split(/(\*[^*]+\*|_\{[^}]+\})/)) {
      if (part.startsWith("*")) {
        const italic = inside ? element(node, "tspan", { class: "variable" }) : element(node, "i");
        italic.append(part.slice(1, -1));
      } else if (part.startsWith("_{")) {
        const index = inside ? element(node, "tspan", { class: "index" }) : element(node, "sub");
        index.append(part.slice(2, -1));
      } else node.append(part);
    }
  }

  const plain = (text) => text.replace(/[*{}]/g, "").replaceAll("_", " ");
  const fixed = (value) => Math.round(value * 100) / 100; // of a pixel, enough for any screen

  // --------------------------------------------------------------------------------- plane

  /* Options: title; x and y, the ranges; xticks and yticks, numbers or pairs of a number and its
     label; xlabel and ylabel; width and height in pixels; equal, to draw circles as circles; axes,
     false for none at all. */
  class Plane {
    constructor(frame, options) {
      this.frame = frame;
      this.options = { width: 320, height: 300, title: "", ...options };
      const { width, height, title } = this.options;
      this.x = options.x;
      this.y = options.y;
      const margin = options.xticks || options.yticks ? MARGIN : BARE;
      this.box = {
        left: margin.left,
        right: width - margin.right,
        top: title ? margin.top : 10,
        bottom: height - (options.xlabel ? margin.bottom : Math.min(margin.bottom, 26)),
      };
      if (options.equal) this.equalise();
      this.svg = element(frame.planes, "svg", {
        class: "touch-plane",
        viewBox: `0 0 ${width} ${height}`,
        width,
        height,
        role: "group",
        "aria-label": plain(title) || "plane",
      });
      this.ground = element(this.svg, "g");
      const { left, right, top, bottom } = this.box;
      const clip = `touch-clip-${(count += 1)}`;
      const path = element(element(this.svg, "defs"), "clipPath", { id: clip });
      const size = { x: left, y: top, width: right - left, height: bottom - top };
      element(path, "rect", size);
      this.drawing = element(this.svg, "g", { "clip-path": `url(#${clip})` });
      this.labels = element(this.svg, "g");
      this.handles = [];
      this.axes();
    }

    /** Shrink the range that has too many pixels, so that both have the same scale. */
    equalise() {
      const { left, right, top, bottom } = this.box;
      const [wide, high] = [right - left, bottom - top];
      const scale = Math.min(
        wide / (this.x[1] - this.x[0]),
        high / (this.y[1] - this.y[0]),
      );
      const around = ([low, up], pixels) => {
        const [middle, half] = [(low + up) / 2, pixels / scale / 2];
        return [middle - half, middle + half];
      };
      this.x = around(this.x, wide);
      this.y = around(this.y, high);
    }

    px(value) {
      const { left, right } = this.box;
      return fixed(left + ((value - this.x[0]) / (this.x[1] - this.x[0])) * (right - left));
    }

    py(value) {
      const { top, bottom } = this.box;
      return fixed(bottom - ((value - this.y[0]) / (this.y[1] - this.y[0])) * (bottom - top));
    }

    axes() {
      const { title, width, height, xticks, yticks, xlabel, ylabel } = this.options;
      const { left, right, top, bottom } = this.box;
      const stroke = (x1, y1, x2, y2, kind) =>
        element(this.ground, "line", { x1, y1, x2, y2, class: kind });
      const place = (x, y, text, kind, more = {}) =>
        element(this.ground, "text", { x, y, class: kind, ...more }, text);
      if (title) place((left + right) / 2, 17, title, "title middle");
      if (!xticks && !yticks && this.options.axes !== false) {
        if (this.y[0] < 0 && this.y[1] > 0) stroke(left, this.py(0), right, this.py(0), "axis");
        if (this.x[0] < 0 && this.x[1] > 0) stroke(this.px(0), top, this.px(0), bottom, "axis");
      }
      const pairs = (ticks) => ticks.map((tick) => (Array.isArray(tick) ? tick : [tick, `${tick}`]));
      if (xticks) stroke(left, bottom, right, bottom, "axis");
      for (const [value, text] of pairs(xticks || [])) {
        stroke(this.px(value), bottom, this.px(value), bottom + 4, "axis");
        place(this.px(value), bottom + 17, text.replace("-", "−"), "tick middle");
      }
      if (yticks) stroke(left, top, left, bottom, "axis");
      for (const [value, text] of pairs(yticks || [])) {
        stroke(left - 4, this.py(value), left, this.py(value), "axis");
        place(left - 7, this.py(value) + 4, text.replace("-", "−"), "tick end");
      }
      if (xlabel) place((left + right) / 2, height - 6, xlabel, "tick middle");
      if (ylabel) {
        const [x, y] = [11, (top + bottom) / 2];
        place(x, y, ylabel, "tick middle", { transform: `rotate(-90 ${x} ${y})` });
      }
    }

    clear() {
      this.drawing.replaceChildren();
      this.labels.replaceChildren();
    }

    points(list) {
      // Far outside is far enough: huge coordinates are drawn wrongly.
      const near = (value) => clamp(value, [-5000, 5000]);
      return list.map(([x, y]) => `${near(this.px(x))},${near(this.py(y))}`).join(" ");
    }

    line(list, kind = "") {
      const points = this.points(list);
      return element(this.drawing, "polyline", { points, class: `line ${kind}` });
    }

    area(list, kind = "") {
      const points = this.points(list);
      return element(this.drawing, "polygon", { points, class: `area ${kind}` });
    }

    outline(list, kind = "") {
      const points = this.points(list);
      return element(this.drawing, "polygon", { points, class: `line ${kind}` });
    }

    /** Shade the points of each class by kinds[classify(point)], if there is one. */
    regions(classify, kinds, n = 104) {
      const [xs, ys] = [this.x, this.y].map(([low, high]) => range(n + 1, low, high));
      const middle = (list, i) => (list[i] + list[i + 1]) / 2;
      for (let i = 0; i < n; i += 1) {
        const said = xs.slice(1).map((_, j) => classify([middle(xs, j), middle(ys, i)]));
        for (let [from, to] = [0, 1]; from < n; to += 1) {
          if (said[to] === said[from]) continue;
          const [l, r, low, high] = [xs[from], xs[to], ys[i], ys[i + 1]];
          const kind = kinds[said[from]];
          if (kind) this.area([[l, low], [r, low], [r, high], [l, high]], `${kind} pixel`);
          from = to;
        }
      }
    }

    dot([x, y], kind = "", r = 4) {
      const place = { cx: this.px(x), cy: this.py(y), r };
      return element(this.drawing, "circle", { ...place, class: `dot ${kind}` });
    }

    arrow(from, to, kind = "") {
      const [x1, y1, x2, y2] = [this.px(from[0]), this.py(from[1]), this.px(to[0]), this.py(to[1])];
      const length = Math.hypot(x2 - x1, y2 - y1);
      element(this.drawing, "line", { x1, y1, x2, y2, class: `line ${kind}` });
      if (length < 1) return;
      const head = Math.min(9, length);
      const [dx, dy] = [((x2 - x1) / length) * head, ((y2 - y1) / length) * head];
      const side = (sign) =>
        `${fixed(x2 - dx - sign * 0.45 * dy)},${fixed(y2 - dy + sign * 0.45 * dx)}`;
      element(this.drawing, "polygon", {
        points: `${x2},${y2} ${side(1)} ${side(-1)}`,
        class: `dot ${kind}`,
      });
    }

    /** Text beside a point; kind holds start (the default), middle or end. */
    text([x, y], text, kind = "", [dx, dy] = [0, 0]) {
      const place = { x: fixed(this.px(x) + dx), y: fixed(this.py(y) + dy) };
      return element(this.labels, "text", { ...place, class: `label ${kind}` }, text);
    }

    /* A point that can be moved by mouse, finger and arrow keys. Options: label, said aloud; name,
       written beside it and said after the label; kind, its colour; at(), where it is;
       move([x, y]), what to do when it is taken there; step of an arrow key. A point on a circle
       has turn(angle) for the keys: left and up turn it against the clock. */
    handle({ label, name = "", kind = "", at, move, turn, step = turn ? Math.PI / 36 : 0.1 }) {
      const handle = element(this.svg, "g", {
        class: `touch-handle ${kind}`,
        tabindex: 0,
        role: "button",
        "aria-roledescription": "movable point",
      });
      element(handle, "circle", { r: 22, class: "reach" });
      element(handle, "circle", { r: 13, class: "ring" });
      element(handle, "circle", { r: 7, class: "knob" });
      if (name) element(handle, "text", { x: 11, y: -9, class: `label ${kind}` }, name);
      const go = ([x, y]) => {
        move([clamp(x, this.x), clamp(y, this.y)]);
        this.frame.update();
      };
      let grip = null; // from the pointer to the point, held while it is dragged
      handle.addEventListener("pointerdown", (event) => {
        const [pointer, here] = [this.where(event), at()];
        grip = [here[0] - pointer[0], here[1] - pointer[1]];
        handle.setPointerCapture(event.pointerId);
        handle.focus({ preventScroll: true });
        event.preventDefault();
      });
      handle.addEventListener("pointermove", (event) => {
        if (!grip) return;
        const [x, y] = this.where(event);
        go([x + grip[0], y + grip[1]]);
      });
      // Otherwise a finger soon moves the page; touch-action does not work inside a drawing.
      handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
      for (const end of ["pointerup", "pointercancel"])
        handle.addEventListener(end, () => (grip = null));
      handle.addEventListener("keydown", (event) => {
        const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
        const way = ways[event.key];
        if (!way || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        event.stopPropagation(); // the theme turns the page
        const size = event.shiftKey ? step / 10 : step;
        const [x, y] = at();
        if (turn) {
          turn(size * (way[1] - way[0]));
          this.frame.update();
        } else go([x + way[0] * size, y + way[1] * size]);
      });
      this.handles.push(() => {
        const [x, y] = at();
        const inside = [clamp(x, this.x), clamp(y, this.y)];
        handle.setAttribute("transform", `translate(${this.px(inside[0])} ${this.py(inside[1])})`);
        const words = plain(label).split(" ");
        const seen = name.replace(/[*_{}]/g, "");
        if (!words.includes(seen)) words.push(seen);
        handle.setAttribute("aria-label", `${words.join(" ").trim()}: ${number(x)}, ${number(y)}`);
      });
      return handle;
    }

    where(event) {
      const point = new DOMPoint(event.clientX, event.clientY);
      const { x, y } = point.matrixTransform(this.svg.getScreenCTM().inverse());
      const { left, right, top, bottom } = this.box;
      return [
        this.x[0] + ((x - left) / (right - left)) * (this.x[1] - this.x[0]),
        this.y[0] + ((bottom - y) / (bottom - top)) * (this.y[1] - this.y[0]),
      ];
    }
  }

  // --------------------------------------------------------------------------------- frame

  /** What a figure fills: planes above, controls and numbers below. */
  class Frame {
    constructor(place) {
      const description = place.querySelector("img").alt; // the still is hidden, this stays
      this.live = element(null, "div", {
        class: "touch-live",
        role: "group",
        "aria-label": description,
      });
      this.planes = element(this.live, "div", { class: "touch-planes" });
      this.controls = element(this.live, "div", { class: "touch-controls" });
      place.insertBefore(this.live, place.querySelector("figcaption"));
      this.watchers = [];
      this.start = [];
    }

    /** The numbers that the reader may change; "Start again" takes them back to these. */
    state(initial) {
      const state = structuredClone(initial);
      this.start.push(() => Object.assign(state, structuredClone(initial)));
      return state;
    }

    plane(options) {
      const plane = new Plane(this, options);
      this.watchers.push(() => plane.handles.forEach((refresh) => refresh()));
      return plane;
    }

    /* Options: label; min, max, step; get() and set(value); show(value), the text beside it. */
    slider({ label, min, max, step, get, set, show = (value) => number(value) }) {
      const row = element(this.controls, "label", { class: "touch-slider" });
      element(row, "span", {}, label);
      const input = element(row, "input", { type: "range", min, max, step, autocomplete: "off" });
      const output = element(row, "output");
      input.addEventListener("input", () => {
        set(Number(input.value));
        this.update();
      });
      this.watchers.push(() => {
        input.value = get();
        write(output, show(get()));
        input.setAttribute("aria-valuetext", plain(show(get())));
      });
      return input;
    }

    /* Options: label; options, pairs of a value and its text; get() and set(value). */
    choice({ label, options, get, set }) {
      const row = element(this.controls, "fieldset", { class: "touch-choice" });
      element(row, "legend", {}, label);
      const name = `touch-choice-${(count += 1)}`;
      const inputs = options.map(([value, text]) => {
        const one = element(row, "label");
        const input = element(one, "input", { type: "radio", name, value, autocomplete: "off" });
        element(one, "span", {}, text);
        input.addEventListener("change", () => {
          set(value);
          this.update();
        });
        return input;
      });
      this.watchers.push(() =>
        inputs.forEach((input, index) => (input.checked = options[index][0] === get())),
      );
      return row;
    }

    /* Options: label; press(), what to do. */
    button({ label, press }) {
      const button = element(this.controls, "button", { type: "button" }, label);
      button.addEventListener("click", () => {
        press();
        this.update();
      });
      return button;
    }

    /** Numbers that follow from the state: what() returns pairs of a label and a text. */
    readout(what) {
      const output = element(this.controls, "output", { class: "touch-readout" });
      this.watchers.push(() => {
        output.replaceChildren();
        for (const [label, text] of what()) {
          const item = element(output, "span");
          element(item, "span", {}, label ? `${label} ` : "");
          element(item, "b", {}, text);
        }
      });
      return output;
    }

    draw(what) {
      this.watchers.push(what);
    }

    update() {
      this.watchers.forEach((refresh) => refresh());
    }

    finish() {
      this.button({ label: "Start again", press: () => this.start.forEach((back) => back()) });
      this.update();
    }
  }

  function add(name, figure) {
    figures[name] = figure;
    for (const place of document.querySelectorAll(`figure.touch-${name}`)) {
      const frame = new Frame(place);
      try {
        figure.mount(frame);
        frame.finish();
        place.classList.add("touch-on"); // hides the still figure
      } catch (error) {
        frame.live.remove();
        throw error;
      }
    }
  }

  return { add, clamp, figures, multiply, number, power, range, rotation, svd };
})();
