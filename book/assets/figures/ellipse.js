"use strict";

/* A disc becomes an ellipse: the two columns of a matrix, and where a step goes. */
touch.add(
  "ellipse",
  (() => {
    const { multiply, number, range, svd } = touch;

    /** Image of the unit circle under a 2×2 matrix. */
    const image = (matrix, n = 73) =>
      range(n, 0, 2 * Math.PI).map((t) => multiply(matrix, [Math.cos(t), Math.sin(t)]));

    function mount(frame) {
      const identity = [
        [1, 0],
        [0, 1],
      ];
      const state = frame.state({ first: [1.4, 0.2], second: [0.5, 1.1], angle: 1.9 });
      const matrix = () => [
        [state.first[0], state.second[0]],
        [state.first[1], state.second[1]],
      ];
      const step = () => [Math.cos(state.angle), Math.sin(state.angle)];
      const ranges = { x: [-2, 2], y: [-2, 2], equal: true };
      const left = frame.plane({ ...ranges, title: "steps of length one" });
      const right = frame.plane({ ...ranges, title: "what becomes of them" });

      frame.draw(() => {
        const [J, origin] = [matrix(), [0, 0]];
        const { S, u, v } = svd(J);
        left.clear();
        right.clear();
        left.area(image(identity), "c0");
        left.outline(image(identity), "c0");
        right.outline(image(identity), "faint dash");
        right.area(image(J), "c0");
        right.outline(image(J), "c0");
        for (const i of [0, 1]) {
          const far = u[i].map((x) => S[i] * x);
          left.line([origin, v[i]], "c0 dash");
          right.line([origin, far], "c0 dash");
          left.text(v[i].map((x) => 1.22 * x), `*v*${"₁₂"[i]}`, "c0 middle", [0, 4]);
          right.text(u[i].map((x) => (S[i] + 0.25) * x), `*σ*${"₁₂"[i]}*u*${"₁₂"[i]}`, "c0 middle", [0, 4]);
        }
        left.arrow(origin, step(), "c1");
        right.arrow(origin, multiply(J, step()), "c1");
        right.text(multiply(J, step()), "*Jδ*", "c1", [6, -6]);
        right.arrow(origin, state.first, "c2");
        right.arrow(origin, state.second, "c2");
      });
      left.handle({
        label: "step δ",
        name: "*δ*",
        kind: "c1",
        at: step,
        move: ([x, y]) => {
          state.angle = Math.atan2(y, x);
        },
        turn: (angle) => {
          state.angle += angle;
        },
      });
      right.handle({
        label: "first column of J",
        name: "*Je*₁",
        kind: "c2",
        at: () => state.first,
        move: (point) => {
          state.first = point;
        },
      });
      right.handle({
        label: "second column of J",
        name: "*Je*₂",
        kind: "c2",
        at: () => state.second,
        move: (point) => {
          state.second = point;
        },
      });
      frame.readout(() => {
        const J = matrix();
        const { S } = svd(J);
        return [
          ["*σ*₁ =", number(S[0])],
          ["*σ*₂ =", number(S[1])],
          ["‖*Jδ*‖ =", number(Math.hypot(...multiply(J, step())))],
          ["det *J* =", number(J[0][0] * J[1][1] - J[0][1] * J[1][0])],
        ];
      });
    }

    return { image, mount };
  })(),
);
