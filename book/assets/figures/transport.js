"use strict";

/* Two piles of equal weights in the plane: the best plan, the best critic, and that both agree. */
touch.add(
  "transport",
  (() => {
    const { number, range } = touch;
    const distance = (p, q) => Math.hypot(p[0] - q[0], p[1] - q[1]);
    const mean = (list) => list.reduce((total, value) => total + value, 0) / list.length;

    const orders = (list) =>
      list.length < 2
        ? [list]
        : list.flatMap((first) =>
            orders(list.filter((other) => other !== first)).map((rest) => [first, ...rest]),
          );

    /** The cheapest of all n! ways to send each x to a y of its own, and its mean distance. */
    function plan(x, y) {
      let best = { cost: Infinity };
      for (const to of orders(x.map((_, i) => i))) {
        const cost = mean(to.map((j, i) => distance(x[i], y[j])));
        if (cost < best.cost) best = { to, cost };
      }
      return best;
    }

    /** Numbers v with v[j] ≤ v[to[i]] + |x[i] - y[j]| - |x[i] - y[to[i]]|: shortest ways from 0. */
    function potential(x, y, to) {
      const v = y.map(() => 0);
      for (let round = 0; round <= y.length; round += 1)
        x.forEach((point, i) =>
          y.forEach((_, j) => {
            const more = distance(point, y[j]) - distance(point, y[to[i]]);
            v[j] = Math.min(v[j], v[to[i]] + more);
          }),
        );
      return v;
    }

    /** The critic v^c(z) = min |z - y[j]| - v[j]. */
    const critic = (z, y, v) => Math.min(...y.map((point, j) => distance(z, point) - v[j]));

    function mount(frame) {
      const state = frame.state({
        x: [[-1.6, 0.2], [-1, 1.2], [-0.2, 0.6], [-0.9, -0.6], [0.4, 1.5]],
        y: [[0.2, -1.2], [1.1, -0.8], [1.7, 0.1], [0.8, 0.7], [-0.4, -1.6]],
      });
      const ranges = { x: [-2.2, 2.2], y: [-2.2, 2.2], width: 320, height: 340, equal: true, axes: false };
      const left = frame.plane({ ...ranges, title: "the best plan" });
      const right = frame.plane({ ...ranges, title: "the best critic" });
      let [best, value] = [null, 0];
      frame.draw(() => {
        const { x, y } = state;
        best = plan(x, y);
        const v = potential(x, y, best.to);
        const f = (z) => critic(z, y, v);
        value = mean(x.map(f)) - mean(y.map(f));
        left.clear();
        right.clear();
        // Bands of the critic, a quarter wide: their borders are its level lines.
        right.regions((z) => (Math.floor(4 * f(z)) % 2 ? 0 : 1), ["c0"]);
        for (const plane of [left, right]) {
          const kind = plane === left ? "" : "thin";
          best.to.forEach((j, i) => plane.line([x[i], y[j]], kind));
        }
        x.forEach((point) => right.dot(point, "c0"));
        y.forEach((point) => right.dot(point, "c1"));
      });
      for (const [name, kind] of [["x", "c0"], ["y", "c1"]])
        range(5, 0, 4).forEach((i) =>
          left.handle({
            label: `${name} ${i + 1}`,
            kind,
            at: () => state[name][i],
            move: (point) => {
              state[name][i] = point;
            },
          }),
        );
      frame.readout(() => [
        ["cost of the plan", number(best.cost, 3)],
        ["value of the critic", number(value, 3)],
      ]);
    }

    return { plan, potential, critic, mount };
  })(),
);
