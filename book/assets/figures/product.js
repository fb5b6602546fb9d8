"use strict";

/* Two layers: what is lost of the product of their norms when they are turned apart. */
touch.add(
  "product",
  (() => {
    const { multiply, number, range, rotation, svd } = touch;
    const LARGEST = 2;

    /** The second layer after the first, both diag(2, small), the second turned by an angle. */
    function layers(small, angle) {
      const first = [
        [LARGEST, 0],
        [0, small],
      ];
      return { first, second: multiply(first, rotation(-angle)) };
    }

    /** Norm of the product of the two layers. */
    function norm(small, angle) {
      const { first, second } = layers(small, angle);
      return svd(multiply(second, first)).S[0];
    }

    const image = (matrix, n = 73) =>
      range(n, 0, 2 * Math.PI).map((t) => multiply(matrix, [Math.cos(t), Math.sin(t)]));

    const circle = (radius) =>
      image([
        [radius, 0],
        [0, radius],
      ]);

    function mount(frame) {
      const state = frame.state({ small: 0.5, angle: Math.PI / 4.5 });
      const ranges = { x: [-4.4, 4.4], y: [-4.4, 4.4], equal: true };
      const middle = frame.plane({ ...ranges, title: "after the first layer" });
      const end = frame.plane({ ...ranges, title: "after both" });
      const favourite = () => [Math.cos(state.angle), Math.sin(state.angle)];
      frame.draw(() => {
        const { first, second } = layers(state.small, state.angle);
        middle.clear();
        end.clear();
        middle.outline(circle(1), "faint thin dash");
        middle.area(image(first), "c0");
        middle.outline(image(first), "c0");
        middle.arrow([0, 0], [LARGEST, 0], "c0");
        middle.text([LARGEST, 0], "*u*", "c0", [8, 5]);
        middle.line([[0, 0], favourite().map((x) => 3 * x)], "c1");
        const product = multiply(second, first);
        const { S, u } = svd(product);
        end.outline(circle(LARGEST ** 2), "c1 dash");
        end.area(image(product), "c0");
        end.outline(image(product), "c0");
        end.arrow([0, 0], u[0].map((x) => S[0] * x), "c0");
        end.text([0, LARGEST ** 2], "the bound", "c1 middle", [0, 18]);
      });
      middle.handle({
        label: "direction that the second layer stretches most",
        name: "*v*",
        kind: "c1",
        at: () => favourite().map((x) => 3 * x),
        move: ([x, y]) => {
          state.angle = Math.atan2(y, x);
        },
        turn: (angle) => {
          state.angle += angle;
        },
      });
      frame.slider({
        label: "singular value *s*",
        min: 0,
        max: LARGEST,
        step: 0.05,
        get: () => state.small,
        set: (value) => {
          state.small = value;
        },
      });
      frame.readout(() => {
        const reached = norm(state.small, state.angle);
        const cosine = Math.abs(Math.cos(state.angle));
        return [
          ["angle of *u* and *v*", `${number((Math.acos(cosine) * 180) / Math.PI, 0)}°`],
          ["‖*W*₂*W*₁‖ =", number(reached)],
          ["‖*W*₂‖‖*W*₁‖ =", number(LARGEST ** 2)],
          ["used", `${number((100 * reached) / LARGEST ** 2, 0)} %`],
        ];
      });
    }

    return { layers, norm, image, mount };
  })(),
);
