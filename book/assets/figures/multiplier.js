"use strict";

/* One hidden layer of two ReLUs: the bound of LipSDP with the multiplier tI, as a function of t. */
touch.add(
  "multiplier",
  (() => {
    const { clamp, multiply, number, range, rotation, svd } = touch;
    const norm = (A) => svd(A).S[0];

    /** Both weights; the second one stretches most what lies at an angle from the first one's image. */
    const weights = (angle) => [
      [[2, 0], [0, 0.5]],
      multiply([[1.5, 0], [0, 0.4]], rotation(-angle)),
    ];

    /** ρ(tI), the largest eigenvalue of W₁ᵀ t² (2tI - W₂ᵀW₂)⁻¹ W₁; infinite up to t = ‖W₂‖²/2. */
    function rho([W1, W2], t) {
      const { S, v } = svd(W2);
      if (2 * t <= S[0] ** 2) return Infinity;
      // In the coordinates of the right singular vectors of W₂ the bracket is diagonal.
      const roots = S.map((s) => t / Math.sqrt(2 * t - s * s));
      return norm(multiply(roots.map((root, i) => v[i].map((entry) => root * entry)), W1)) ** 2;
    }

    /** The largest norm of W₂DW₁ for D with zeros and ones. */
    const patterns = ([W1, W2]) =>
      Math.max(
        ...[[0, 1], [1, 0], [1, 1]].map((d) => norm(multiply(W2, W1.map((row, i) => row.map((w) => d[i] * w))))),
      );

    const product = ([W1, W2]) => norm(W1) * norm(W2);

    /** The t with the least bound: ρ is convex in t, so that thirds of an interval may be dropped. */
    function best(W) {
      const top = norm(W[1]) ** 2;
      let [low, high] = [top / 2, 2 * top];
      for (let k = 0; k < 100; k += 1) {
        const [a, b] = [low + (high - low) / 3, high - (high - low) / 3];
        if (rho(W, a) < rho(W, b)) high = b;
        else low = a;
      }
      return (low + high) / 2;
    }

    function mount(frame) {
      const state = frame.state({ degrees: 60, t: 3 });
      const END = 4;
      const plane = frame.plane({
        width: 480,
        x: [0, END],
        y: [0, 6],
        xticks: [0, 1, 2, 3, 4],
        yticks: [0, 2, 4, 6],
        xlabel: "multiplier *t*",
        title: "bounds of the Lipschitz constant",
      });
      const W = () => weights((state.degrees * Math.PI) / 180);
      const bound = (t) => Math.sqrt(rho(W(), t));
      frame.draw(() => {
        plane.clear();
        const top = norm(W()[1]) ** 2;
        for (const [value, text, kind] of [
          [product(W()), "product", "c1"],
          [patterns(W()), "all patterns", "c2"],
        ]) {
          plane.line([[0, value], [END, value]], `${kind} dash`);
          plane.text([0.05, value], text, kind, [0, value === product(W()) ? -6 : 15]);
        }
        plane.line([[top / 2, 0], [top / 2, 6]], "faint thin dash");
        plane.line(range(240, top / 2 + 1e-3, END).map((t) => [t, bound(t)]), "c0");
        plane.dot([top, bound(top)], "c3");
        plane.text([top, bound(top)], "closed form", "c3", [8, 16]);
      });
      plane.handle({
        label: "multiplier and its bound",
        kind: "c0",
        step: 0.05,
        at: () => [state.t, bound(state.t)],
        move: ([t]) => {
          state.t = clamp(t, [norm(W()[1]) ** 2 / 2 + 0.01, END]);
        },
      });
      frame.slider({
        label: "angle of *u* and *v*",
        min: 0,
        max: 90,
        step: 1,
        show: (value) => `${value}°`,
        get: () => state.degrees,
        set: (value) => {
          state.degrees = value;
        },
      });
      frame.readout(() => [
        ["*t* =", number(state.t)],
        ["bound", number(bound(state.t), 3)],
        ["best *t* =", number(best(W()))],
        ["its bound", number(bound(best(W())), 3)],
        ["product", number(product(W()), 3)],
        ["all patterns", number(patterns(W()), 3)],
      ]);
    }

    return { weights, rho, patterns, product, best, mount };
  })(),
);
