"use strict";

/* Three classes in the plane: MaxMin after a rotation, then rows of length 1. */
touch.add(
  "disc",
  (() => {
    const { multiply, number, range, rotation } = touch;
    const TURN = rotation(Math.PI / 5);
    const ROWS = [0, 1, 2].map((k) => 1 + (k * 2 * Math.PI) / 3).map((a) => [Math.cos(a), Math.sin(a)]);
    const END = 2.6;
    const dot = (a, b) => a[0] * b[0] + a[1] * b[1];

    const logits = (x, bias) => {
      const h = multiply(TURN, x).sort((s, t) => s - t);
      return ROWS.map((row, j) => dot(row, h) + bias[j]);
    };
    const decision = (z) => z.indexOf(Math.max(...z));

    /** Margins over the norms of differences of rows: the certified radius. */
    function radius(z) {
      const y = decision(z);
      const gap = (j) => Math.hypot(ROWS[y][0] - ROWS[j][0], ROWS[y][1] - ROWS[j][1]);
      return Math.min(...[0, 1, 2].filter((j) => j !== y).map((j) => (z[y] - z[j]) / gap(j)));
    }

    /** The nearest point of another class: on each side of the crease, where all is affine, and for
        each class, that of the two half-planes n·p ≥ c and m·p ≥ 0 together. */
    function nearest(x, bias) {
      const y = decision(logits(x, bias));
      const crease = [TURN[1][0] - TURN[0][0], TURN[1][1] - TURN[0][1]];
      let best = null;
      for (const side of [1, -1])
        for (const j of [0, 1, 2].filter((k) => k !== y)) {
          const d = ROWS[j].map((value, i) => value - ROWS[y][i]);
          const h = side > 0 ? d : [d[1], d[0]];
          const n = [0, 1].map((i) => h[0] * TURN[0][i] + h[1] * TURN[1][i]);
          const c = bias[y] - bias[j];
          const m = crease.map((value) => side * value);
          const onto = (a, e) => x.map((v, i) => v + (Math.max(0, e - dot(a, x)) * a[i]) / dot(a, a));
          const det = n[0] * m[1] - n[1] * m[0];
          const corner = [(c * m[1]) / det, (-c * m[0]) / det];
          for (const p of [onto(n, c), onto(m, 0), corner]) {
            const length = Math.hypot(p[0] - x[0], p[1] - x[1]);
            const holds = dot(n, p) >= c - 1e-12 && dot(m, p) >= -1e-12;
            if (holds && !(best && best.length <= length)) best = { point: p, length };
          }
        }
      return best;
    }

    function mount(frame) {
      const state = frame.state({ x: [1.4, 1.7], b: 0.4 });
      const plane = frame.plane({ title: "a certified disc", x: [-END, END], y: [-END, END], equal: true, axes: false });
      const bias = () => [-0.3, 0.2, state.b];
      frame.draw(() => {
        plane.clear();
        plane.regions((x) => decision(logits(x, bias())), ["faint", "c2", "c3"]);
        const size = radius(logits(state.x, bias()));
        const at = (a) => [state.x[0] + size * Math.cos(a), state.x[1] + size * Math.sin(a)];
        plane.outline(range(91, 0, 2 * Math.PI).map(at), "c0");
        plane.line([state.x, nearest(state.x, bias()).point], "c1 dash");
      });
      const move = (x) => Object.assign(state, { x });
      plane.handle({ label: "input", name: "*x*", kind: "c0", at: () => state.x, move });
      const set = (b) => Object.assign(state, { b });
      const bounds = { min: -1, max: 1, step: 0.05 };
      frame.slider({ label: "bias of a class", ...bounds, get: () => state.b, set });
      frame.readout(() => {
        const z = logits(state.x, bias());
        const [first, second] = [...z].sort((s, t) => t - s);
        return [
          ["margin", number(first - second)],
          ["certified radius", number(radius(z))],
          ["true radius", number(nearest(state.x, bias()).length)],
        ];
      });
    }

    return { logits, radius, nearest, mount };
  })(),
);
