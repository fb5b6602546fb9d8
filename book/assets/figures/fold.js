"use strict";

/* Folding the plane: layers x ↦ φ(R(angle) x + shift), piece by piece, and what they keep. */
touch.add(
  "fold",
  (() => {
    const { multiply, number, rotation } = touch;
    const CELLS = 8; // along a side of the square from -1 to 1
    const IDENTITY = [
      [1, 0],
      [0, 1],
    ];

    /** What an activation does to a pair: the lines where it bends, and its matrix on each side. */
    const ACTIVATIONS = {
      MaxMin: {
        creases: [[1, -1]], // min(x), max(x): the pair is exchanged where x₁ > x₂
        matrix: ([over]) =>
          over
            ? [
                [0, 1],
                [1, 0],
              ]
            : IDENTITY,
      },
      ReLU: {
        creases: [
          [1, 0],
          [0, 1],
        ],
        matrix: ([first, second]) => [
          [first ? 1 : 0, 0],
          [0, second ? 1 : 0],
        ],
      },
      "|x|": {
        creases: [
          [1, 0],
          [0, 1],
        ],
        matrix: ([first, second]) => [
          [first ? 1 : -1, 0],
          [0, second ? 1 : -1],
        ],
      },
    };

    /** Area of a polygon. */
    const area = (points) =>
      Math.abs(
        points.reduce((sum, [x, y], i) => {
          const [u, v] = points[(i + 1) % points.length];
          return sum + x * v - u * y;
        }, 0),
      ) / 2;

    const determinant = ([[a, b], [c, d]]) => a * d - b * c;

    /** Part of a convex polygon where normal · x + offset has the sign. */
    function side(points, normal, offset, sign) {
      const height = ([x, y]) => sign * (normal[0] * x + normal[1] * y + offset);
      const kept = [];
      points.forEach((here, i) => {
        const next = points[(i + 1) % points.length];
        const [h, k] = [height(here), height(next)];
        if (h >= 0) kept.push(here);
        if ((h > 0 && k < 0) || (h < 0 && k > 0)) {
          const t = h / (h - k);
          kept.push(here.map((x, j) => x + t * (next[j] - x)));
        }
      });
      return kept;
    }

    /** A piece of the plane and the affine map A x + b that the layers are on it. */
    const start = (points) => ({ points, A: IDENTITY, b: [0, 0] });

    /** The pieces after one more layer. */
    function layer(pieces, activation, angle, shift) {
      const { creases, matrix } = ACTIVATIONS[activation];
      const R = rotation(angle);
      return pieces.flatMap((piece) => {
        const A = multiply(R, piece.A);
        const b = multiply(R, piece.b).map((value) => value + shift);
        let parts = [{ points: piece.points, sides: [] }];
        for (const crease of creases) {
          const normal = [0, 1].map((j) => crease[0] * A[0][j] + crease[1] * A[1][j]);
          const offset = crease[0] * b[0] + crease[1] * b[1];
          parts = parts.flatMap(({ points, sides }) => {
            if (Math.hypot(...normal) < 1e-12) return [{ points, sides: [...sides, offset > 0] }];
            return [1, -1].map((sign) => ({
              points: side(points, normal, offset, sign),
              sides: [...sides, sign > 0],
            }));
          });
        }
        return parts
          .filter(({ points }) => points.length > 2 && area(points) > 1e-12)
          .map(({ points, sides }) => {
            const M = matrix(sides);
            return { points, A: multiply(M, A), b: multiply(M, b) };
          });
      });
    }

    /** The pieces after several layers that are alike. */
    function fold(polygon, activation, angle, shift, depth) {
      let pieces = [start(polygon)];
      for (let l = 0; l < depth; l += 1) pieces = layer(pieces, activation, angle, shift);
      return pieces;
    }

    /** Share of the area on which the layers keep both directions, one, or none. */
    function kept(pieces) {
      const shares = [0, 0, 0];
      let total = 0;
      for (const { points, A } of pieces) {
        const rank = Math.abs(determinant(A)) > 1e-9 ? 2 : Math.hypot(...A.flat()) > 1e-9 ? 1 : 0;
        shares[rank] += area(points);
        total += area(points);
      }
      return shares.map((share) => share / total).reverse();
    }

    const image = ({ points, A, b }) =>
      points.map((x) => multiply(A, x).map((value, i) => value + b[i]));

    function mount(frame) {
      const state = frame.state({ activation: "ReLU", depth: 2, degrees: 50, shift: 0.2 });
      const side = 2 / CELLS;
      const cells = [];
      for (let i = 0; i < CELLS; i += 1)
        for (let j = 0; j < CELLS; j += 1) {
          const [x, y] = [-1 + i * side, -1 + j * side];
          const colour = `c${(i < CELLS / 2 ? 0 : 1) + (j < CELLS / 2 ? 0 : 2)}`;
          const corners = [
            [x, y],
            [x + side, y],
            [x + side, y + side],
            [x, y + side],
          ];
          cells.push({ corners, colour: (i + j) % 2 ? colour : `${colour} strong` });
        }
      const ranges = { x: [-1.9, 1.9], y: [-1.9, 1.9], equal: true };
      const before = frame.plane({ ...ranges, title: "before" });
      const after = frame.plane({ ...ranges, title: "after" });
      let shares = [];
      frame.draw(() => {
        before.clear();
        after.clear();
        const all = [];
        for (const { corners, colour } of cells) {
          before.area(corners, colour);
          const { activation, depth, degrees, shift } = state;
          const pieces = fold(corners, activation, (degrees * Math.PI) / 180, shift, depth);
          for (const piece of pieces) {
            if (Math.abs(determinant(piece.A)) > 1e-9) after.area(image(piece), colour);
            else after.outline(image(piece), colour);
          }
          all.push(...pieces);
        }
        shares = kept(all);
      });
      frame.choice({
        label: "activation",
        options: Object.keys(ACTIVATIONS).map((name) => [name, name.replace("|x|", "|*x*|")]),
        get: () => state.activation,
        set: (value) => {
          state.activation = value;
        },
      });
      for (const [key, label, min, max, step, show] of [
        ["depth", "layers", 0, 6, 1, (value) => `${value}`],
        ["degrees", "turn of each", 0, 90, 1, (value) => `${value}°`],
        ["shift", "shift of each", -0.6, 0.6, 0.05, (value) => number(value)],
      ])
        frame.slider({
          label,
          min,
          max,
          step,
          show,
          get: () => state[key],
          set: (value) => {
            state[key] = value;
          },
        });
      frame.readout(() => {
        const percent = (share) => `${number(100 * share, 0)} %`;
        return [
          ["keeps its area", percent(shares[0])],
          ["crushed to a line", percent(shares[1])],
          ["to a point", percent(shares[2])],
        ];
      });
    }

    return { area, side, fold, kept, image, mount };
  })(),
);
