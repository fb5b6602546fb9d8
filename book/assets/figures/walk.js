"use strict";

/* A classifier of the plane, three layers of rotations and MaxMin: a walk against the gradient. */
touch.add(
  "walk",
  (() => {
    const { multiply, number, range, rotation } = touch;
    const LAYERS = [
      [1, [-0.6, 0.9]],
      [2.8, [-0.4, 0.6]],
      [0.3, [0.7, 0.5]],
    ];
    const ROWS = [0, 1, 2].map((k) => 0.4 + (k * 2 * Math.PI) / 3).map((a) => [Math.cos(a), Math.sin(a)]);
    const END = 2.2;

    /** Logits at a point, and their Jacobian. */
    function run(x) {
      let [h, J] = [x, [[1, 0], [0, 1]]];
      for (const [angle, bias] of LAYERS) {
        h = multiply(rotation(angle), h).map((value, i) => value + bias[i]);
        J = multiply(rotation(angle), J);
        if (h[0] > h[1]) [h, J] = [[h[1], h[0]], [J[1], J[0]]];
      }
      return { z: multiply(ROWS, h), J: multiply(ROWS, J) };
    }

    const decision = (z) => z.indexOf(Math.max(...z));
    const margin = (z, y) => z[y] - Math.max(...z.filter((_, j) => j !== y));

    /** Gradient of the margin at x, and the certified radius: no difference is steeper than √3. */
    function start(x) {
      const { z, J } = run(x);
      const y = decision(z);
      const rival = z.indexOf(Math.max(...z.filter((_, j) => j !== y)));
      const gradient = J[y].map((value, i) => value - J[rival][i]);
      return { y, margin: margin(z, y), gradient, radius: margin(z, y) / Math.sqrt(3) };
    }

    /** The point after t radii against the gradient. */
    function after(x, t) {
      const { gradient, radius } = start(x);
      const length = Math.hypot(...gradient);
      return x.map((value, i) => value - (t * radius * gradient[i]) / length);
    }

    function mount(frame) {
      const state = frame.state({ x: [-0.4, -0.2], t: 1.5 });
      const plane = frame.plane({
        title: "three classes and a walk",
        x: [-END, END],
        y: [-END, END],
        width: 320,
        height: 336,
        equal: true,
        axes: false,
      });
      const graph = frame.plane({
        title: "margin along the walk",
        height: 336,
        x: [0, 3],
        y: [-1.5, 2],
        xticks: [0, 1, 2, 3],
        yticks: [-1, 0, 1, 2],
        xlabel: "*t*, in certified radii",
      });
      const kinds = ["faint", "c2", "c3"];
      const along = (t) => margin(run(after(state.x, t)).z, start(state.x).y);
      frame.draw(() => {
        plane.clear();
        graph.clear();
        plane.regions((x) => decision(run(x).z), kinds);
        const { radius } = start(state.x);
        const circle = (a) => [state.x[0] + radius * Math.cos(a), state.x[1] + radius * Math.sin(a)];
        plane.outline(range(91, 0, 2 * Math.PI).map(circle), "c0");
        plane.arrow(state.x, after(state.x, state.t), "c1");
        graph.line([[0, 0], [3, 0]], "faint thin");
        graph.line([[0, along(0)], [1, 0]], "c0 thin dash");
        graph.line(range(121, 0, 3).map((t) => [t, along(t)]), "c1");
        graph.dot([state.t, along(state.t)], "c1");
      });
      plane.handle({
        label: "input",
        name: "*x*",
        kind: "c0",
        at: () => state.x,
        move: (x) => {
          state.x = x;
        },
      });
      frame.slider({
        label: "length *t* of the walk",
        min: 0,
        max: 3,
        step: 0.05,
        get: () => state.t,
        set: (t) => {
          state.t = t;
        },
      });
      frame.readout(() => [
        ["certified radius", number(start(state.x).radius)],
        ["margin at *x*", number(along(0))],
        ["at the end", number(along(state.t))],
        ["decision", along(state.t) > 0 ? "kept" : "lost"],
      ]);
    }

    return { run, start, after, mount };
  })(),
);
