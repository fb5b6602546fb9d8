"use strict";

/* Two tokens of two entries that attend to each other, in a ball: slope here, and bound on the ball. */
touch.add(
  "domain",
  (() => {
    const { multiply, number, power, range } = touch;
    const SCALE = 1 / Math.sqrt(2);
    const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

    /** Weights of the tokens for each query. */
    const attention = (x) =>
      x.map((query) => {
        const logits = x.map((key) => SCALE * dot(query, key));
        const largest = Math.max(...logits);
        const sizes = logits.map((logit) => Math.exp(logit - largest));
        const total = sizes.reduce((sum, size) => sum + size, 0);
        return sizes.map((size) => size / total);
      });

    const outputs = (x) => multiply(attention(x), x);

    /** Jacobian of all outputs: of o_i by x_m, P_im I + s P_im (x_m - o_i) x_iᵀ, and s Cov_i if m = i. */
    function jacobian(x) {
      const P = attention(x);
      const o = multiply(P, x);
      const d = x[0].length;
      return range(x.length * d, 0, x.length * d - 1).map((row) =>
        range(x.length * d, 0, x.length * d - 1).map((column) => {
          const [i, a, m, b] = [Math.floor(row / d), row % d, Math.floor(column / d), column % d];
          let value = P[i][m] * ((a === b) + SCALE * (x[m][a] - o[i][a]) * x[i][b]);
          if (m === i)
            value += SCALE * P[i].reduce((sum, p, j) => sum + p * x[j][a] * (x[j][b] - o[i][b]), 0);
          return value;
        }),
      );
    }

    /** The largest singular value, by powers of JᵀJ. */
    function norm(J) {
      const columns = J[0].map((_, j) => J.map((row) => row[j]));
      let v = columns.map((_, k) => 1 + 0.1 * k);
      for (let k = 0; k < 300; k += 1) {
        v = multiply(columns, multiply(J, v));
        const length = Math.hypot(...v);
        v = v.map((value) => value / length);
      }
      return Math.hypot(...multiply(J, v));
    }

    /** The bound of three factors for n tokens in the ball of radius R about 0. */
    function bound(R, n = 2) {
      const omega = Math.min(n, n / (1 + (n - 1) * Math.exp(-2 * SCALE * R * R)));
      return SCALE * R * R * (1 + Math.sqrt(omega)) + Math.sqrt(omega);
    }

    const into = (x, R) => x.map((value) => value * Math.min(1, R / Math.max(Math.hypot(...x), 1e-9)));

    function mount(frame) {
      const state = frame.state({ tokens: [[1, 0.6], [-0.8, 1]], log: 0.3 });
      const END = 4.4;
      const R = () => 10 ** state.log;
      const inside = () => state.tokens.map((token) => into(token, R()));
      const plane = frame.plane({ title: "tokens in a ball", x: [-END, END], y: [-END, END], equal: true });
      const graph = frame.plane({
        title: "bound, and slope at the tokens",
        x: [-1, 0.6],
        y: [-0.5, 1.7],
        xticks: [-1, -0.5, 0, 0.5].map((k) => [k, number(10 ** k, 1)]),
        yticks: [0, 1].map((k) => [k, power(k)]),
        xlabel: "radius *R*",
      });
      const slope = () => norm(jacobian(inside()));
      frame.draw(() => {
        plane.clear();
        graph.clear();
        plane.outline(range(91, 0, 2 * Math.PI).map((a) => [R() * Math.cos(a), R() * Math.sin(a)]), "faint");
        const x = inside();
        outputs(x).forEach((o, i) => {
          plane.arrow(x[i], o, "faint");
          plane.dot(o, i ? "c2" : "c0", 3);
        });
        graph.line(range(80, -1, 0.6).map((k) => [k, Math.log10(bound(10 ** k))]), "c1");
        graph.line([[state.log, -0.5], [state.log, 1.7]], "faint thin dash");
        graph.dot([state.log, Math.log10(bound(R()))], "c1");
        graph.dot([state.log, Math.log10(slope())], "c0");
      });
      [0, 1].forEach((i) =>
        plane.handle({
          label: `token ${i + 1}`,
          name: i ? "*x*_{2}" : "*x*_{1}",
          kind: i ? "c2" : "c0",
          at: () => inside()[i],
          move: (point) => {
            state.tokens[i] = into(point, R());
          },
        }),
      );
      frame.slider({
        label: "radius *R*",
        min: -1,
        max: 0.6,
        step: 0.01,
        show: (value) => number(10 ** value),
        get: () => state.log,
        set: (value) => {
          state.log = value;
        },
      });
      frame.readout(() => [
        ["slope here", number(slope(), 3)],
        ["bound on the ball", number(bound(R()), 3)],
        ["bound / slope", number(bound(R()) / slope())],
      ]);
    }

    return { attention, outputs, jacobian, norm, bound, mount };
  })(),
);
