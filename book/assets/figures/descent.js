"use strict";

/* Gradient descent in a valley: how long may a step be, and which is best? */
touch.add(
  "descent",
  (() => {
    const { multiply, number, power, range, rotation } = touch;
    const ANGLE = 0.5; // of the gentle eigenvector
    const STEPS = 40;

    /** Factors by which a step α multiplies the error along the eigenvectors. */
    const factors = (eigenvalues, alpha) => eigenvalues.map((lambda) => 1 - alpha * lambda);

    /** Errors of gradient descent on ½ eᵀAe from a start, A = R(angle) diag(eigenvalues) R(angle)ᵀ. */
    function path(eigenvalues, angle, start, alpha, steps) {
      const R = rotation(angle);
      const scaled = R.map((row) => row.map((r, j) => r * eigenvalues[j]));
      const A = multiply(scaled, rotation(-angle));
      const errors = [start];
      for (let k = 0; k < steps; k += 1) {
        const e = errors[k];
        const gradient = multiply(A, e);
        errors.push(e.map((value, i) => value - alpha * gradient[i]));
      }
      return errors;
    }

    /** Points of the level set ½ eᵀAe = height. */
    const level = (eigenvalues, angle, height, n = 73) =>
      range(n, 0, 2 * Math.PI).map((t) =>
        multiply(rotation(angle), [
          Math.sqrt((2 * height) / eigenvalues[0]) * Math.cos(t),
          Math.sqrt((2 * height) / eigenvalues[1]) * Math.sin(t),
        ]),
      );

    /** Steps that divide the error by ten, in the slower direction; infinite from the limit on. */
    function tenth(eigenvalues, alpha) {
      const slowest = Math.max(...factors(eigenvalues, alpha).map(Math.abs));
      return slowest < 1 ? Math.log(10) / -Math.log(slowest) : Infinity;
    }

    function mount(frame) {
      // The smaller eigenvalue is 1; share is α λ_max.
      const state = frame.state({ share: 1.4, kappa: 15, start: [1.6, 1.3] });
      const eigenvalues = () => [1, state.kappa];
      const alpha = () => state.share / state.kappa;
      const valley = frame.plane({ title: "the valley", x: [-2.2, 2.2], y: [-2, 2], equal: true });
      const decay = frame.plane({
        title: "what is left of the error",
        x: [0, STEPS],
        y: [-4, 2],
        xticks: [0, 10, 20, 30, 40],
        yticks: [-4, -2, 0, 2].map((k) => [k, power(k)]),
        xlabel: "step",
      });
      frame.draw(() => {
        const errors = path(eigenvalues(), ANGLE, state.start, alpha(), STEPS);
        valley.clear();
        decay.clear();
        for (const height of [0.02, 0.15, 0.6, 1.7, 4, 9, 20, 40])
          valley.outline(level(eigenvalues(), ANGLE, height), "faint thin");
        const seen = errors.filter((e) => Math.hypot(...e) < 1e6);
        valley.line(seen, "c0");
        seen.slice(1).forEach((e) => valley.dot(e, "c0", 2.5));
        const axes = multiply(rotation(-ANGLE), state.start); // components of the start
        const lines = factors(eigenvalues(), alpha()).map((factor, i) =>
          errors.map((_, k) => [
            k,
            Math.max(Math.log10(Math.abs(axes[i] * factor ** k) || 1e-99), -20),
          ]),
        );
        decay.line(lines[0], "c2");
        decay.line(lines[1], "c1");
        decay.text([STEPS, 2], "along the valley", "c2 end", [-6, 16]);
        decay.text([STEPS, 2], "across it", "c1 end", [-6, 34]);
      });
      valley.handle({
        label: "start",
        kind: "c0",
        at: () => state.start,
        move: (point) => {
          state.start = point;
        },
      });
      frame.slider({
        label: "step *αλ*_{max}",
        min: 0.02,
        max: 2.2,
        step: 0.01,
        get: () => state.share,
        set: (value) => {
          state.share = value;
        },
      });
      frame.slider({
        label: "condition *κ*",
        min: 1,
        max: 30,
        step: 1,
        get: () => state.kappa,
        set: (value) => {
          state.kappa = value;
        },
        show: (value) => `${value}`,
      });
      frame.readout(() => {
        const [along, across] = factors(eigenvalues(), alpha());
        const steps = tenth(eigenvalues(), alpha());
        return [
          ["factor along", number(along)],
          ["across", number(across)],
          Number.isFinite(steps)
            ? ["a tenth is left after", `${number(steps, 1)} steps`]
            : ["a tenth is left", "never"],
        ];
      });
    }

    return { factors, path, level, tenth, mount };
  })(),
);
