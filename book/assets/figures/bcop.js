"use strict";

/* A kernel of two channels and 2×2 taps: its entries, and its singular values at all frequencies. */
touch.add(
  "bcop",
  (() => {
    const { multiply, number, range, rotation } = touch;
    const GRID = 16; // frequencies an axis
    const sum = (list) => list.reduce((total, value) => total + value, 0);

    /** The projector on the line at an angle, and the one on the line across. */
    function projectors(angle) {
      const [c, s] = [Math.cos(angle), Math.sin(angle)];
      return [
        [
          [c * c, c * s],
          [c * s, s * s],
        ],
        [
          [s * s, -c * s],
          [-c * s, c * c],
        ],
      ];
    }

    /** Taps K[y][x] of H □ [P; I-P] □ [Q, I-Q], each a 2×2 matrix; H, P and Q by their angles. */
    const bcop = (turn, p, q) =>
      projectors(p).map((first) =>
        projectors(q).map((second) => multiply(rotation(turn), multiply(first, second))),
      );

    /** The two rows of the reshaped kernel, 8 entries each. */
    const reshaped = (K) => [0, 1].map((i) => K.flat().flatMap((tap) => tap[i]));

    /** Reshaped kernel orthogonalisation: orthonormal rows (the first one first), divided by 2. */
    function rko(K) {
      const [first, second] = reshaped(K);
      const dot = (a, b) => sum(a.map((x, j) => x * b[j]));
      const unit = (a) => a.map((x) => x / Math.sqrt(dot(a, a)));
      const a = unit(first);
      const b = unit(second.map((x, j) => x - dot(a, second) * a[j]));
      const tap = (t) => [a, b].map((row) => row.slice(2 * t, 2 * t + 2).map((x) => x / 2));
      return [
        [tap(0), tap(1)],
        [tap(2), tap(3)],
      ];
    }

    /** Both singular values of the response Σ K[y][x] exp(i(yθ₁ + xθ₂)), the larger one first. */
    function values(K, theta) {
      const entry = (i, j) => {
        const parts = [0, 0];
        for (const y of [0, 1])
          for (const x of [0, 1]) {
            const angle = y * theta[0] + x * theta[1];
            parts[0] += K[y][x][i][j] * Math.cos(angle);
            parts[1] += K[y][x][i][j] * Math.sin(angle);
          }
        return parts;
      };
      const [a, b, c, d] = [entry(0, 0), entry(0, 1), entry(1, 0), entry(1, 1)];
      const times = (u, v) => [u[0] * v[0] - u[1] * v[1], u[0] * v[1] + u[1] * v[0]];
      const [ad, bc] = [times(a, d), times(b, c)];
      // Turned so that its determinant is positive, the matrix is a sum of p and q times unitary
      // matrices of determinants 1 and -1, and its singular values are p + q and |p - q|.
      const half = Math.atan2(ad[1] - bc[1], ad[0] - bc[0]) / 2;
      const turned = (u) => times(u, [Math.cos(half), -Math.sin(half)]);
      const [e, f, g, h] = [a, b, c, d].map(turned);
      const size = (sign) =>
        Math.hypot(e[0] + sign * h[0], e[1] - sign * h[1], f[0] - sign * g[0], f[1] + sign * g[1]) / 2;
      return [size(1) + size(-1), Math.abs(size(1) - size(-1))];
    }

    /** All singular values on an image of N×N pixels, from the largest. */
    const spectrum = (K, N = GRID) =>
      range(N * N, 0, N * N - 1)
        .flatMap((k) => values(K, [Math.floor(k / N), k % N].map((j) => (2 * Math.PI * j) / N)))
        .sort((s, t) => t - s);

    /** A kernel whose entries are moved by fixed numbers, times an amount. */
    const moved = (K, amount) =>
      K.map((row, y) =>
        row.map((tap, x) =>
          tap.map((line, i) =>
            line.map((value, j) => value + amount * Math.sin(1 + 7 * y + 5 * x + 3 * i + 2 * j)),
          ),
        ),
      );

    function mount(frame) {
      const state = frame.state({ p: 30, q: 75, turn: 20, amount: 0.5 });
      const kernel = () => {
        const [turn, p, q] = [state.turn, state.p, state.q].map((a) => (a * Math.PI) / 180);
        return bcop(turn, p, q);
      };
      const taps = frame.plane({ title: "the taps of BCOP", x: [-0.2, 4.4], y: [-0.2, 4.4], equal: true, axes: false });
      const all = frame.plane({
        title: "singular values, sorted",
        x: [0, 2 * GRID * GRID - 1],
        y: [0, 1.25],
        xticks: [
          [35, "largest"],
          [2 * GRID * GRID - 45, "smallest"],
        ],
        yticks: [0, 0.5, 1],
      });
      const line = (list) => list.map((value, k) => [k, value]).filter(([k]) => k % 7 === 0);
      let [exact, loose] = [[], []];
      frame.draw(() => {
        const K = kernel();
        taps.clear();
        all.clear();
        for (const y of [0, 1])
          for (const x of [0, 1])
            for (const i of [0, 1])
              for (const j of [0, 1]) {
                const value = K[y][x][i][j];
                const [left, top] = [2.2 * x + j, 4.2 - 2.2 * y - i];
                const corners = [
                  [left, top],
                  [left + 1, top],
                  [left + 1, top - 1],
                  [left, top - 1],
                ];
                const shape = taps.area(corners, value < 0 ? "c1" : "c0");
                shape.setAttribute("style", `fill-opacity:${number(0.6 * Math.abs(value))}`);
                taps.outline(corners, "faint thin");
                taps.text([left + 0.5, top - 0.5], number(value), "middle bare", [0, 4]);
              }
        exact = spectrum(K);
        loose = spectrum(rko(moved(K, state.amount)));
        all.line(line(exact), "c0");
        all.line(line(loose), "c1");
        all.text([0, exact[0]], "BCOP", "c0", [10, -7]);
        all.text([0, loose[0]], "RKO", "c1", [10, -9]);
      });
      for (const [key, label, max, step, show] of [
        ["p", "line of *P*", 180, 1, (value) => `${value}°`],
        ["q", "line of *Q*", 180, 1, (value) => `${value}°`],
        ["turn", "turn *H*", 360, 1, (value) => `${value}°`],
        ["amount", "moved for RKO", 1, 0.01, (value) => number(value)],
      ])
        frame.slider({
          label,
          min: 0,
          max,
          step,
          show,
          get: () => state[key],
          set: (value) => {
            state[key] = value;
          },
        });
      frame.readout(() => {
        const off = (list) => Math.max(...list.map((value) => Math.abs(value - 1)));
        const mean = (list) => Math.sqrt(sum(list.map((value) => value ** 2)) / list.length);
        return [
          ["max |*σ* − 1|: BCOP", number(off(exact))],
          ["RKO", number(off(loose))],
          ["root mean square: BCOP", number(mean(exact))],
          ["RKO", number(mean(loose))],
        ];
      });
    }

    return { bcop, rko, values, spectrum, moved, mount };
  })(),
);
