"use strict";

/* A linear classifier of points in the plane: its margins, its complexity, and the bound of both. */
touch.add(
  "margins",
  (() => {
    const { clamp, number, range } = touch;
    const N = 600; // points
    const DELTA = 0.05;
    const dot = (a, b) => a[0] * b[0] + a[1] * b[1];

    /** Points of two classes: label s = ±1, and a normal number around ±(1, 0.6) for each entry. */
    function sample(n, seed = 1) {
      let a = seed;
      const uniform = () => {
        a = (Math.imul(a, 1664525) + 1013904223) >>> 0; // a congruential generator, for a picture
        return (a + 0.5) / 4294967296;
      };
      const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
      return range(n, 0, n - 1).map((i) => {
        const s = i % 2 ? 1 : -1;
        return { s, x: [s + 0.5 * normal(), 0.6 * s + 0.5 * normal()] };
      });
    }

    const margins = (points, w) => points.map(({ s, x }) => s * dot(w, x));

    /** Share of the margins that are not above γ. */
    const loss = (values, gamma) => values.filter((m) => m <= gamma).length / values.length;

    /** 2B‖X‖/(γn) for the linear functions with ‖w‖ ≤ B: twice the complexity of their ramps. */
    const complexity = (points, length, gamma) =>
      (2 * length * Math.sqrt(points.reduce((sum, { x }) => sum + dot(x, x), 0))) /
      (gamma * points.length);

    /** What is left to chance. */
    const chance = (n, delta = DELTA) => 3 * Math.sqrt(Math.log(2 / delta) / (2 * n));

    function mount(frame) {
      const points = sample(N);
      const state = frame.state({ w: [0.8, 0.9], gamma: 0.5 });
      const END = 2.6;
      const data = frame.plane({ title: "points and classifier", x: [-END, END], y: [-END, END], equal: true });
      const graph = frame.plane({
        title: "training loss and bound",
        x: [0, 2],
        y: [0, 1.5],
        xticks: [0, 0.5, 1, 1.5, 2],
        yticks: [0, 0.5, 1, 1.5],
        xlabel: "margin *γ*",
      });
      const length = () => Math.hypot(...state.w);
      const terms = (values, gamma) => [
        loss(values, gamma),
        complexity(points, length(), gamma),
        chance(N),
      ];
      const total = (values, gamma) => terms(values, gamma).reduce((sum, term) => sum + term, 0);
      frame.draw(() => {
        const values = margins(points, state.w);
        const { w, gamma } = state;
        data.clear();
        graph.clear();
        points.slice(0, 150).forEach(({ s, x }) => data.dot(x, s > 0 ? "c0" : "c1", 2.2));
        for (const m of [-gamma, 0, gamma]) {
          const foot = w.map((value) => (value * m) / length() ** 2);
          const across = [-w[1] / length(), w[0] / length()];
          const end = (side) => foot.map((value, i) => value + side * 9 * across[i]);
          data.line([end(-1), end(1)], m ? "faint dash thin" : "");
        }
        data.arrow([0, 0], w, "c3");
        const grid = range(200, 0.01, 2);
        graph.line(grid.map((g) => [g, loss(values, g)]), "c0");
        graph.line(grid.map((g) => [g, complexity(points, length(), g)]), "c1");
        graph.line(grid.map((g) => [g, total(values, g)]), "c3");
        graph.text([2, loss(values, 2)], "margin loss", "c0 end", [-4, 16]);
        graph.text([2, complexity(points, length(), 2)], "complexity", "c1 end", [-4, -6]);
        graph.text([2, Math.min(1.4, total(values, 2))], "bound", "c3 end", [-4, -8]);
        graph.line([[gamma, 0], [gamma, 1.5]], "faint thin dash");
      });
      data.handle({
        label: "weights w",
        name: "*w*",
        kind: "c3",
        at: () => state.w,
        move: (w) => {
          if (Math.hypot(...w) > 0.05) state.w = w;
        },
      });
      graph.handle({
        label: "margin γ",
        kind: "c3",
        step: 0.05,
        at: () => [state.gamma, total(margins(points, state.w), state.gamma)],
        move: ([gamma]) => {
          state.gamma = clamp(gamma, [0.02, 2]);
        },
      });
      frame.readout(() => {
        const values = margins(points, state.w);
        const [training, class_, rest] = terms(values, state.gamma);
        return [
          ["training error", number(loss(values, 0), 3)],
          ["margin loss", number(training, 3)],
          ["+ complexity", number(class_, 3)],
          ["+ chance", number(rest, 3)],
          ["=", number(training + class_ + rest, 3)],
          ["*γ* / ‖*w*‖ =", number(state.gamma / length())],
        ];
      });
    }

    return { sample, margins, loss, complexity, chance, mount };
  })(),
);
