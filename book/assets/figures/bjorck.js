"use strict";

/* Björck's iteration on one singular value: where it goes, and in how many steps. */
touch.add(
  "bjorck",
  (() => {
    const { clamp, number, range } = touch;
    const END = 2.4;
    const MOST = 40; // steps

    /** c_j = 4^-j binom(2j, j), the coefficients of (1 - x)^(-1/2). */
    function coefficients(p) {
      const c = [1];
      for (let j = 0; j < p; j += 1) c.push((c[j] * (2 * j + 1)) / (2 * j + 2));
      return c;
    }

    /** f_p(σ) = σ Σ_{j ≤ p} c_j (1 - σ²)^j, one step of order p. */
    const step = (sigma, p) =>
      sigma * coefficients(p).reduce((sum, c, j) => sum + c * (1 - sigma ** 2) ** j, 0);

    /** Iterates, until one is within 1e-6 of ±1, is beyond recall, or has taken too many steps. */
    function path(sigma, p) {
      const values = [sigma];
      for (let k = 0; k < MOST; k += 1) {
        const last = values[k];
        if (Math.abs(Math.abs(last) - 1) < 1e-6 || Math.abs(last) > 1e3) break;
        values.push(step(last, p));
      }
      return values;
    }

    /** Where a path ends: 1, -1, infinity, or not a number if it has not arrived. */
    function limit(values) {
      const last = values[values.length - 1];
      if (Math.abs(Math.abs(last) - 1) < 1e-6) return Math.sign(last);
      return Math.abs(last) > 1e3 ? Infinity : NaN;
    }

    /** Intervals of starts that end alike in as many steps; those that do not arrive are left out. */
    function basinsOf(p, n = 960) {
      const found = [];
      for (let k = 0; k < n; k += 1) {
        const values = path(((k + 0.5) * END) / n, p);
        const [end, steps] = [limit(values), values.length - 1];
        const last = found[found.length - 1];
        if (last && last.end === end && (end === Infinity || last.steps === steps))
          last.to = ((k + 1) * END) / n;
        else found.push({ from: (k * END) / n, to: ((k + 1) * END) / n, end, steps });
      }
      return found.filter(({ end }) => !Number.isNaN(end));
    }

    function mount(frame) {
      const state = frame.state({ sigma: 0.25, order: 1 });
      const graph = frame.plane({
        title: "one step after another",
        x: [0, END],
        y: [-END, END],
        xticks: [0, 1, 2],
        yticks: [-2, -1, 0, 1, 2],
        xlabel: "modulus of *σ*",
      });
      const basins = frame.plane({
        title: "steps that it takes",
        x: [0, END],
        y: [0, 30],
        xticks: [0, 1, 2],
        yticks: [0, 10, 20, 30],
        xlabel: "*σ* at the start",
      });
      frame.draw(() => {
        graph.clear();
        basins.clear();
        const grid = range(121, 0, END);
        graph.line([[0, 0], [END, END]], "faint thin dash");
        graph.line([[0, 0], [END, -END]], "faint thin dash");
        graph.line([[0, 0], [END, 0]], "faint thin");
        graph.line(grid.map((s) => [s, step(s, state.order)]), "c0");
        // A negative value goes on as its modulus does, since the step is odd.
        const web = [];
        path(state.sigma, state.order).reduce((last, next) => {
          const value = step(Math.abs(last), state.order);
          web.push([Math.abs(last), value], [Math.abs(value), value]);
          return next;
        });
        graph.line([[state.sigma, 0], ...web], "c1 thin");
        for (const { from, to, end, steps } of basinsOf(state.order)) {
          const kind = end === 1 ? "c2" : end === -1 ? "c3" : "c1";
          const height = kind === "c1" ? 30 : Math.min(steps, 30);
          basins.area([[from, 0], [to, 0], [to, height], [from, height]], `${kind} strong`);
        }
        basins.line([[state.sigma, 0], [state.sigma, 30]], "c1 thin");
        basins.text([0, 30], "to 1", "c2", [8, 14]);
        basins.text([0, 30], "to −1", "c3", [46, 14]);
        basins.text([0, 30], "away", "c1", [92, 14]);
      });
      const take = ([x]) => {
        state.sigma = clamp(x, [0.001, END]);
      };
      for (const plane of [graph, basins])
        plane.handle({
          label: "singular value at the start",
          kind: "c1",
          step: 0.05,
          at: () => [state.sigma, 0],
          move: take,
        });
      frame.choice({
        label: "order *p*",
        options: [1, 2, 3, 4].map((p) => [p, `${p}`]),
        get: () => state.order,
        set: (value) => {
          state.order = value;
        },
      });
      frame.readout(() => {
        const values = path(state.sigma, state.order);
        const end = limit(values);
        const steps = values.length - 1;
        const way = values.slice(1, 4).map((value) => number(value, 3));
        const outcome =
          end === 1
            ? `reaches 1 in ${steps} steps`
            : end === -1
              ? `reaches −1 in ${steps} steps: the wrong sign`
              : end === Infinity
                ? "runs away"
                : `has not arrived in ${steps} steps`;
        return [
          ["*σ* =", number(state.sigma, 3)],
          ["then", way.join(", ") || "–"],
          ["", outcome],
        ];
      });
    }

    return { coefficients, step, path, limit, mount };
  })(),
);
