"use strict";

/* A digit that the reader draws, what a network of the book says of it, how surely, and the nearest
   image found of which it says something else. The network is data that tools/digit_network.py
   writes to book/assets/networks/digit.js, asked for when the figure comes into view. */
touch.add(
  "digit",
  (() => {
    const { clamp, number } = touch;
    const SIDE = 28;
    const PIXELS = SIDE * SIDE;
    const DIGITS = [...Array(10).keys()];
    const INSIDE = 20; // height or width of a drawing, as in the data
    const RADIUS = 1.3; // of the pen, where it is half grey
    const SOFT = 1.2; // pixels from black to white
    const INK = 0.32; // mean of an image; no test digit has more than 0.31
    const script = document.currentScript && document.currentScript.src;
    const watchers = [];
    let network = null;

    // -------- the network

    const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const sum = (list) => list.reduce((total, value) => total + value, 0);

    /** Numbers of half precision, exactly. */
    const halves = (data) =>
      Float64Array.from(new Uint16Array(data.buffer), (bits) => {
        const exponent = (bits >> 10) & 31;
        const fraction = (bits & 1023) + (exponent && 1024);
        return (bits >> 15 ? -fraction : fraction) * 2 ** ((exponent || 1) - 25);
      });

    /** What each output of a circular convolution of stride 2 with 4×4 taps reads. */
    const patches = (channels, size) =>
      Int32Array.from({ length: channels * size * size * 4 }, (_, n) => {
        const [place, channel] = [Math.floor(n / (16 * channels)), Math.floor(n / 16) % channels];
        const [up, across] = [Math.floor((2 * place) / size), place % (size / 2)];
        const row = (2 * up + (Math.floor(n / 4) % 4) - 1 + size) % size;
        const column = (2 * across + (n % 4) - 1 + size) % size;
        return (channel * size + row) * size + column;
      });

    /** Take the data of a network: shapes of its layers, and their numbers. */
    function receive({ shapes, weights, examples, ...facts }) {
      const values = halves(bytes(weights));
      let [at, size] = [0, SIDE];
      const layers = shapes.map((shape) => {
        const outputs = shape[0];
        const terms = shape.slice(1).reduce((product, n) => product * n, 1);
        const W = values.subarray(at, (at += outputs * terms));
        const b = values.subarray(at, (at += outputs));
        const index =
          shape.length === 4 ? patches(shape[1], size) : Int32Array.from({ length: terms }, (_, k) => k);
        size /= 2;
        return { W, b, index, outputs, terms, places: index.length / terms };
      });
      const images = bytes(examples);
      const example = (i) => images.subarray(i * PIXELS, (i + 1) * PIXELS);
      const greys = DIGITS.map((i) => Float32Array.from(example(i), (g) => g / 255));
      network = { ...facts, layers, examples: greys };
      watchers.forEach((watcher) => watcher());
    }

    /** Output o at place p is b[o] + Σ W[o, k] x[index[p, k]]. */
    function affine({ W, b, index, outputs, terms, places }, x) {
      const y = new Float64Array(outputs * places);
      const patch = new Float64Array(terms);
      for (let p = 0; p < places; p += 1) {
        for (let k = 0; k < terms; k += 1) patch[k] = x[index[p * terms + k]];
        for (let o = 0; o < outputs; o += 1) {
          let value = b[o];
          for (let k = 0, w = o * terms; k < terms; k += 1, w += 1) value += W[w] * patch[k];
          y[o * places + p] = value;
        }
      }
      return y;
    }

    /** Its transpose, applied to the gradient of the outputs. */
    function transposed({ W, index, outputs, terms, places }, gradient, size) {
      const x = new Float64Array(size);
      const patch = new Float64Array(terms);
      for (let p = 0; p < places; p += 1) {
        patch.fill(0);
        for (let o = 0; o < outputs; o += 1) {
          const g = gradient[o * places + p];
          for (let k = 0, w = o * terms; k < terms; k += 1, w += 1) patch[k] += W[w] * g;
        }
        for (let k = 0; k < terms; k += 1) x[index[p * terms + k]] += patch[k];
      }
      return x;
    }

    /** Logits of an image, and what the way back needs: sizes, and where MaxMin has swapped. */
    function run(image) {
      const tape = [];
      let x = Float64Array.from(image);
      network.layers.forEach((layer, l) => {
        const step = { size: x.length, swapped: null };
        x = affine(layer, x);
        if (l < network.layers.length - 1) {
          const n = layer.places;
          step.swapped = new Uint8Array(x.length);
          for (let first = 0; first < x.length; first += 1) {
            if (Math.floor(first / n) % 2) continue; // channels 2i and 2i + 1 are a pair
            const second = first + n;
            if (x[first] <= x[second]) continue; // the smaller one goes first
            [x[first], x[second]] = [x[second], x[first]];
            step.swapped[first] = 1;
          }
        }
        tape.push(step);
      });
      return { logits: x, tape };
    }

    const logits = (image) => Array.from(run(image).logits);

    /** Gradient of Σ rows[j] z_j with respect to the image. */
    function backward(tape, rows) {
      let gradient = Float64Array.from(rows);
      for (let l = network.layers.length - 1; l >= 0; l -= 1) {
        const { size, swapped } = tape[l];
        const n = network.layers[l].places;
        if (swapped)
          for (let first = 0; first < gradient.length; first += 1)
            if (swapped[first])
              [gradient[first], gradient[first + n]] = [gradient[first + n], gradient[first]];
        gradient = transposed(network.layers[l], gradient, size);
      }
      return gradient;
    }

    const gradient = (image, rows) => Array.from(backward(run(image).tape, rows));

    /** Classes from the largest logit to the smallest. */
    const ranking = (z) => [...DIGITS].sort((i, j) => z[j] - z[i]);

    const norm = (x) => Math.sqrt(x.reduce((total, value) => total + value * value, 0));

    /* The radius, of all programs P that compute the function f in float32 or better, such as this
       one: ‖P(v) - f(v)‖ ≤ a + c‖v‖ and Lip(f) ≤ L (lipbook.rounding.forward_error at the image 0).
       If m is the margin found at x, then a program finds one at a distance of r of at least
       m - √2 (a + c‖x‖) - √2 L r - √2 (a + c‖x‖ + c r), since an error moves the difference of
       two logits by √2 times its norm at most. It is positive for r below
       (m/√2 - 2(a + c‖x‖)) / (L + c). The last factor pays for the rounding of this line. */
    function radius(z, image) {
      const [first, second] = ranking(z);
      const { lipschitz, error, slope } = network;
      const margin = z[first] - z[second];
      const sure = margin / Math.SQRT2 - 2 * (error + slope * norm(image));
      return (Math.max(0, sure) / (lipschitz + slope)) * (1 - 1e-12);
    }

    /** A number of two digits, so that no more is printed than is proved or found. */
    const cut = (value, round) => number(round(value * 100) / 100);

    // -------- the nearest lie

    const inRange = (value) => clamp(value, [0, 1]);

    /* The nearest image found with another prediction, or null: for some rivals the difference of
       the two logits descends along its gradient, within [0, 1], until the prediction changes, and
       the border is looked for on the straight line back. */
    function lie(image, rivals = 2) {
      const x = Float64Array.from(image);
      const start = run(x).logits;
      const [label, ...others] = ranking(start);
      const says = (y) => ranking(run(y).logits)[0];
      let best = null;
      for (const rival of others.slice(0, rivals)) {
        const rows = DIGITS.map((j) => (j === label) - (j === rival));
        const length = (start[label] - start[rival]) / 16 + 0.01;
        let [y, far] = [x, null];
        for (let k = 0; k < 50 && !far; k += 1) {
          const { logits: z, tape } = run(y);
          if (ranking(z)[0] !== label) far = y;
          const g = backward(tape, rows);
          const step = length / Math.max(norm(g), 1e-9);
          y = y.map((value, i) => inRange(value - step * g[i]));
        }
        if (!far) continue;
        let [low, high] = [0, 1];
        const along = (t) => x.map((value, i) => value + t * (far[i] - value));
        for (let k = 0; k < 10; k += 1) {
          const middle = (low + high) / 2;
          if (says(along(middle)) === label) low = middle;
          else high = middle;
        }
        const found = along(high);
        const distance = norm(found.map((value, i) => value - x[i]));
        if (!best || distance < best.distance) best = { image: found, distance, label: says(found) };
      }
      return best;
    }

    // -------- the pen

    /** Grey levels of strokes, lists of points [x, y] in pixels from the upper left corner. */
    function rendered(strokes) {
      const image = new Float32Array(PIXELS);
      for (const stroke of strokes)
        stroke.forEach(([x2, y2], k) => {
          const [x1, y1] = stroke[Math.max(0, k - 1)];
          const length = (x2 - x1) ** 2 + (y2 - y1) ** 2;
          image.forEach((old, pixel) => {
            const [px, py] = [(pixel % SIDE) + 0.5, Math.floor(pixel / SIDE) + 0.5];
            const dot = (px - x1) * (x2 - x1) + (py - y1) * (y2 - y1);
            const t = length ? inRange(dot / length) : 0;
            const d = Math.hypot(px - x1 - t * (x2 - x1), py - y1 - t * (y2 - y1));
            image[pixel] = Math.max(old, inRange((RADIUS - d) / SOFT + 0.5));
          });
        });
      return image;
    }

    /** The strokes brought to the size of the data, and their centre of mass to the middle. */
    function centred(strokes) {
      const points = strokes.flat();
      if (!points.length) return strokes;
      const boxes = [0, 1].map((axis) => points.map((point) => point[axis]).sort((a, b) => a - b));
      const ends = boxes.map((values) => [values[0], values[values.length - 1]]);
      const longest = Math.max(...ends.map(([low, high]) => high - low));
      const scale = Math.min((INSIDE - 2 * RADIUS) / Math.max(longest, 1e-9), 4);
      const place = (middle, target) =>
        strokes.map((stroke) =>
          stroke.map((point) => point.map((value, a) => (value - middle[a]) * scale + target[a])),
        );
      const middle = ends.map(([low, high]) => (low + high) / 2);
      const image = rendered(place(middle, [SIDE / 2, SIDE / 2]));
      const mean = (at) => sum(image.map((grey, k) => grey * at(k))) / sum(image);
      const mass = [mean((k) => k % SIDE), mean((k) => Math.floor(k / SIDE))];
      return place(middle, mass.map((value) => SIDE - 0.5 - value));
    }

    const over = (image, example) =>
      example ? image.map((grey, k) => Math.max(grey, example[k])) : image;

    /** What the network sees: the strokes, centred, or as they lie on an example. */
    const seen = (strokes, example) =>
      over(rendered(example ? strokes : centred(strokes)), example);

    // -------- the figure

    function mount(frame) {
      const state = frame.state({ example: 3, strokes: [], pen: [3, 3], down: false });
      const sheet = { x: [0, SIDE], y: [0, SIDE], width: 282, axes: false };
      const paper = frame.plane({ ...sheet, title: "draw here" });
      const axes = { x: [-6, 3.5], y: [9.6, -0.6], xticks: [-6, -4, -2, 0, 2], yticks: DIGITS };
      const bars = frame.plane({ ...axes, width: 300, title: "logits" });
      const eye = frame.plane({ ...sheet, title: "what the network sees" });
      const other = frame.plane({ ...sheet, title: "the nearest lie that was found" });
      const example = () => network && network.examples[state.example];
      let [image, z, found] = [null, null, null];

      const box = (x, y, u, v) => [[x, y], [u, y], [u, v], [x, v]];
      const grey = (plane, levels, kind) =>
        levels.forEach((level, k) => {
          if (level < 0.01) return;
          const [x, y] = [k % SIDE, SIDE - Math.floor(k / SIDE)];
          const cell = plane.area(box(x, y - 1, x + 1, y), `${kind} pixel`);
          cell.setAttribute("style", `fill-opacity:${level.toFixed(3)}`);
        });
      const border = (plane) => plane.outline(box(0, 0, SIDE, SIDE), "faint thin");

      frame.draw(() => {
        [paper, eye, bars, other].forEach((plane) => plane.clear());
        const under = example();
        grey(paper, over(rendered(state.strokes), under), "");
        [paper, eye, other].forEach(border);
        [image, z, found] = [null, null, null];
        if (!network || !(under || state.strokes.length)) return;
        image = seen(state.strokes, under);
        z = logits(image);
        grey(eye, image, "");
        const [first, second] = ranking(z);
        z.forEach((value, j) => {
          const kind = j === first ? "c0 strong" : j === second ? "c1 strong" : "faint";
          bars.area(box(0, j - 0.36, value, j + 0.36), kind);
        });
        if (state.down) return;
        found = lie(image);
        if (!found) return;
        grey(other, found.image.map((g, k) => Math.min(g, image[k])), "");
        grey(other, found.image.map((g, k) => g - image[k]), "c0");
        grey(other, image.map((g, k) => g - found.image[k]), "c1");
      });

      // The pen: a pointer anywhere on the paper, or the arrow keys and the space bar.
      const go = ([x, y]) => {
        state.pen = [x, SIDE - y].map((value) => clamp(value, [0, SIDE]));
        if (!state.down) return;
        const stroke = state.strokes[state.strokes.length - 1];
        const [u, v] = stroke[stroke.length - 1];
        if (Math.hypot(u - state.pen[0], v - state.pen[1]) > 0.4) stroke.push(state.pen);
      };
      const lower = () => {
        state.strokes.push([state.pen]);
        state.down = true;
      };
      const pen = paper.handle({
        label: "pen, lowered and lifted by space",
        kind: "c1",
        step: 1,
        at: () => [state.pen[0], SIDE - state.pen[1]],
        move: go,
      });
      pen.addEventListener("keydown", (event) => {
        if (event.key !== " " && event.key !== "Enter") return;
        event.preventDefault();
        if (state.down) state.down = false;
        else lower();
        frame.update();
      });
      const svg = paper.svg;
      svg.classList.add("paper");
      const down = (event) => {
        event.preventDefault();
        event.stopPropagation();
        svg.setPointerCapture(event.pointerId);
        pen.focus({ preventScroll: true });
        state.down = false;
        go(paper.where(event));
        lower();
        frame.update();
      };
      svg.addEventListener("pointerdown", down, true); // before the point, which would be dragged
      svg.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
      svg.addEventListener("pointermove", (event) => {
        if (!svg.hasPointerCapture(event.pointerId)) return;
        go(paper.where(event));
        frame.update();
      });
      for (const end of ["pointerup", "pointercancel"])
        svg.addEventListener(end, () => {
          state.down = false;
          frame.update();
        });

      frame.choice({
        label: "test digit",
        options: DIGITS.map((digit) => [digit, `${digit}`]),
        get: () => (state.strokes.length ? null : state.example),
        set: (digit) => Object.assign(state, { example: digit, strokes: [], down: false }),
      });
      frame.button({
        label: "Clear",
        press: () => Object.assign(state, { example: null, strokes: [], pen: [14, 5], down: false }),
      });
      frame.readout(() => {
        if (!network) return [["", "Waiting for the network."]];
        if (!z) return [["", "Draw a digit, or take a test digit."]];
        const [first, second] = ranking(z);
        const about = [
          ["says", `${first}`],
          ["margin", number(z[first] - z[second])],
          ["certified radius", cut(radius(z, image), Math.floor)],
        ];
        if (state.down) about.push(["nearest lie", "lift the pen"]);
        else if (!found) about.push(["nearest lie", "none found"]);
        else about.push([`nearest lie (a ${found.label}) at`, cut(found.distance, Math.ceil)]);
        if (sum(image) > INK * PIXELS)
          about.push(["", "More ink than any digit has: clear, and draw a line."]);
        return about;
      });

      watchers.push(() => frame.update());
      if (!script || network) return;
      const view = new IntersectionObserver((entries) => {
        if (!entries.some((entry) => entry.isIntersecting)) return;
        view.disconnect();
        const source = document.createElement("script");
        source.src = new URL("../networks/digit.js", script).href;
        document.head.append(source);
      });
      view.observe(frame.live);
    }

    return { receive, halves, logits, gradient, radius, lie, rendered, centred, seen, mount };
  })(),
);
