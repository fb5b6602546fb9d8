"use strict";

/* A chain of random layers: all singular values of its Jacobian, by depth. */
touch.add(
  "depth",
  (() => {
    const { multiply, number, power, range } = touch;
    const WIDTH = 12;
    const DEPTH = 50;

    const ACTIVATIONS = {
      tanh: [Math.tanh, (s) => 1 - Math.tanh(s) ** 2],
      ReLU: [(s) => Math.max(s, 0), (s) => (s > 0 ? 1 : 0)],
      "|x|": [Math.abs, Math.sign],
    };

    /** Standard normal numbers that depend on the seed alone (mulberry32, Box and Muller). */
    function normals(seed) {
      let a = (seed * 0x9e3779b9) | 0;
      const uniform = () => {
        a = (a + 0x6d2b79f5) | 0;
        let t = Math.imul(a ^ (a >>> 15), 1 | a);
        t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
        return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
      };
      return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
    }

    /** Matrix n×n whose rows are those of a Gaussian one made orthonormal one after the other. */
    function orthogonal(n, normal) {
      const Q = [];
      while (Q.length < n) {
        let row = Array.from({ length: n }, normal);
        for (let pass = 0; pass < 2; pass += 1) // once more for the rounding
          for (const q of Q) {
            const along = q.reduce((sum, x, j) => sum + x * row[j], 0);
            row = row.map((x, j) => x - along * q[j]);
          }
        const norm = Math.hypot(...row);
        Q.push(row.map((x) => x / norm));
      }
      return Q;
    }

    /** Weights of a chain: orthogonal, or Gaussian with entries of variance 1/n. */
    function weights(kind, seed, n = WIDTH, depth = DEPTH) {
      const normal = normals(seed);
      const gaussian = () =>
        range(n, 0, 1).map(() => range(n, 0, 1).map(() => normal() / Math.sqrt(n)));
      return range(depth, 0, 1).map(() =>
        kind === "orthogonal" ? orthogonal(n, normal) : gaussian(),
      );
    }

    /** Singular values of a square matrix, from the largest (one-sided Jacobi rotations). */
    function singularValues(matrix) {
      const columns = matrix[0].map((_, j) => matrix.map((row) => row[j]));
      const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);
      for (let sweep = 0, turned = true; turned && sweep < 40; sweep += 1) {
        turned = false;
        for (let i = 0; i < columns.length; i += 1)
          for (let j = i + 1; j < columns.length; j += 1) {
            const [a, b] = [columns[i], columns[j]];
            const [p, q, r] = [dot(a, a), dot(b, b), dot(a, b)];
            if (Math.abs(r) <= 1e-15 * Math.sqrt(p * q)) continue;
            turned = true;
            const z = (q - p) / (2 * r);
            const t = (z < 0 ? -1 : 1) / (Math.abs(z) + Math.hypot(1, z));
            const c = 1 / Math.hypot(1, t);
            columns[i] = a.map((x, k) => c * (x - t * b[k]));
            columns[j] = b.map((x, k) => c * (x + t * a[k]));
          }
      }
      return columns.map((column) => Math.sqrt(dot(column, column))).sort((a, b) => b - a);
    }

    /** Singular values of the Jacobian of the first l layers x ↦ φ(gain·Wx), for every l. */
    function spectra(matrices, gain, activation, x) {
      const [phi, slope] = ACTIVATIONS[activation];
      let product = x.map((_, i) => x.map((__, j) => (i === j ? 1 : 0)));
      const values = [x.map(() => 1)];
      for (const W of matrices) {
        const s = multiply(W, x).map((value) => gain * value);
        const passed = multiply(W, product);
        product = passed.map((row, i) => row.map((value) => slope(s[i]) * gain * value));
        x = s.map(phi);
        values.push(singularValues(product));
      }
      return values;
    }

    function mount(frame) {
      const state = frame.state({ gain: 1, kind: "Gaussian", activation: "|x|", seed: 1 });
      const plane = frame.plane({
        title: "the 12 singular values",
        width: 400,
        x: [0, DEPTH],
        y: [-8, 8],
        xticks: [0, 10, 20, 30, 40, 50],
        yticks: [-8, -4, 0, 4, 8].map((k) => [k, k === 0 ? "1" : power(k)]),
        xlabel: "layers",
      });
      let values = [];
      frame.draw(() => {
        const input = Array.from({ length: WIDTH }, normals(1000 + state.seed));
        const matrices = weights(state.kind, state.seed);
        values = spectra(matrices, state.gain, state.activation, input);
        plane.clear();
        plane.line([[0, 0], [DEPTH, 0]], "faint thin dash");
        for (let i = WIDTH - 1; i >= 0; i -= 1) {
          // What is below the rounding errors of the largest is not drawn.
          const seen = values.findIndex((all) => !(all[i] > 1e-13 * all[0]));
          const line = values.slice(0, seen < 0 ? values.length : seen);
          plane.line(
            line.map((all, l) => [l, Math.log10(all[i])]),
            i === 0 ? "c1" : i === WIDTH - 1 ? "c3" : "c0 thin",
          );
        }
        plane.text([0, 8], "largest", "c1", [8, 14]);
        plane.text([0, 8], "smallest", "c3", [68, 14]);
      });
      frame.slider({
        label: "gain *σ*_{w}",
        min: 0.5,
        max: 2,
        step: 0.01,
        get: () => state.gain,
        set: (value) => {
          state.gain = value;
        },
      });
      frame.choice({
        label: "matrices",
        options: [
          ["Gaussian", "Gaussian"],
          ["orthogonal", "orthogonal"],
        ],
        get: () => state.kind,
        set: (value) => {
          state.kind = value;
        },
      });
      frame.choice({
        label: "activation",
        options: Object.keys(ACTIVATIONS).map((name) => [name, name.replace("x", "*x*")]),
        get: () => state.activation,
        set: (value) => {
          state.activation = value;
        },
      });
      frame.slider({
        label: "another draw",
        min: 1,
        max: 20,
        step: 1,
        get: () => state.seed,
        set: (value) => {
          state.seed = value;
        },
        show: (value) => `${value}`,
      });
      frame.readout(() => {
        const all = values[DEPTH];
        const mean = Math.sqrt(all.reduce((sum, value) => sum + value ** 2, 0) / WIDTH);
        const smallest =
          all[WIDTH - 1] > 1e-13 * all[0] ? number(all[WIDTH - 1]) : `below ${power(-13)} of it`;
        return [
          ["after 50 layers: largest", number(all[0])],
          ["smallest", smallest],
          ["root mean square", number(mean)],
        ];
      });
    }

    return { normals, weights, singularValues, spectra, mount };
  })(),
);
